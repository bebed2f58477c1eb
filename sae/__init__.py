"""Sparse dictionaries of activations: tensors in, sparse codes out. Independent of any language model."""

if __name__ == "sae":
    raise ImportError("sae is a part of sparsary: write `from sparsary.sae import ...` (a checkout needs `pip install -e .`).")

from .autoencoder import SAE
from .checkpoint import load_dictionary
from .dictionary import SparseDictionary
from .encoder import Encoder
from .encoders import ENCODERS
from .sparse_code import SparseCode

__all__ = ["ENCODERS", "SAE", "Encoder", "SparseCode", "SparseDictionary", "load_dictionary"]
