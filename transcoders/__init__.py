"""Transcoders: dictionaries from one activation of a model to another. Tensors in, sparse codes out."""

if __name__ == "transcoders":
    raise ImportError(
        "transcoders is a part of sparsary: write `from sparsary.transcoders import ...` (a checkout needs `pip install -e .`)."
    )

from .cross_layer import CrossLayerTranscoder
from .stack import Stack, load_stack
from .transcoder import Transcoder

__all__ = ["CrossLayerTranscoder", "Stack", "Transcoder", "load_stack"]
