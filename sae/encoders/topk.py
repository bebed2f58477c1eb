"""TopK: a fixed number of latents per token."""

from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, full_scorer, of_all_shards, require_argument, require_k, scorer, with_gradient
from ..sparse_code import SparseCode
from ..tiled_scores import largest_per_token


class TopK(Encoder):
    """Encoder that keeps the k largest pre-activations of every token, then drops the negative ones.

    Only kept entries get gradients. A token with fewer than ``k`` positive pre-activations has fewer than ``k`` active latents.
    Source: Gao et al. 2024, arXiv:2406.04093.

    Args:
        k: Active latents per token.
    """

    can_screen = True

    def __init__(self, k: int):
        super().__init__()
        require_argument("k", k, 1, fix="Set how many latents fire per token.")
        self.k = k

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        if weights.screen is None:
            found = largest_per_token(scorer(x, weights).tiles(), min(self.k, len(weights.W_enc)))
        else:
            found = weights.screen.largest_per_token(full_scorer(x, weights), min(self.k, len(weights.W_enc)))
        return with_gradient(of_all_shards(found, self.k, weights.shards), x, weights).relu()

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)
