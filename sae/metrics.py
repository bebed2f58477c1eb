"""Metrics of a dictionary on data, with definitions shared by training logs and evaluation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def fvu(y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    """Return the fraction of variance unexplained: 0 is perfect, 1 is no better than the mean of ``y``.

    Numerator and denominator are summed over all tokens before dividing; the mean of per-token ratios is a different metric.
    Source: the normalized MSE of Gao et al. 2024, arXiv:2406.04093.

    >>> y = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    >>> float(fvu(y, y)), float(fvu(y, y.mean(0).expand(2, 2)))
    (0.0, 1.0)

    Raises:
        ValueError: If all rows of ``y`` are equal, so that the variance is zero.
    """
    running = RunningFvu(y.shape[1], y.device)
    running.update(y, y_hat)
    return running.value()


class RunningFvu:
    """FVU accumulated over a stream of batches, in float64."""

    def __init__(self, d_out: int, device: torch.device | str = "cpu"):
        self.moments = Moments(d_out, device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"]) -> None:
        self.moments.update(y)
        self.error += (y.double() - y_hat.double()).pow(2).sum()

    def value(self) -> Float[Tensor, ""]:
        total = self.moments.squared_deviation()
        if not total > 0:
            raise ValueError("y: expected rows that differ, got zero variance. Give more than one distinct token.")
        return self.error / total


class Moments:
    """Count, mean, and summed squared deviation of a stream of rows, merged without cancellation (Chan et al. 1979)."""

    def __init__(self, d: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.deviation = torch.zeros(d, dtype=torch.float64, device=device)

    def update(self, rows: Float[Tensor, "tokens d"]) -> None:
        if rows.shape[0] == 0:
            return
        rows = rows.double()
        mean = rows.mean(0)
        self.merge(rows.shape[0], mean, (rows - mean).pow(2).sum(0))

    def merge(self, count: int, mean: Float[Tensor, " d"], deviation: Float[Tensor, " d"]) -> None:
        """Add the moments of ``count`` further rows."""
        total = self.count + count
        delta = mean - self.mean
        self.deviation += deviation + delta.pow(2) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def squared_deviation(self) -> Float[Tensor, ""]:
        """Return the sum over rows and dimensions of the squared distance from the mean."""
        return self.deviation.sum()

    def variance(self) -> float:
        """Return the mean squared distance of a row from the mean row, summed over dimensions."""
        return float(self.squared_deviation() / max(self.count, 1))


def density(firings: Int[Tensor, " n_latents"], tokens: int) -> Float[Tensor, " n_latents"]:
    """Return the fraction of tokens on which each latent fires."""
    return firings.double() / tokens


def dead_fraction(firings: Int[Tensor, " n_latents"]) -> float:
    """Return the fraction of latents that never fired in the window of the counts."""
    return float((firings == 0).double().mean())
