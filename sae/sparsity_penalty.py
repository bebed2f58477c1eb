"""The sparsity term of encoders without a budget, and the controller that steers it to a wanted l0."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .encoder import require_argument

# Per batch the weight is multiplied by (l0 / target) ** GAIN, the ratio bounded by LIMIT: at most a factor of 3 in 100
# batches. Unbounded, the first batches, with half of all latents on, drove the weight so high that the l0 fell to a quarter
# of the target and stayed there.
GAIN = 0.015
LIMIT = 2.0


class SparsityPenalty(nn.Module):
    """``weight x factor x measure``. With ``target_l0`` the factor is steered, in training, until the l0 meets it.

    Without a target the factor stays 1 and the l0 is what the weight makes it.
    """

    factor: Float[Tensor, ""]

    def __init__(self, target_l0: int | float | None):
        super().__init__()
        if target_l0 is not None:
            require_argument("target_l0", target_l0, 1, fix="It is the wanted mean number of latents per token.")
        self.register_buffer("factor", torch.ones(()))

    def forward(
        self, measure: Float[Tensor, ""], weight: int | float, l0: Float[Tensor, ""], target_l0: int | float | None
    ) -> Float[Tensor, ""]:
        penalty = measure * (weight * self.factor.clone())
        if target_l0 is not None:
            self.factor.mul_((l0.detach() / target_l0).clamp(1 / LIMIT, LIMIT).pow(GAIN).to(self.factor))
        return penalty
