"""Measurements of speed, as ratios within one run: what `sparsary bench` runs."""
