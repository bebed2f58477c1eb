"""Threshold: fixed per-latent thresholds. For loaded dictionaries, not for training."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, scorer, with_gradient
from ..sparse_code import SparseCode
from ..tiled_scores import above


class Threshold(Encoder):
    """Encoder that keeps the pre-activations above each latent's fixed threshold, and above zero, unchanged.

    ``threshold`` is in units of normalized pre-activations. ``jumprelu`` stores logarithms instead: converting to them and back
    would cause rounding errors, and a threshold of zero has no logarithm.
    """

    unit_atoms = False
    threshold: Float[Tensor, " n_latents"]

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        scores = scorer(x, weights)
        return with_gradient(above(scores.tiles(), self.threshold.clamp_min(0), *scores.shape), x, weights)

    def prepare(self, n_latents: int) -> None:
        self.register_buffer("threshold", torch.zeros(n_latents))
