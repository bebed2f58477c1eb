"""Sparse dictionaries of activations: tensors in, sparse codes out. Knows nothing of language models."""

from .autoencoder import SAE
from .checkpoint import load_dictionary
from .code import SparseCode
from .dictionary import SparseDictionary
from .encoder import Encoder
from .encoders import ENCODERS

__all__ = ["ENCODERS", "SAE", "Encoder", "SparseCode", "SparseDictionary", "load_dictionary"]
