"""Multi-TopK: TopK that is also trained to reconstruct with four times as many latents."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, of_all_shards, require_argument, require_k, scorer, with_gradient
from ..ranks import largest_of_shards
from ..sparse_code import AuxTerms, SparseCode, Wider
from ..tiled_scores import largest_per_token

# Latents of the second reconstruction, as a multiple of k: 4 in Gao et al. 2024.
MULTIPLE = 4


class MultiTopK(Encoder):
    """TopK whose loss also has ``weight`` times the error of the reconstruction from the ``4 k`` largest pre-activations.

    A TopK dictionary is fitted to its k: with more latents than in training, errors hardly fall, or rise. With the second term
    they go on falling, so k can be raised after training, at some cost in the error at k. Both codes are from one product. In
    eval mode it is ``topk``. Source: Gao et al. 2024, arXiv:2406.04093, appendix on Multi-TopK.

    Args:
        k: Active latents per token.
        weight: Weight of the error at 4 k, beside 1 for the error at k.
    """

    def __init__(self, k: int, weight: int | float = 1 / 8):
        super().__init__()
        require_argument("k", k, 1, fix="Set how many latents fire per token.")
        require_argument("weight", weight, 0.0, fix="0 is topk.")
        self.k, self.weight = k, weight

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        n_latents, shards, k = len(weights.W_enc), weights.shards, self.k
        scores = scorer(x, weights).tiles()
        if not self.training or not self.weight:
            found = of_all_shards(largest_per_token(scores, min(k, n_latents)), k, shards)
            return with_gradient(found, x, weights).relu()
        here = largest_per_token(scores, min(MULTIPLE * k, n_latents))
        wide = with_gradient(of_all_shards(here, MULTIPLE * k, shards), x, weights).relu()
        values = here.values.view(len(x), min(MULTIPLE * k, n_latents))
        own, places = values.topk(min(k, values.shape[1]), dim=1, sorted=False)
        kept = largest_of_shards(own, k, shards) if shards.size > 1 else own == own
        among = torch.zeros_like(values, dtype=torch.bool).scatter(1, places, kept).view(-1)
        if shards.size > 1:
            among = among[largest_of_shards(values, MULTIPLE * k, shards).view(-1)]
        code = wide.where(among)
        return SparseCode(code.latents, code.values, code.starts, AuxTerms(wider=Wider(self.weight, wide)))

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)
