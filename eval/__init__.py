"""Judging a dictionary from its checkpoint: reconstruction, downstream loss, dark matter."""
