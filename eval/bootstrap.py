"""Intervals by bootstrap over documents: tokens of one document are not independent, documents are.

What is kept is one row of sums per document, a hundred bytes or so. Sums of a resample are those of its documents, so
ratios of sums, and differences of them, are computed anew for each: Efron's percentile interval.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .undefined import Undefined

LEVEL = 0.95
RESAMPLES = 1000
SEED = 0
ONE_DOCUMENT = "an interval needs at least two documents, and there is one"
NO_DOCUMENTS = "activations were given: which documents they are of is not known"

# Sums by name, each with one entry per resample.
Totals = Mapping[str, np.ndarray]


class ByDocument:
    """Sums of named quantities for every document."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.rows: dict[int, np.ndarray] = {}

    def update(self, documents: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """``documents`` and every quantity have one entry per token."""
        if len(documents) == 0:
            return
        found, places = np.unique(documents, return_inverse=True)
        sums = np.stack([np.bincount(places, values[name], minlength=len(found)) for name in self.names], axis=1)
        for document, row in zip(found.tolist(), sums, strict=True):
            self.rows[document] = self.rows[document] + row if document in self.rows else row

    def intervals(self, statistics: Mapping[str, Callable[[Totals], np.ndarray]]) -> dict[str, Any]:
        """``NAME_low`` and ``NAME_high`` of every statistic, which is computed from the sums of each resample."""
        ends = [f"{name}_{end}" for name in statistics for end in ("low", "high")]
        if len(self.rows) < 2:
            return dict.fromkeys(ends, Undefined(ONE_DOCUMENT if self.rows else NO_DOCUMENTS))
        # In the order of documents: how the text was cut does not matter.
        table = np.stack([self.rows[document] for document in sorted(self.rows)])
        totals = dict(zip(self.names, _resampled(table).T, strict=True))
        found: dict[str, Any] = {}
        for name, statistic in statistics.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                values = statistic(totals)
            defined = bool(np.isfinite(values).all())
            low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if defined else (None, None)
            why = Undefined("not defined on every resample of the documents")
            found |= {
                f"{name}_{end}": float(value) if value is not None else why for end, value in (("low", low), ("high", high))
            }
        return found


def _resampled(table: np.ndarray) -> np.ndarray:
    """Sums over documents drawn with replacement, one row per resample."""
    rng, documents = np.random.default_rng(SEED), len(table)
    draws = (np.bincount(rng.integers(documents, size=documents), minlength=documents) for _ in range(RESAMPLES))
    return np.stack([weights @ table for weights in draws])
