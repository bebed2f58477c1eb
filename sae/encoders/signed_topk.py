"""Signed TopK: a fixed number of latents per token, with negative values allowed."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, of_all_shards, require_argument, require_k, scorer, with_gradient
from ..sparse_code import SparseCode
from ..tiled_scores import Tile, largest_per_token, pick


class SignedTopK(Encoder):
    """Encoder that keeps the k largest pre-activations of every token, with their signs.

    ``by: value`` ranks by value, which is ``topk`` without the ReLU, as in circuit-tracer's transcoders. ``by: size`` ranks by
    absolute value, so that a latent represents a direction and its opposite: AbsTopK, arXiv:2510.00404. AuxK revives dead
    latents by their positive side.

    Args:
        k: Active latents per token.
        by: Rank of the pre-activations: value, or absolute value.
    """

    signed = True

    def __init__(self, k: int, by: Literal["value", "size"] = "value"):
        super().__init__()
        require_argument("k", k, 1, fix="Set how many latents fire per token.")
        self.k, self.by = k, by

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        scores, k = scorer(x, weights), min(self.k, len(weights.W_enc))
        tiles = scores.tiles() if self.by == "value" else _sizes(scores.tiles())
        found = of_all_shards(largest_per_token(tiles, k), self.k, weights.shards)
        if self.by == "value":
            return with_gradient(found, x, weights)
        return with_gradient(SparseCode(found.latents, pick(scores, found), found.starts), x, weights)

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)


@torch.no_grad()
def _sizes(tiles: Iterable[Tile]) -> Iterator[Tile]:
    """Yield the tiles with absolute scores, computed in place."""
    for tile in tiles:
        tile.scores.abs_()
        yield tile
