"""Threshold: fixed thresholds, as dictionaries from elsewhere bring them. Loaded, not trained."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, scorer, with_gradient
from ..sparse_code import SparseCode
from ..tiled_scores import above


class Threshold(Encoder):
    """Keep the pre-activations above the latent's threshold, and above zero, unchanged.

    ``jumprelu`` learns its thresholds as logarithms; read back from those they would be off by a rounding, and a threshold
    of zero has none. ``threshold`` is in the units of normalised pre-activations.
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
