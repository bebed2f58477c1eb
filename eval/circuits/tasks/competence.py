"""Competence of a model on a task, checked before discovery: ratios of metrics are meaningless if it cannot do the task."""

import logging
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ....training.activations.model import LanguageModel
from .pairs import PromptPairs

logger = logging.getLogger(__name__)

# The 97.5th percentile of the standard normal, for 95% intervals.
Z = 1.959964
# Means of fewer standard errors than this count as noise.
NOISE = 2.0


@dataclass(frozen=True)
class Competence:
    """Accuracy of a model on a task, and the change of the metric under the corruption.

    ``accuracy`` is the share of questions whose best answer beats the best foil on the clean prompt, averaged over pairs, and
    ``interval`` its 95% Wilson interval; ``chance`` is the accuracy of uninformative logits. ``difference`` is the metric on
    clean minus corrupted prompts: the denominator of every normalized faithfulness. ``..._error`` are standard errors of means.
    """

    task: str
    corruption: str
    metric: str
    pairs: int
    accuracy: float
    interval: tuple[float, float]
    chance: float
    clean: float
    clean_error: float
    corrupted: float
    corrupted_error: float
    difference: float
    difference_error: float

    @property
    def at_chance(self) -> bool:
        """Return True if the interval covers chance, or lies below it."""
        return self.interval[0] <= self.chance

    @property
    def noise(self) -> bool:
        """Return True if the difference is within two standard errors of zero."""
        return abs(self.difference) <= NOISE * self.difference_error

    def require_signal(self) -> None:
        """Raise ``ValueError`` if the difference, which faithfulness divides by, is within noise."""
        if self.noise:
            raise ValueError(
                f"{self.task}: expected {self.metric} to differ between clean prompts and {self.corruption}, because "
                f"faithfulness divides by it; got {self}, equal within noise. Choose another corruption, more pairs "
                "or a task that the model performs."
            )

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.task}, {self.corruption}: accuracy {self.accuracy:.3f} ({low:.3f} to {high:.3f}, chance "
            f"{self.chance:.3f}), {self.metric} {self.clean:.3f} clean and {self.corrupted:.3f} corrupted, a "
            f"difference of {self.difference:.3f} ± {self.difference_error:.3f}, {self.pairs} pairs"
        )


@torch.no_grad()
def competence(model: LanguageModel, pairs: PromptPairs, batch_size: int = 32) -> Competence:
    """Measure competence on all prompts, clean and corrupted."""
    clean, corrupted, right = [], [], []
    for batch in pairs.batches(batch_size):
        logits = model.logits(batch.clean.to(model.device))
        clean.append(batch.measure(logits))
        right.append(batch.right(logits))
        corrupted.append(batch.measure(model.logits(batch.corrupted.to(model.device))))
    accuracy = float(torch.cat(right).double().mean())
    metric, other = torch.cat(clean).double(), torch.cat(corrupted).double()
    return Competence(
        pairs.task,
        pairs.corruption,
        pairs.metric,
        len(pairs),
        accuracy,
        wilson(accuracy, len(pairs)),
        _chance(pairs),
        *_mean_and_error(metric),
        *_mean_and_error(other),
        *_mean_and_error(metric - other),
    )


def require_solved(found: Competence) -> None:
    """Log a warning if the model is at chance; raise if the metric's difference is within noise.

    Raises:
        ValueError: If the difference, which faithfulness divides by, is within noise.
    """
    if found.at_chance:
        logger.warning("the model does not do this task, so that a circuit of it explains little: %s", found)
    found.require_signal()


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a share of ``n``; it is wide rather than narrow for shares averaged over pairs.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean_and_error(values: Float[Tensor, " pairs"]) -> tuple[float, float]:
    """Return the mean and its standard error, which is infinite for a single pair."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), error


def _chance(pairs: PromptPairs) -> float:
    """Return the accuracy if all answers and foils were equally likely, averaged like accuracy."""
    shares = [[len(q.answers) / (len(q.answers) + len(q.foils)) for q in questions] for questions in pairs.questions]
    return sum(sum(one) / len(one) for one in shares) / len(shares)
