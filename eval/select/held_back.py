"""Scores of a pool, and how well each way of ranking finds examples that its prototype does not know.

The examples are split in two folds. The prototype of one fold ranks the pool and the examples of the other: an example is found
if it ranks within the share of the pool that is kept. So the methods can be compared where nothing else is known of the pool.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bootstrap import LEVEL
from .pooled import PooledDocuments
from .similarity import PoolStatistics, similarities

RESAMPLES = 1000
FOLDS = 2


@dataclass
class Reference:
    """Similarities to all examples, and to each fold of them, with the scores of the examples held back."""

    examples: PooledDocuments
    statistics: PoolStatistics
    seed: int
    folds: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        order = np.random.default_rng(self.seed).permutation(len(self.examples))
        self.folds = [np.sort(order[fold::FOLDS]) for fold in range(FOLDS)] if len(order) >= FOLDS else []
        self.whole = similarities(self.examples, self.statistics)
        self.by_fold = [similarities(self.examples.rows(rows), self.statistics) for rows in self.folds]
        self.own = {name: score(self.examples).tolist() for name, score in self.whole.items()}

    def held_back(self, name: str, fold: int) -> np.ndarray:
        """Return the scores that the prototype of a fold gives to the examples of the other."""
        others = np.setdiff1d(np.arange(len(self.examples)), self.folds[fold])
        return self.by_fold[fold][name](self.examples.rows(others))


@dataclass(frozen=True)
class ScoredPool:
    """Scores of documents by method: similarity to all examples, and to each fold of them, ``(folds, documents)``."""

    scores: dict[str, np.ndarray]
    fold_scores: dict[str, np.ndarray]
    digests: np.ndarray
    places: np.ndarray

    def rows(self, chosen: np.ndarray) -> "ScoredPool":
        """Return some of the documents."""
        return ScoredPool(
            {name: scores[chosen] for name, scores in self.scores.items()},
            {name: scores[:, chosen] for name, scores in self.fold_scores.items()},
            self.digests[chosen],
            self.places[chosen],
        )


def score_pool(pool: Iterable[PooledDocuments], reference: Reference) -> ScoredPool:
    """Score all documents of a pool, a shard at a time."""
    scores: dict[str, list[np.ndarray]] = {name: [] for name in reference.whole}
    folds: dict[str, list[np.ndarray]] = {name: [] for name in reference.whole}
    digests, places = [], []
    for part in pool:
        digests.append(part.digests)
        places.append(part.places)
        for name, score in reference.whole.items():
            scores[name].append(score(part))
            folds[name].append(np.array([by_fold[name](part) for by_fold in reference.by_fold]).reshape(-1, len(part)))
    return ScoredPool(
        {name: np.concatenate(parts) for name, parts in scores.items()},
        {name: np.concatenate(parts, axis=1) for name, parts in folds.items()},
        np.concatenate(digests),
        np.concatenate(places),
    )


def held_back(reference: Reference, name: str, fold_scores: np.ndarray, share: float) -> dict[str, Any]:
    """Return ``recovered``, the share of held-back examples within the first ``share`` of the pool, its interval, and AUROC.

    ``auroc`` is the probability that a held-back example scores above a document of the pool. Intervals are over examples.
    ``None`` with a single example.
    """
    if not reference.folds:
        return dict.fromkeys(("recovered", "recovered_low", "recovered_high", "auroc"))
    above = []
    for fold, scores in enumerate(fold_scores):
        ordered = np.sort(scores)
        own = reference.held_back(name, fold)
        # Ties count half.
        below = (np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right")) / 2
        above += (1 - below / len(ordered)).tolist()
    shares = np.array(above)
    found = shares <= share
    drawn = np.random.default_rng(reference.seed).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.quantile(found[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "recovered": float(found.mean()),
        "recovered_low": float(low),
        "recovered_high": float(high),
        "auroc": float(1 - shares.mean()),
    }
