"""Arithmetic on sparse codes. This plain reference is what faster kernels are checked against."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .code import SparseCode

# From one entry in sixteen on the dense product is faster, as measured on two CPU cores for widths 1024 to 12288: encoders
# without a budget begin with every second latent on. Small codes are not worth the question.
DENSE_SHARE = 1 / 16
DENSE_ENTRIES = 1 << 18


def decode(code: SparseCode, atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "tokens d_out"]:
    """Sum of each token's atoms, weighted by its values; touches only the atoms that occur, unless nearly all do.

    Differentiable in ``atoms`` and in ``code.values``.
    """
    entries = code.latents.shape[0]
    # Under autocast the values come in a lower precision than the atoms; embedding_bag wants one dtype.
    code = SparseCode(code.latents, code.values.to(atoms.dtype), code.starts)
    if entries >= DENSE_ENTRIES and entries >= DENSE_SHARE * code.n_tokens * atoms.shape[0]:
        return code.to_dense(atoms.shape[0]) @ atoms
    return F.embedding_bag(code.latents, atoms, code.starts, mode="sum", per_sample_weights=code.values)
