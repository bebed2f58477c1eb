"""Synthetic data with planted features, and how well a dictionary recovers them."""
