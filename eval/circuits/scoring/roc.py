"""Scores of units against a known circuit: areas under curves, and what the highest scores get right."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def roc_auc(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> float:
    """Chance that a unit of the circuit has a higher score than one outside it; a tie counts half.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is not a number.
    """
    _check(scores, truth)
    _, group, counts = scores.double().unique(return_inverse=True, return_counts=True)
    # Units below, and half of those level with it.
    below = counts.cumsum(0) - (counts.double() - 1) / 2
    inside = int(truth.sum())
    outside = len(truth) - inside
    return float((below[group][truth].sum() - inside * (inside + 1) / 2) / (inside * outside))


def average_precision(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> float:
    """Mean precision at the score of each unit of the circuit, over all units that score at least as much.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is not a number.
    """
    _check(scores, truth)
    _, group, counts = scores.double().unique(return_inverse=True, return_counts=True)
    hits = torch.zeros(len(counts), dtype=torch.float64).index_add(0, group[truth], torch.ones(int(truth.sum())).double())
    # From a score upwards.
    chosen, right = (values.flip(0).cumsum(0).flip(0) for values in (counts.double(), hits))
    return float((right / chosen)[group][truth].mean())


@dataclass(frozen=True)
class AtTrueSize:
    """The highest scores, as many as the circuit has units. Precision is recall then; ``floor`` is that of chance."""

    precision: float
    floor: float


def at_true_size(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> AtTrueSize:
    """Precision (and recall) of the highest scores, in expectation over the order of units that tie.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is not a number.
    """
    _check(scores, truth)
    size = int(truth.sum())
    last = scores.sort(descending=True).values[size - 1]
    above, level = scores > last, scores == last
    # The places left over go to units that tie for them.
    share = (size - int(above.sum())) / int(level.sum())
    right = float(truth[above].sum()) + share * float(truth[level].sum())
    return AtTrueSize(right / size, size / len(truth))


def _check(scores: Tensor, truth: Tensor) -> None:
    inside = int(truth.sum())
    if not 0 < inside < len(truth):
        raise ValueError(f"truth: expected units in the circuit and others, got {inside} in it of {len(truth)}.")
    if scores.isnan().any():
        raise ValueError(f"scores: expected numbers, got {int(scores.isnan().sum())} of {len(scores)} that are none.")
