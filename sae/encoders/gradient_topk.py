"""Gradient TopK: latents are selected by their effect on the model's loss as well as by their activation."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, castable, of_all_shards, require_argument, require_k, scorer, with_gradient
from ..sparse_code import SparseCode
from ..tiled_scores import Scorer, Tile, largest_per_token, pick


class GradientTopK(Encoder):
    """Encoder that keeps the k latents with the largest ``a (1 + beta |g . d|)`` of every token, with values ``a``.

    ``a`` is the rectified pre-activation, ``d`` the decoder direction, and ``g`` the gradient of the model's loss at the hook,
    so ``a |g . d|`` is the first-order effect of ablating the latent. ``normalize: token`` gives ``g`` unit norm on every
    token, which makes ``beta`` independent of the scale of the loss. With a unit-norm decoder ``|g . d|`` is about ``1 /
    sqrt(d)`` for an unrelated direction, so beta matters from about ``sqrt(d)``: on the embedded model (d 128) beta 3, 11, and
    30 change 10, 18, and 25 per cent of the latents that TopK would select. Training treats score and gradient as constants.

    Without a gradient the encoder is plain TopK, which is how it is used and evaluated after training. If a gradient is passed
    in eval mode, selection uses it ("oracle"): such metrics see the very loss they measure. Source: Olmo et al. 2024,
    arXiv:2411.10397; the form of the score follows the paper's description, the normalization is specific to sparsary.

    Args:
        k: Active latents per token.
        beta: Weight of the gradient in the score; 0 is plain TopK. A recipe may schedule it.
        normalize: Scale of the gradient: unit norm per token, or as it is.
    """

    needs_gradient = True

    def __init__(self, k: int, beta: int | float, normalize: Literal["token", "none"] = "token"):
        super().__init__()
        require_argument("k", k, 1, fix="Set how many latents fire per token.")
        require_argument("beta", beta, 0.0, fix="0 is plain TopK.")
        self.k, self.beta, self.normalize = k, beta, normalize

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        if grad is None and self.training:
            raise ValueError(
                "grad: expected the gradients of the activations, which gradient_topk trains on, got none. Set "
                "harvest.gradients: true and harvest again: sparsary harvest RECIPE"
            )
        pre_acts, k = scorer(x, weights), min(self.k, len(weights.W_enc))
        if grad is None or self.beta == 0:
            code = of_all_shards(largest_per_token(pre_acts.tiles(), k), self.k, weights.shards)
        else:
            chosen = of_all_shards(largest_per_token(self.tiles(pre_acts, weights, grad), k), self.k, weights.shards)
            # Scores that are NaN select arbitrary latents, so their values become NaN rather than pass for a selection.
            values = pick(pre_acts, chosen).masked_fill(chosen.values.isnan(), torch.nan)
            code = SparseCode(chosen.latents, values, chosen.starts)
        return with_gradient(code, x, weights).relu()

    @torch.no_grad()
    def tiles(self, pre_acts: Scorer, weights: Weights, grad: Float[Tensor, "tokens d_out"]) -> Iterator[Tile]:
        """Yield tiles of the selection score, which overwrites the pre-activations."""
        if self.normalize == "token":
            grad = F.normalize(grad, dim=-1)
        influence = Scorer(*castable(grad.to(weights.W_dec.dtype), weights.W_dec, None), plan=pre_acts.tile_shape)
        for tile, effect in zip(pre_acts.tiles(), influence.tiles(), strict=True):
            # Negative pre-activations stay negative, so they never displace positive ones.
            tile.scores.addcmul_(tile.scores, effect.scores.abs_(), value=self.beta)
            yield tile

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)
