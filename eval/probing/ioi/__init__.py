"""Comparison with supervised feature dictionaries on the IOI task (Makelov et al. 2024, arXiv:2405.08366)."""
