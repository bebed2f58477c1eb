"""Trains dictionaries: recipes, activations, the loop."""

if __name__ == "training":
    raise ImportError(
        "training is a part of sparsary: write `from sparsary.training import ...` (a checkout needs `pip install -e .`)."
    )
