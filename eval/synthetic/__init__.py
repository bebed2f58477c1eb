"""Synthetic data with planted features, and metrics of how well a dictionary recovers them."""
