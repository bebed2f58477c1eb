"""Dictionaries from one activation of a model to another: tensors in, sparse codes out."""

from sae.checkpoint import KINDS

from .cross_layer import CrossLayerTranscoder
from .stack import Stack, load_stack
from .transcoder import Transcoder

# What a checkpoint or recipe calls them: whoever imports this package can load and train them.
KINDS |= {"transcoder": Transcoder, "cross_layer_transcoder": CrossLayerTranscoder}

__all__ = ["CrossLayerTranscoder", "Stack", "Transcoder", "load_stack"]
