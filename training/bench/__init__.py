"""Speed benchmarks behind `sparsary bench`; results are ratios measured within one run."""
