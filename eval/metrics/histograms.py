"""Streaming histograms: results do not depend on batch boundaries, memory does not grow with the stream."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Counts:
    """Histogram of non-negative integers, with exact quantiles equal to ``torch.quantile``."""

    def __init__(self) -> None:
        self.counts = torch.zeros(1, dtype=torch.long)

    def update(self, numbers: Int[Tensor, " tokens"]) -> None:
        more = torch.bincount(numbers.cpu(), minlength=len(self.counts))
        more[: len(self.counts)] += self.counts
        self.counts = more

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def mean(self) -> float:
        # An integer sum is exact.
        return int((self.counts * torch.arange(len(self.counts))).sum()) / self.total

    def quantiles(self, shares: list[float]) -> list[float]:
        """Return quantiles, linearly interpolated between neighboring ranks."""
        ranks = torch.tensor(shares, dtype=torch.float64) * (self.total - 1)
        below = ranks.floor()
        seen = self.counts.cumsum(0)
        low, high = (torch.searchsorted(seen, rank.long(), right=True).double() for rank in (below, ranks.ceil()))
        return torch.lerp(low, high, ranks - below).tolist()


class Quantiles:
    """Approximate quantiles of real numbers: within 1 % of their size, or ``floor / 100`` for numbers smaller than ``floor``.

    Numbers are counted in bins of equal width in asinh(number / floor): linear near zero, logarithmic beyond.
    """

    BIN = 0.01

    def __init__(self, floor: float, largest: float = 1e6):
        self.floor = floor
        self.half = math.ceil(math.asinh(largest / floor) / self.BIN)
        self.counts = torch.zeros(2 * self.half + 1, dtype=torch.long)

    def update(self, numbers: Float[Tensor, " tokens"]) -> None:
        """Add numbers, ignoring NaN."""
        numbers = numbers[~numbers.isnan()].double().cpu()
        bins = (numbers / self.floor).asinh().div(self.BIN).round().clamp(-self.half, self.half).long()
        self.counts += torch.bincount(bins + self.half, minlength=len(self.counts))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantiles(self, shares: list[float]) -> list[float]:
        """Return the center of the bin that holds each quantile, or NaN if there are no numbers."""
        if self.total == 0:
            return [math.nan] * len(shares)
        ranks = (torch.tensor(shares, dtype=torch.float64) * (self.total - 1)).round().long()
        bins = torch.searchsorted(self.counts.cumsum(0), ranks, right=True) - self.half
        return [self.floor * math.sinh(number * self.BIN) for number in bins.tolist()]
