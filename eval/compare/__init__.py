"""Comparison of recipes and of runs (``sparsary compare``)."""
