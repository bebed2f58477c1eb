"""Rows of one sequence that ranks hold consecutive parts of, sent to the ranks that want them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.ranks import Ranks


@dataclass(frozen=True)
class Routes:
    """Rows that a rank sends to each rank, and the places of the rows that it receives.

    Args:
        counts: ``counts[i][j]`` rows go from rank ``i`` to rank ``j``.
        sent: Rows among this rank's own, by the rank that receives them.
        places: Place of every row that is received, by the rank that sends it.
    """

    ranks: Ranks
    counts: list[list[int]]
    sent: Int[Tensor, " some"]
    places: Int[Tensor, " wanted"]

    def __call__(self, own: Float[Tensor, "rows width"]) -> Float[Tensor, "wanted width"]:
        """Return the rows that this rank wants, in the order that it wants them in; gradients flow back to where they are held.

        All ranks call this together, and so the backward pass.
        """
        return _Sent.apply(own, self)  # pyright: ignore[reportReturnType]

    def take(self, own: Sequence[Float[Tensor, "rows _"]], device: torch.device) -> list[Float[Tensor, "wanted _"]]:
        """Return the rows that this rank wants of several tensors, in one message; gradients do not flow back.

        Args:
            device: Device from which the rows are sent, and on which they arrive.
        """
        sent = torch.cat([each.detach().index_select(0, self.sent.to(each.device)) for each in own], dim=1).to(device)
        received = self.ranks.exchange(sent, self.counts)
        ordered = torch.empty_like(received).index_copy_(0, self.places.to(device), received)
        return list(ordered.split([each.shape[1] for each in own], dim=1))


def routes(ranks: Ranks, held: Sequence[int], wanted: Sequence[Int[np.ndarray, " _"]]) -> Routes:
    """Return the routes of rows that ranks hold one after another, ``held[i]`` at rank ``i``, to ranks that want ``wanted[i]``.

    Args:
        wanted: Numbers of rows, each at most once for a rank.
    """
    ends = np.cumsum(held)
    # Rank by rank, which rank holds each wanted row; a stable sort keeps the order of what goes one way.
    holders = [np.searchsorted(ends, rows, side="right") for rows in wanted]
    counts = np.stack([np.bincount(each, minlength=ranks.size) for each in holders], axis=1)
    first = ends[ranks.rank] - held[ranks.rank]
    sent = [rows[each == ranks.rank] - first for rows, each in zip(wanted, holders, strict=True)]
    places = np.argsort(holders[ranks.rank], kind="stable")
    return Routes(ranks, counts.tolist(), torch.from_numpy(np.concatenate(sent)), torch.from_numpy(places))


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, routes: Routes) -> Tensor:
        ctx.routes, ctx.rows = routes, len(own)
        return routes.take([own], own.device)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        routes, (grad,) = ctx.routes, grads
        back = [list(row) for row in zip(*routes.counts, strict=True)]
        returned = routes.ranks.exchange(grad.index_select(0, routes.places.to(grad.device)), back)
        own = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return own.index_add_(0, routes.sent.to(grad.device), returned), None
