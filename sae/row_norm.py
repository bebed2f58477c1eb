"""Per-token normalizations used by some published dictionaries, for loading only."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Added to the divisor but not to the scale that undoes it, as in the published code.
EPSILON = 1e-5


class NormedRows(NamedTuple):
    """Normalized rows, and the scale and mean that undo the normalization: ``row * scale + mean``."""

    rows: Float[Tensor, "tokens d"]
    scale: Float[Tensor, "tokens 1"]
    mean: Float[Tensor, "tokens 1"]


def layer_norm(x: Float[Tensor, "tokens d"]) -> NormedRows:
    """Subtract each row's mean and divide by its unbiased standard deviation plus ``EPSILON``.

    Undoing multiplies by the standard deviation without ``EPSILON``, so a row comes back slightly shorter. Source: the code of
    Gao et al. 2024, arXiv:2406.04093, adopted by other libraries.
    """
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    deviation = centred.std(dim=-1, keepdim=True)
    return NormedRows(centred / (deviation + EPSILON), deviation, mean)


def constant_norm(x: Float[Tensor, "tokens d"]) -> NormedRows:
    """Scale each row to norm ``sqrt(d)``; rows of zeros stay zero."""
    scale = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
    return NormedRows(x / scale, scale, torch.zeros_like(scale))


def centred(x: Float[Tensor, "tokens d"]) -> NormedRows:
    """Subtract each row's mean, as in the residual stream of a model whose writing weights TransformerLens has centered."""
    mean = x.mean(dim=-1, keepdim=True)
    return NormedRows(x - mean, torch.ones_like(mean), mean)


ROW_NORMS: dict[str, Callable[[Float[Tensor, "tokens d"]], NormedRows]] = {
    "layer_norm": layer_norm,
    "constant_norm": constant_norm,
    "centred": centred,
}
