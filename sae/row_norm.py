"""Normalisations of each row by itself, which some published dictionaries were trained behind. Not trained here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Added to the standard deviation that rows are divided by, not to the one that undoes it: so did those who published them.
EPSILON = 1e-5


class NormedRows(NamedTuple):
    """Rows as the encoder sees them, and what undoes it: ``row * scale + mean``."""

    rows: Float[Tensor, "tokens d"]
    scale: Float[Tensor, "tokens 1"]
    mean: Float[Tensor, "tokens 1"]


def layer_norm(x: Float[Tensor, "tokens d"]) -> NormedRows:
    """Less the row's mean, divided by its unbiased standard deviation.

    What undoes it is the plain deviation, so a row comes back a little short. Source: the code of Gao et al. 2024,
    arXiv:2406.04093, from which others took it.
    """
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    deviation = centred.std(dim=-1, keepdim=True)
    return NormedRows(centred / (deviation + EPSILON), deviation, mean)


def constant_norm(x: Float[Tensor, "tokens d"]) -> NormedRows:
    """Scaled to a norm of ``sqrt(d)``; a row of zeros stays one."""
    scale = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
    return NormedRows(x / scale, scale, torch.zeros_like(scale))


def centred(x: Float[Tensor, "tokens d"]) -> NormedRows:
    """Less the row's mean, as the streams are of a model whose writing weights TransformerLens has centred."""
    mean = x.mean(dim=-1, keepdim=True)
    return NormedRows(x - mean, torch.ones_like(mean), mean)


ROW_NORMS: dict[str, Callable[[Float[Tensor, "tokens d"]], NormedRows]] = {
    "layer_norm": layer_norm,
    "constant_norm": constant_norm,
    "centred": centred,
}
