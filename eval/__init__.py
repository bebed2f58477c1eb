"""Evaluation of dictionaries: reports, feature pages, probing, circuits, attribution graphs, comparisons."""

if __name__ == "eval":
    raise ImportError(
        "eval is a part of sparsary: write `from sparsary.eval import ...` (a checkout needs `pip install -e .`)."
    )
