"""Activations: read from a model, stored in shards, streamed as shuffled batches."""
