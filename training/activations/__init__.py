"""Model activations: recording them with hooks, storing them in shards, streaming them as shuffled batches."""
