"""Probing of latents with labelled text (``sparsary probe``)."""
