"""Attention heads of a task: direct effects on the answer, attention to labels, and ranks of queries, keys and values."""
