"""Supervised dictionaries of the indirect object identification task (Makelov et al. 2024, arXiv:2405.08366)."""
