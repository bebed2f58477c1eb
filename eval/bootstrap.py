"""Bootstrap confidence intervals (Efron's percentile method) over documents, prompt pairs or texts.

Tokens of one document are not independent, so the resampling unit is the document. Each document is reduced to one row of sums
(about a hundred bytes); a resample adds up the rows it draws, and ratios and differences are computed from these totals.

``scipy.stats.bootstrap`` is not used: it gathers every sample by index, which takes about a thousand times the memory of
multiplying weights by a table of sums, and it draws other numbers from the same seed, which would change all published
intervals. For the latter reason there are also two ways of drawing: RESAMPLES by index for reports and circuits,
PROBE_RESAMPLES multinomial draws for probes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .undefined import Undefined

LEVEL = 0.95
RESAMPLES = 1000
PROBE_RESAMPLES = 500
SEED = 0
ONE_DOCUMENT = "an interval needs at least two documents, and there is one"
NO_DOCUMENTS = "activations were given: which documents they are of is not known"

# Total of each quantity, one entry per resample.
Totals = Mapping[str, np.ndarray]


class ByDocument:
    """Per-document sums of named quantities."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.rows: dict[int, np.ndarray] = {}

    def update(self, documents: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add values to their documents' sums; ``documents`` and every quantity have one entry per token."""
        if len(documents) == 0:
            return
        found, places = np.unique(documents, return_inverse=True)
        sums = np.stack([np.bincount(places, values[name], minlength=len(found)) for name in self.names], axis=1)
        for document, row in zip(found.tolist(), sums, strict=True):
            self.rows[document] = self.rows[document] + row if document in self.rows else row

    def scale(self, name: str, factor: float) -> None:
        """Multiply one quantity of every document by a factor."""
        place = self.names.index(name)
        for document, row in self.rows.items():
            self.rows[document] = np.where(np.arange(len(row)) == place, row * factor, row)

    def columns(self) -> dict[str, list[float]]:
        """Return each quantity's sums, ordered by document number; the numbers are listed under ``documents``."""
        numbers = sorted(self.rows)
        sums = {name: [float(self.rows[number][place]) for number in numbers] for place, name in enumerate(self.names)}
        return {"documents": [float(number) for number in numbers]} | sums

    def intervals(self, statistics: Mapping[str, Callable[[Totals], np.ndarray]]) -> dict[str, Any]:
        """Return ``NAME_low`` and ``NAME_high`` of every statistic, a function of the resampled totals."""
        ends = [f"{name}_{end}" for name in statistics for end in ("low", "high")]
        if len(self.rows) < 2:
            return dict.fromkeys(ends, Undefined(ONE_DOCUMENT if self.rows else NO_DOCUMENTS))
        # Sorted by document, so that the result does not depend on how the text was batched.
        table = np.stack([self.rows[document] for document in sorted(self.rows)])
        sums = np.stack([weights @ table for weights in resamples(len(table))])
        totals = dict(zip(self.names, sums.T, strict=True))
        found: dict[str, Any] = {}
        for name, statistic in statistics.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                values = statistic(totals)
            defined = bool(np.isfinite(values).all())
            low, high = percentiles(values) if defined else (None, None)
            why = Undefined("not defined on every resample of the documents")
            found |= {
                f"{name}_{end}": float(value) if value is not None else why for end, value in (("low", low), ("high", high))
            }
        return found


def resamples(n: int, seed: int = SEED) -> Iterator[np.ndarray]:
    """Yield, RESAMPLES times, how often each of ``n`` items is drawn when ``n`` are drawn with replacement."""
    rng = np.random.default_rng(seed)
    return (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES))


def percentiles(values: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the central ``level`` of the resampled values; resamples are the first axis."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low), np.asarray(high)


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(mean: float, resampled: Float[np.ndarray, " resamples"]) -> Interval:
    """Return the mean with the 95 % percentile interval of its resampled values."""
    # Not percentiles(): (1 - 0.95) / 2 exceeds 0.025 by 2e-17, which changes the last digit of some figures.
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def bootstrap_mean(values: np.ndarray, seed: int) -> Interval:
    """Return the mean of independent values with its interval."""
    return interval(float(values.mean()), _multinomial(len(values), seed) / len(values) @ values)


def bootstrap_f1(counts: Float[np.ndarray, "groups labels 3"], seed: int) -> Float[np.ndarray, "resamples labels"]:
    """Return each label's F1 over resampled groups (documents), from true positives, detections and positives per group."""
    groups, labels, _ = counts.shape
    weights = _multinomial(groups, seed).astype(np.float64)
    hits, detected, positives = np.moveaxis((weights @ counts.reshape(groups, -1)).reshape(-1, labels, 3), -1, 0)
    return 2 * hits / np.maximum(detected + positives, 1)


def _multinomial(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=PROBE_RESAMPLES)
