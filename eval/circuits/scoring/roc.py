"""Scores of units against a known circuit: areas under curves, and what the highest scores get right."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor


def roc_auc(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> float:
    """Chance that a unit of the circuit has a higher score than one outside it; a tie counts half.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is not a number.
    """
    return float(roc_auc_score(truth.cpu().numpy(), _finite(scores, truth).numpy()))


def average_precision(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> float:
    """Mean precision at the score of each unit of the circuit, over all units that score at least as much.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is not a number.
    """
    return float(average_precision_score(truth.cpu().numpy(), _finite(scores, truth).numpy()))


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
    scores = _finite(scores, truth)
    size = int(truth.sum())
    last = scores.sort(descending=True).values[size - 1]
    above, level = scores > last, scores == last
    # The places left over go to units that tie for them.
    share = (size - int(above.sum())) / int(level.sum())
    right = float(truth[above].sum()) + share * float(truth[level].sum())
    return AtTrueSize(right / size, size / len(truth))


def _finite(scores: Tensor, truth: Tensor) -> Tensor:
    """The scores in float64; infinite ones, which scikit-learn refuses, are made very large.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is not a number.
    """
    inside = int(truth.sum())
    if not 0 < inside < len(truth):
        raise ValueError(f"truth: expected units in the circuit and others, got {inside} in it of {len(truth)}.")
    if scores.isnan().any():
        raise ValueError(f"scores: expected numbers, got {int(scores.isnan().sum())} of {len(scores)} that are none.")
    return scores.double().cpu().clamp(-1e300, 1e300)
