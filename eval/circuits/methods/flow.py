"""Information flow routes: a sender is scored by how much closer it brings a receiver's input to its actual value.

One forward pass on clean prompts; no gradient, metric or corrupted prompt. Queries, keys and values of all heads of a layer
read the same stream, so edges from one sender to them score alike. Source: Ferrando and Voita 2024, arXiv:2403.00824, with
attention as one step from stream to stream, as in Mueller et al. 2025, arXiv:2504.13151.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..tasks.pairs import BATCH, PromptPairs
from ..units.edges import EdgeSpace
from ..units.space import Space
from .method import Method, UnitScores, score_batches


class FlowRoutes(Method):
    """Share of each sender in every receiver's input, summing to 1, averaged over positions. Supports edges only."""

    def __init__(self, batch: int = BATCH):
        self.batch = batch

    @torch.no_grad()
    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        if not isinstance(space, EdgeSpace):
            raise ValueError(f"flow: expected edges, got a {type(space).__name__}. Use an EdgeSpace, or another method.")
        return score_batches(space, pairs, self.batch, lambda some: self._shares(space, some))

    def _shares(self, space: EdgeSpace, pairs: PromptPairs) -> Float[Tensor, "pairs edges"]:
        _, seen = space.passes.see(pairs.clean, space.hooks)
        writes = space.writes(space.state(seen))
        valid = pairs.valid.to(writes)
        found = []
        for stage, stream in zip(space.edges.stages, space.streams(seen), strict=True):
            closer = proximity(writes[:, :, : stage.n_senders], stream)
            # Avoids 0 / 0 if no sender comes closer.
            share = closer / closer.sum(-1, keepdim=True).clamp_min(torch.finfo(closer.dtype).tiny)
            mean = (share * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
            found.append(mean.repeat(1, stage.n_receivers))
        return torch.cat(found, dim=1)


def proximity(
    writes: Float[Tensor, "pairs positions senders d_model"], stream: Float[Tensor, "pairs positions d_model"]
) -> Float[Tensor, "pairs positions senders"]:
    """Return by how much subtracting each sender's output reduces the L1 norm of the stream, at least 0."""
    # One sender at a time: the difference of all at once would be as large as all their outputs.
    rests = [(stream - written).abs().sum(-1) for written in writes.unbind(2)]
    return (stream.abs().sum(-1)[..., None] - torch.stack(rests, dim=-1)).clamp_min(0.0)
