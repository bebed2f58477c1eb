"""GroupMax: one latent per group. For loaded dictionaries, not for training."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, require_argument, require_k, scorer, with_gradient
from ..sparse_code import SparseCode
from ..tiled_scores import Scorer


class GroupMax(Encoder):
    """Encoder that keeps the largest pre-activation of each of ``k`` groups of latents, then drops the negative ones.

    Groups are consecutive and of equal width. Source: the ``groupmax`` activation of EleutherAI's sparsify.
    """

    def __init__(self, k: int):
        super().__init__()
        require_argument("k", k, 1, fix="Set the number of groups.")
        self.k = k

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        return with_gradient(self.largest_of_groups(scorer(x, weights)), x, weights).relu()

    @torch.no_grad()
    def largest_of_groups(self, scores: Scorer) -> SparseCode:
        """Return every group's largest score on every token."""
        tokens, n_latents = scores.shape
        width = n_latents // self.k
        values, latents = [], []
        # Chunks of tokens with as many scores as a tile; tiles themselves do not align with groups.
        for some in torch.arange(tokens, device=scores.x.device).split(max(1, (1 << 22) // n_latents)):
            every = torch.nn.functional.linear(scores.x[some], scores.W, scores.b)
            best = every.view(len(some), self.k, width).max(dim=-1)
            values.append(best.values)
            latents.append(best.indices + width * torch.arange(self.k, device=some.device))
        if not tokens:
            return SparseCode.from_rows(scores.x.new_empty(0, self.k, dtype=torch.long), scores.x.new_empty(0, self.k))
        return SparseCode.from_rows(torch.cat(latents), torch.cat(values))

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)
        if n_latents % self.k:
            raise ValueError(f"dictionary.encoder.k: expected a divisor of n_latents = {n_latents}, got {self.k}.")
