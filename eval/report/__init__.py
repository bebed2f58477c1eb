"""Evaluation reports (``sparsary eval``)."""
