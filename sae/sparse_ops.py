"""Arithmetic on sparse codes. This plain reference is what faster kernels are checked against."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .code import SparseCode


def decode(code: SparseCode, atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "tokens d_out"]:
    """Sum of each token's atoms, weighted by its values; touches only the atoms that occur.

    Differentiable in ``atoms`` and in ``code.values``.
    """
    # Under autocast the values come in a lower precision than the atoms; embedding_bag wants one dtype.
    values = code.values.to(atoms.dtype)
    return F.embedding_bag(code.latents, atoms, code.starts, mode="sum", per_sample_weights=values)
