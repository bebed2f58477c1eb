"""Transcoders and crosscoders: dictionaries of several activations of a model. Tensors in, sparse codes out."""

if __name__ == "transcoders":
    raise ImportError(
        "transcoders is a part of sparsary: write `from sparsary.transcoders import ...` (a checkout needs `pip install -e .`)."
    )

from .cross_layer import CrossLayerTranscoder
from .crosscoder import Crosscoder
from .stack import Stack, load_stack
from .transcoder import Transcoder

__all__ = ["CrossLayerTranscoder", "Crosscoder", "Stack", "Transcoder", "load_stack"]
