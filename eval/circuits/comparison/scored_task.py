"""A task scored in one model: unit scores of every pair, its circuits, and their faithfulness on other pairs."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...bootstrap import percentiles, resamples
from ..methods import Method
from ..scoring.faithfulness import (
    MEASURED_ON,
    SIZED_ON,
    Trials,
    curve,
    growing_sizes,
    ranked,
    smallest_size,
)
from ..tasks.pairs import PromptPairs
from ..units.ablation import ablation_values
from ..units.ranking import ordered
from ..units.space import Space

LEVEL = 0.8
PER_DECADE = 4
# Random divisions of the pairs into two halves.
SPLITS = 50
# Rows of scores that are ranked at a time.
ROWS = 100


@dataclass(frozen=True)
class PairFigure:
    """A figure with the 95 % bootstrap interval over pairs; all are NaN if it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class ScoredTask:
    """Scores of a task's units in one model.

    Circuits are the units of largest absolute score; units with a score of zero are in none, however large the circuit.
    Resamples and halves are of the pairs that the scores are from, faithfulness is measured on others.

    Args:
        name: Name of the task, with the model's where there are two.
        pairs_number: Number of the set of pairs: equal numbers mean equal prompts, which are resampled together.
        size: Number of units with faithfulness 0.8, or None.
        refused: Reason why there is no faithfulness, or empty.
    """

    name: str
    task: str
    model: str
    space: Space
    chosen_on: PromptPairs
    judged_on: PromptPairs
    per_pair: Float[np.ndarray, "pairs units"]
    trials: Trials
    size: int | None
    refused: str
    pairs_number: int
    _draws: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def values(self) -> Float[np.ndarray, " units"]:
        """Score of every unit."""
        return self.per_pair.mean(0)

    @property
    def scored(self) -> Bool[Tensor, " units"]:
        """Mask of units with a score other than zero."""
        return torch.from_numpy(self.values != 0)

    def circuit(self, size: int) -> Bool[Tensor, " units"]:
        """Return the mask of the circuit with ``size`` units."""
        return torch.from_numpy(members(self.values[None], size)[0])

    def resampled_scores(self) -> Float[np.ndarray, "resamples units"]:
        """Return the scores of resampled pairs; resamples of equal pairs are equal."""
        n = len(self.per_pair)
        return np.stack(list(resamples(n, self.pairs_number))) / n @ self.per_pair

    def resampled(self, size: int) -> Bool[np.ndarray, "resamples units"]:
        """Return the circuits of ``size`` units that resampled pairs give."""
        if size not in self._draws:
            self._draws[size] = np.packbits(members(self.resampled_scores(), size), axis=1)
        return np.unpackbits(self._draws[size], axis=1, count=self.space.size).astype(bool)

    def halves(self, size: int, seed: int = 0) -> Bool[np.ndarray, "halves splits units"]:
        """Return the circuits of ``size`` units of two halves of the pairs, for ``SPLITS`` random divisions."""
        first = half_weights(len(self.per_pair), seed + self.pairs_number)
        return np.stack([members(weights @ self.per_pair, size) for weights in (first, _others(first))])

    def faithfulness(self, kept: Bool[Tensor, " units"]) -> PairFigure:
        """Return the faithfulness of a circuit on the pairs that chose neither its units nor the sizes of circuits."""
        trials = self.trials
        kept_metric, full, empty = (x[MEASURED_ON] for x in (trials.metric(kept), trials.full, trials.empty))
        return mean_ratio(kept_metric - empty, full - empty)

    def faithfulness_of(self, kept: Bool[Tensor, " units"]) -> float:
        """Return the same without an interval."""
        kept_metric, full, empty = (
            x[MEASURED_ON].mean() for x in (self.trials.metric(kept), self.trials.full, self.trials.empty)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return float((kept_metric - empty) / (full - empty))


def score_task(
    name: str,
    model: str,
    space: Space,
    chosen_on: PromptPairs,
    judged_on: PromptPairs,
    method: Method,
    ablation: str = "resample",
    seed: int = 0,
    pairs_number: int = 0,
) -> ScoredTask:
    """Score the units on ``chosen_on``, and find the number of units that reach faithfulness 0.8 on half of ``judged_on``.

    Raises:
        ValueError: If the method cannot score this space, or does not score pair by pair.
    """
    scores = method.discover(space, chosen_on)
    if scores.per_pair is None:
        raise ValueError(
            f"--method: expected a method that scores every pair, for intervals over pairs, got {type(method).__name__}. "
            "Use attribution, relevance, exact, or integrated_inputs."
        )
    trials = Trials(space, judged_on, ablation_values(space, ablation, chosen_on, seed))
    order = ranked(scores, "absolute")
    along = curve(trials, order, growing_sizes(space.size, PER_DECADE), complements=())
    size, refused = None, ""
    try:
        along.require_signal()
        size = smallest_size(trials, order, LEVEL, along, SIZED_ON)
    except ValueError as error:
        refused = str(error)
    per_pair = scores.per_pair.double().cpu().numpy()
    return ScoredTask(name, chosen_on.task, model, space, chosen_on, judged_on, per_pair, trials, size, refused, pairs_number)


def members(values: Float[np.ndarray, "rows units"], size: int) -> Bool[np.ndarray, "rows units"]:
    """Return masks of the ``size`` largest absolute scores of every row, without those that are zero."""
    found = np.zeros(values.shape, dtype=bool)
    for start in range(0, len(values), ROWS):
        some = torch.from_numpy(values[start : start + ROWS])
        chosen = ordered(some, "absolute")[:, :size].numpy()
        np.put_along_axis(found[start : start + ROWS], chosen, values=True, axis=1)
    return found & (values != 0)


def half_weights(n: int, seed: int) -> Float[np.ndarray, "splits pairs"]:
    """Return the weights of one half of ``n`` items for ``SPLITS`` random divisions; the other half has the others."""
    rng = np.random.default_rng(seed)
    chosen = rng.permuted(np.tile(np.arange(n), (SPLITS, 1)), axis=1) < n // 2
    return chosen / chosen.sum(1, keepdims=True)


def _others(weights: Float[np.ndarray, "splits pairs"]) -> Float[np.ndarray, "splits pairs"]:
    rest = weights == 0
    return rest / rest.sum(1, keepdims=True)


def half_distance(effects: Float[np.ndarray, "pairs units"], seed: int) -> float:
    """Return the largest change of any unit's absolute mean effect between two halves of the pairs, mean over divisions.

    Half of the pairs is noisier than all: a difference of two means over all pairs that exceeds it is not of the pairs.
    """
    first = half_weights(len(effects), seed)
    apart = np.abs(np.abs(first @ effects) - np.abs(_others(first) @ effects))
    return float(apart.max(1).mean())


def mean_ratio(above: Float[np.ndarray, " pairs"], below: Float[np.ndarray, " pairs"], seed: int = 0) -> PairFigure:
    """Return the ratio of two means over pairs with its interval; NaN if it is not defined."""
    weights = np.stack(list(resamples(len(above), seed)))
    with np.errstate(divide="ignore", invalid="ignore"):
        value, drawn = above.mean() / below.mean(), (weights @ above) / (weights @ below)
    if not np.isfinite(value) or not np.isfinite(drawn).all():
        return PairFigure(float(value) if np.isfinite(value) else np.nan, np.nan, np.nan)
    low, high = percentiles(drawn)
    return PairFigure(float(value), float(low), float(high))


def mean(values: Float[np.ndarray, " pairs"], seed: int = 0) -> PairFigure:
    """Return the mean over pairs with its interval."""
    return mean_ratio(values, np.ones_like(values), seed)
