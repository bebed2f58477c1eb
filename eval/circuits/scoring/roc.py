"""Unit scores against a known circuit: areas under the ROC and precision-recall curves, and precision at the true size."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor


def roc_auc(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> float:
    """Return the probability that a unit of the circuit outscores one outside it; ties count half.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is NaN.
    """
    return float(roc_auc_score(truth.cpu().numpy(), _finite(scores, truth).numpy()))


def average_precision(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> float:
    """Return average precision: the mean, over circuit units, of precision among units that score at least as much.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is NaN.
    """
    return float(average_precision_score(truth.cpu().numpy(), _finite(scores, truth).numpy()))


@dataclass(frozen=True)
class AtTrueSize:
    """Precision of the highest scores, as many as the circuit has units (so equal to recall); ``floor`` is chance."""

    precision: float
    floor: float


def at_true_size(scores: Float[Tensor, " units"], truth: Bool[Tensor, " units"]) -> AtTrueSize:
    """Return the precision (and recall) of the highest scores, in expectation over the order of ties.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is NaN.
    """
    scores = _finite(scores, truth)
    size = int(truth.sum())
    last = scores.sort(descending=True).values[size - 1]
    above, level = scores > last, scores == last
    # Tied units share the remaining places.
    share = (size - int(above.sum())) / int(level.sum())
    right = float(truth[above].sum()) + share * float(truth[level].sum())
    return AtTrueSize(right / size, size / len(truth))


def _finite(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the scores in float64 with infinite ones clamped, because scikit-learn rejects them.

    Raises:
        ValueError: If all units are in the circuit, or none, or a score is NaN.
    """
    inside = int(truth.sum())
    if not 0 < inside < len(truth):
        raise ValueError(f"truth: expected units in the circuit and others, got {inside} in it of {len(truth)}.")
    if scores.isnan().any():
        raise ValueError(f"scores: expected numbers, got NaN in {int(scores.isnan().sum())} of {len(scores)}.")
    return scores.double().cpu().clamp(-1e300, 1e300)
