"""Encoder directions as linear functions of raw activations: ``pre_act = vector @ x + constant``."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.one_site import OneSiteDictionary


class Readers(NamedTuple):
    """One direction and one constant per latent."""

    vectors: Float[Tensor, "latents d_in"]
    constants: Float[Tensor, " latents"]


@torch.no_grad()
def readers(dictionary: OneSiteDictionary, latents: Int[Tensor, " latents"] | None = None) -> Readers:
    """Return the encoder directions of latents (default: all), with input scale, pre-encoder bias and encoder bias folded in.

    Raises:
        ValueError: If the encoder's values are not linear in its input (matching pursuit, lista), or a latent is out of range.
    """
    weights, scale = dictionary.weights, dictionary.in_scale
    if weights.b_enc is None or not dictionary.encoder.linear:
        raise ValueError(
            f"dictionary: expected an encoder with pre-activations, got {type(dictionary.encoder).__name__}, which selects "
            "latents sequentially, so they are not linear functions of its input."
        )
    if dictionary.row_norm is not None:
        raise ValueError(
            f"dictionary: expected row_norm null, got {dictionary.row_norm}, after which pre-activations are not linear in the "
            "activations."
        )
    if latents is not None and latents.numel() and not 0 <= int(latents.min()) <= int(latents.max()) < dictionary.n_latents:
        raise ValueError(
            f"latents: expected 0 to {dictionary.n_latents - 1}, got {int(latents.min())} to {int(latents.max())}."
        )
    chosen = slice(None) if latents is None else latents
    W_enc, constants = weights.W_enc[chosen], weights.b_enc[chosen]
    if weights.shift is not None:
        constants = constants - W_enc @ weights.shift
    return Readers(W_enc / scale, constants)
