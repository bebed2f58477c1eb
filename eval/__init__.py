"""Judging a dictionary from its checkpoint: reconstruction, downstream loss, dark matter."""

if __name__ == "eval":
    raise ImportError(
        "eval is a part of sparsary: write `from sparsary.eval import ...` (a checkout needs `pip install -e .`)."
    )
