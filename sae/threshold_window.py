"""Tiles of large matrices of scores, passes over them in kept memory, and the window around learned thresholds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kept_memory import kept_memory

# Numbers of a tile: half of a last-level cache in float32.
TILE_NUMBERS = 1 << 22
# Products with fewer latents at a time read the inputs too often.
LEAST_WIDTH = 256


def columns_of(scores: Float[Tensor, "tokens n_latents"]) -> Iterator[slice]:
    """Yield the columns of every tile."""
    tokens, n_latents = scores.shape
    width = max(LEAST_WIDTH, TILE_NUMBERS // max(tokens, 1))
    for first in range(0, n_latents, width):
        yield slice(first, min(first + width, n_latents))


@torch.no_grad()
def count_above(
    scores: Float[Tensor, "tokens n_latents"], cut: float | Float[Tensor, " n_latents"]
) -> Float[Tensor, " n_latents"]:
    """Return each latent's number of scores above its cut; exact below 16 million tokens."""
    counts = scores.new_empty(scores.shape[1])
    for some in columns_of(scores):
        # As numbers: sums of truth values are several times slower.
        room = kept_memory.take(len(scores), some.stop - some.start, scores)
        limit = cut[some] if isinstance(cut, Tensor) else torch.tensor(cut, dtype=scores.dtype, device=scores.device)
        counts[some] = torch.gt(scores[:, some], limit, out=room).sum(0)
    return counts


@dataclass(frozen=True)
class Window:
    """Pre-activations near their thresholds ``theta``, which train the thresholds.

    ``near`` is True where a pre-activation is less than half of ``bandwidth`` from its threshold, ``counts`` their number per
    latent. A rectangle of that width replaces the derivative of the jump.
    """

    theta: Float[Tensor, " n_latents"]
    near: Bool[Tensor, "tokens n_latents"]
    counts: Float[Tensor, " n_latents"]
    bandwidth: float

    def sums(self, gradient: Float[Tensor, "tokens width"], some: slice) -> Float[Tensor, " width"]:
        """Return per latent the sum of a gradient over the tokens in the window, for some columns."""
        room = kept_memory.take(len(gradient), gradient.shape[1], gradient)
        return torch.mul(gradient, self.near[:, some], out=room).sum(0)

    def to_theta(self, value_sums: Tensor | None, to_fired: Tensor | None) -> Tensor:
        """Return the gradient of ``theta`` from windowed sums of value gradients, and from gradients of firing counts."""
        total = torch.zeros_like(self.theta) if value_sums is None else self.theta.detach() * value_sums
        return (total if to_fired is None else total + to_fired * self.counts) / -self.bandwidth

    def fired(self, counts: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return firing counts, per latent or in total, made differentiable in ``theta``."""
        return _Fired.apply(self.theta, counts, self)  # pyright: ignore[reportReturnType]


class _Fired(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, counts: Tensor, window: Window) -> Tensor:
        ctx.window = window
        return counts.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.window.to_theta(None, grads[0]), None, None


@torch.no_grad()
def window(scores: Float[Tensor, "tokens n_latents"], theta: Float[Tensor, " n_latents"], bandwidth: float) -> Window:
    """Return the window of pre-activations around thresholds."""
    near, cuts = kept_memory.take(scores.shape[0], scores.shape[1], scores, torch.bool), theta.detach()
    counts = torch.empty_like(cuts)
    for some in columns_of(scores):
        room = kept_memory.take(len(scores), some.stop - some.start, scores)
        torch.lt(torch.sub(scores[:, some], cuts[some], out=room).abs_(), bandwidth / 2, out=near[:, some])
        counts[some] = room.copy_(near[:, some]).sum(0)
    return Window(theta, near, counts, bandwidth)
