"""Faithfulness: the share of the model's task metric that a circuit recovers on its own, and how little is left without it.

``faithfulness = (m(circuit) - m(empty)) / (m(model) - m(empty))``: 1 is the model's own metric, 0 that of everything ablated.
``completeness`` is the faithfulness of the circuit's complement: near 0 if the circuit left out nothing that matters. Metrics
are averaged over pairs before dividing. CPR is the area under faithfulness over circuits of growing size, CMD the area between
faithfulness and 1.

Sources: Marks et al. 2024, arXiv:2403.19647; Mueller et al. 2025, arXiv:2504.13151 (sizes, CPR, CMD); Wang et al. 2022,
arXiv:2211.00593 (completeness, minimality).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...bootstrap import LEVEL, SEED, percentiles, resamples
from ..methods.method import UnitScores
from ..tasks.competence import NOISE
from ..tasks.pairs import BATCH, PromptPairs
from ..units.ablation import Filler
from ..units.ranking import ordered
from ..units.space import Space, State

# Shares of all units, as in the MIB benchmark.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LEVELS = (0.5, 0.8, 0.9)
# The first size that reaches a level is subject to selection bias: it is chosen on every other pair, and its circuit is
# measured on the rest.
SIZED_ON, MEASURED_ON = slice(0, None, 2), slice(1, None, 2)
ALL_PAIRS = slice(None)


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Metric of every pair for circuits of growing size, their complements, the full model, and everything ablated."""

    n_units: int
    sizes: tuple[int, ...]
    circuits: Float[np.ndarray, "sizes pairs"]
    complements: Float[np.ndarray, "sizes pairs"]
    full: Float[np.ndarray, " pairs"]
    empty: Float[np.ndarray, " pairs"]

    def require_signal(self) -> None:
        """Raise ``ValueError`` if ablating everything changes nothing beyond noise, which makes ratios meaningless."""
        difference = self.full - self.empty
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
        if abs(difference.mean()) <= NOISE * error or difference.mean() == 0:
            raise ValueError(
                f"faithfulness: expected a task that the model performs and the ablation breaks, got a metric of "
                f"{self.full.mean():.3g} for the model and {self.empty.mean():.3g} with everything ablated, equal within noise "
                f"(standard error {error:.2g}, {len(difference)} pairs). Give more pairs, another corruption or ablation."
            )

    def faithfulness(self, weights: np.ndarray | None = None) -> Float[np.ndarray, " sizes"]:
        """Return faithfulness by size; ``weights`` are the multiplicities of pairs in a resample."""
        return self._ratio(self.circuits, weights)

    def completeness(self, weights: np.ndarray | None = None) -> Float[np.ndarray, " sizes"]:
        """Return the faithfulness of each circuit's complement by size, NaN if the complement was not run."""
        return self._ratio(self.complements, weights)

    def cpr(self, weights: np.ndarray | None = None) -> float:
        """Return the area under faithfulness over the share of units kept; higher is better, above 1 if units hurt the task."""
        return float(np.trapezoid(self.faithfulness(weights), self._shares()))

    def cmd(self, weights: np.ndarray | None = None) -> float:
        """Return the area between faithfulness and 1 over the share of units kept; 0 is best."""
        return float(np.trapezoid(np.abs(1.0 - self.faithfulness(weights)), self._shares()))

    def at(self, sizes: Sequence[int]) -> "FaithfulnessCurve":
        """Return the curve at some of its sizes, in the given order; sizes may repeat."""
        rows = [self.sizes.index(size) for size in sizes]
        return replace(self, sizes=tuple(sizes), circuits=self.circuits[rows], complements=self.complements[rows])

    def of_pairs(self, pairs: slice) -> "FaithfulnessCurve":
        """Return the curve on some of the pairs."""
        return replace(
            self,
            circuits=self.circuits[:, pairs],
            complements=self.complements[:, pairs],
            full=self.full[pairs],
            empty=self.empty[pairs],
        )

    def smallest(self, level: float) -> int | None:
        """Return the first size on the curve that reaches a level of faithfulness, or None."""
        reached = np.flatnonzero(self.faithfulness() >= level)
        return self.sizes[reached[0]] if len(reached) else None

    def _shares(self) -> np.ndarray:
        return np.array(self.sizes) / self.n_units

    def _ratio(self, values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        counts = np.ones(len(self.full)) if weights is None else weights
        full, empty = (np.average(part, weights=counts) for part in (self.full, self.empty))
        # A resample of few pairs may have no signal; the ratio is then not finite.
        with np.errstate(divide="ignore", invalid="ignore"):
            return (np.average(values, axis=1, weights=counts) - empty) / (full - empty)


def pair_interval(
    statistic: Callable[[FaithfulnessCurve, np.ndarray], Any],
    along: FaithfulnessCurve,
    seed: int = SEED,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and high ends of the bootstrap interval of ``statistic(along, weights)`` over pairs."""
    return percentiles(np.array([statistic(along, weights) for weights in resamples(len(along.full), seed)]), level)


def ranked(scores: UnitScores, ranking: str = "signed") -> Int[Tensor, " units"]:
    """Return unit indices by decreasing score (``signed``) or magnitude (``absolute``); ties keep their order.

    Raises:
        ValueError: If the ranking is unknown, or a unit has no score.
    """
    if not scores.measured.all():
        raise ValueError(
            f"ranking: expected a score for every unit, got {int(scores.measured.sum())} of {len(scores.values)}. Measure all "
            "units (exact: leave out `units`)."
        )
    return ordered(scores.values, ranking)


def circuit_members(order: Int[Tensor, " units"], size: int) -> Bool[Tensor, " units"]:
    """Return a mask of the first ``size`` units."""
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:size]] = True
    return kept


def share_sizes(n_units: int, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Return the circuit sizes that are these shares of all units."""
    return tuple(int(share * n_units) for share in shares)


def growing_sizes(n_units: int, per_decade: int = 6) -> tuple[int, ...]:
    """Return logarithmically spaced sizes from 0 to all units, which resolve the rise of a curve."""
    steps = int(np.ceil(np.log10(max(n_units, 2)) * per_decade)) + 1
    return (0, *sorted({round(size) for size in np.geomspace(1, n_units, steps)}))


class Trials:
    """Circuits evaluated on pairs, with replacement values and results cached."""

    def __init__(self, space: Space, pairs: PromptPairs, fill: Filler, batch: int = BATCH):
        self.space, self.pairs, self._found = space, pairs, {}
        with torch.no_grad():
            self._batches = [(some, fill(some)) for some in pairs.batches(batch)]
            self.full = self._each(lambda some, _: space.passes.run(some.clean))

    @property
    def empty(self) -> Float[np.ndarray, " pairs"]:
        """Metric of every pair with all units ablated."""
        return self.metric(torch.zeros(self.space.size, dtype=torch.bool))

    @torch.no_grad()
    def metric(self, kept: Bool[Tensor, " units"]) -> Float[np.ndarray, " pairs"]:
        """Return the metric of every pair with only the ``kept`` units."""
        key = np.packbits(kept.numpy()).tobytes()
        if key not in self._found:
            self._found[key] = self._each(lambda some, state: self.space.run(some.clean, kept, state))
        return self._found[key]

    def _each(self, run: Callable[[PromptPairs, State], Tensor]) -> Float[np.ndarray, " pairs"]:
        return torch.cat([some.measure(run(some, state)) for some, state in self._batches]).double().cpu().numpy()


def curve(
    trials: Trials, order: Int[Tensor, " units"], sizes: Sequence[int], complements: Sequence[int] | None = None
) -> FaithfulnessCurve:
    """Evaluate circuits of the first units of ``order``, and their complements (by default for every size)."""
    kept = {size: circuit_members(order, size) for size in sizes}
    asked = sizes if complements is None else complements
    unknown = np.full(len(trials.pairs), np.nan)
    circuits = np.stack([trials.metric(kept[size]) for size in sizes])
    rest = np.stack([trials.metric(~kept[size]) if size in asked else unknown for size in sizes])
    return FaithfulnessCurve(trials.space.size, tuple(sizes), circuits, rest, trials.full, trials.empty)


def smallest_size(
    trials: Trials, order: Int[Tensor, " units"], level: float, along: FaithfulnessCurve, pairs: slice = ALL_PAIRS
) -> int | None:
    """Return the smallest number of units that reaches a level of faithfulness, bisected where ``along`` first reaches it.

    None if no size on the curve does. Only ``pairs`` are used, so the circuit can be measured without bias on others.
    """
    high = along.of_pairs(pairs).smallest(level)
    if high is None:
        return None
    low = max((size for size in along.sizes if size < high), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        reached = curve(trials, order, [middle], complements=()).of_pairs(pairs).faithfulness()[0] >= level
        low, high = (low, middle) if reached else (middle, high)
    return high


def minimality(
    trials: Trials, kept: Bool[Tensor, " units"], units: Int[Tensor, " some"] | None = None, pairs: slice = ALL_PAIRS
) -> Float[np.ndarray, " some"]:
    """Return the faithfulness that a circuit loses without each of its units (or some of them); near 0 if not needed."""
    chosen = kept.nonzero().flatten() if units is None else units
    without = np.array([trials.metric(_without(kept, int(unit)))[pairs].mean() for unit in chosen])
    with np.errstate(divide="ignore", invalid="ignore"):
        return (trials.metric(kept)[pairs].mean() - without) / (trials.full[pairs].mean() - trials.empty[pairs].mean())


def _without(kept: Bool[Tensor, " units"], unit: int) -> Bool[Tensor, " units"]:
    fewer = kept.clone()
    fewer[unit] = False
    return fewer


def stability(scores: UnitScores, size: int, ranking: str = "signed", draws: int = 100, seed: int = 0) -> float:
    """Return the mean Jaccard index between the circuit of all pairs and those of bootstrap resamples of the pairs.

    Raises:
        ValueError: If the method gives no per-pair scores.
    """
    if scores.per_pair is None:
        raise ValueError("stability: expected per-pair scores, got only their mean. Discover on resampled pairs instead.")
    n, generator = len(scores.per_pair), torch.Generator().manual_seed(seed)
    own = circuit_members(ranked(scores, ranking), size)
    found = []
    for _ in range(draws):
        draw = torch.randint(n, (n,), generator=generator)
        values = scores.per_pair[draw].mean(0)
        other = circuit_members(ranked(UnitScores(values, scores.cost), ranking), size)
        found.append(jaccard(own, other))
    return float(np.mean(found))


def jaccard(a: Bool[Tensor, " units"], b: Bool[Tensor, " units"]) -> float:
    """Return the Jaccard index of two circuits, 1 if both are empty."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0
