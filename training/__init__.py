"""Training of sparse dictionaries: recipes, activation caching and the training loop."""

if __name__ == "training":
    raise ImportError(
        "training is a part of sparsary: write `from sparsary.training import ...` (a checkout needs `pip install -e .`)."
    )
