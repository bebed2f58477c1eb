"""Dictionaries from one activation of a model to another: tensors in, sparse codes out."""

if __name__ == "transcoders":
    raise ImportError(
        "transcoders is a part of sparsary: write `from sparsary.transcoders import ...` (a checkout needs `pip install -e .`)."
    )

from ..sae.checkpoint import KINDS
from .cross_layer import CrossLayerTranscoder
from .stack import Stack, load_stack
from .transcoder import Transcoder

# What a checkpoint or recipe calls them: whoever imports this package can load and train them.
KINDS |= {"transcoder": Transcoder, "cross_layer_transcoder": CrossLayerTranscoder}

__all__ = ["CrossLayerTranscoder", "Stack", "Transcoder", "load_stack"]
