"""Faithfulness: how much of what the model does on a task a circuit does alone, and how little is left without it.

``faithfulness = (m(circuit) - m(empty)) / (m(model) - m(empty))``: 1 is the model's own metric, 0 that of everything ablated.
``completeness`` is the same of the circuit's complement: near 0 if nothing that matters was left out. Metrics are averaged over
pairs before dividing. CPR and CMD are areas over circuits of growing size: of faithfulness, and of its distance from 1.

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

# Shares of all units, as the MIB benchmark has them.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LEVELS = (0.5, 0.8, 0.9)
# A size chosen where faithfulness first reaches a level reaches it there by luck too: it is chosen on every other pair, and
# what its circuit does is measured on the rest.
SIZED_ON, MEASURED_ON = slice(0, None, 2), slice(1, None, 2)
ALL_PAIRS = slice(None)


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """The metric of every pair for circuits of growing size, their complements, the whole model, and with nothing kept."""

    n_units: int
    sizes: tuple[int, ...]
    circuits: Float[np.ndarray, "sizes pairs"]
    complements: Float[np.ndarray, "sizes pairs"]
    full: Float[np.ndarray, " pairs"]
    empty: Float[np.ndarray, " pairs"]

    def require_signal(self) -> None:
        """Raise ``ValueError`` where ablating everything changes nothing beyond noise, so that ratios to it mean nothing."""
        difference = self.full - self.empty
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
        if abs(difference.mean()) <= NOISE * error or difference.mean() == 0:
            raise ValueError(
                f"faithfulness: the model's metric, {self.full.mean():.3g}, less that with everything ablated, "
                f"{self.empty.mean():.3g}, is within noise of 0 (standard error {error:.2g}, {len(difference)} pairs). "
                "Expected a task that the model does and the ablation breaks. Give more pairs, another corruption or ablation."
            )

    def faithfulness(self, weights: np.ndarray | None = None) -> Float[np.ndarray, " sizes"]:
        """By size; ``weights`` count each pair so many times."""
        return self._ratio(self.circuits, weights)

    def completeness(self, weights: np.ndarray | None = None) -> Float[np.ndarray, " sizes"]:
        """Faithfulness of what each circuit leaves out, by size; not a number where that was not run."""
        return self._ratio(self.complements, weights)

    def cpr(self, weights: np.ndarray | None = None) -> float:
        """Area under faithfulness over the share of units kept; more is better, above 1 where units work against the task."""
        return float(np.trapezoid(self.faithfulness(weights), self._shares()))

    def cmd(self, weights: np.ndarray | None = None) -> float:
        """Area between faithfulness and 1 over the share of units kept; 0 is best."""
        return float(np.trapezoid(np.abs(1.0 - self.faithfulness(weights)), self._shares()))

    def at(self, sizes: Sequence[int]) -> "FaithfulnessCurve":
        """The same curve at some of its sizes, in the order given; one may come twice."""
        rows = [self.sizes.index(size) for size in sizes]
        return replace(self, sizes=tuple(sizes), circuits=self.circuits[rows], complements=self.complements[rows])

    def of_pairs(self, pairs: slice) -> "FaithfulnessCurve":
        """The same curve on some of the pairs."""
        return replace(
            self,
            circuits=self.circuits[:, pairs],
            complements=self.complements[:, pairs],
            full=self.full[pairs],
            empty=self.empty[pairs],
        )

    def smallest(self, level: float) -> int | None:
        """The first size on the curve that reaches a level of faithfulness; None if none does."""
        reached = np.flatnonzero(self.faithfulness() >= level)
        return self.sizes[reached[0]] if len(reached) else None

    def _shares(self) -> np.ndarray:
        return np.array(self.sizes) / self.n_units

    def _ratio(self, values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        counts = np.ones(len(self.full)) if weights is None else weights
        full, empty = (np.average(part, weights=counts) for part in (self.full, self.empty))
        # On a few pairs nothing may be left of the signal that the whole has: no number then.
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
    """Units from most to least: those that help most first, or those that matter most either way; equals in their order.

    Raises:
        ValueError: If there is no such ranking, or a unit has no score.
    """
    if not scores.measured.all():
        raise ValueError(
            f"ranking: expected a score for every unit, got {int(scores.measured.sum())} of {len(scores.values)}. Measure all "
            "units (exact: leave out `units`)."
        )
    return ordered(scores.values, ranking)


def circuit_members(order: Int[Tensor, " units"], size: int) -> Bool[Tensor, " units"]:
    """The circuit of the first ``size`` units."""
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:size]] = True
    return kept


def share_sizes(n_units: int, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Sizes that are these shares of all units."""
    return tuple(int(share * n_units) for share in shares)


def growing_sizes(n_units: int, per_decade: int = 6) -> tuple[int, ...]:
    """Sizes from nothing to everything, equally spaced on a logarithmic scale, to see where a curve rises."""
    steps = int(np.ceil(np.log10(max(n_units, 2)) * per_decade)) + 1
    return (0, *sorted({round(size) for size in np.geomspace(1, n_units, steps)}))


class Trials:
    """Circuits run on pairs, each of them once: what absent units are filled with is looked up once, and so is every result."""

    def __init__(self, space: Space, pairs: PromptPairs, fill: Filler, batch: int = BATCH):
        self.space, self.pairs, self._found = space, pairs, {}
        with torch.no_grad():
            self._batches = [(some, fill(some)) for some in pairs.batches(batch)]
            self.full = self._each(lambda some, _: space.passes.run(some.clean))

    @property
    def empty(self) -> Float[np.ndarray, " pairs"]:
        """The metric with every unit ablated."""
        return self.metric(torch.zeros(self.space.size, dtype=torch.bool))

    @torch.no_grad()
    def metric(self, kept: Bool[Tensor, " units"]) -> Float[np.ndarray, " pairs"]:
        """The metric of every pair with the units that are kept."""
        key = np.packbits(kept.numpy()).tobytes()
        if key not in self._found:
            self._found[key] = self._each(lambda some, state: self.space.run(some.clean, kept, state))
        return self._found[key]

    def _each(self, run: Callable[[PromptPairs, State], Tensor]) -> Float[np.ndarray, " pairs"]:
        return torch.cat([some.measure(run(some, state)) for some, state in self._batches]).double().cpu().numpy()


def curve(
    trials: Trials, order: Int[Tensor, " units"], sizes: Sequence[int], complements: Sequence[int] | None = None
) -> FaithfulnessCurve:
    """The circuits of the first so many units of ``order``, and their complements, or those of some of the sizes only."""
    kept = {size: circuit_members(order, size) for size in sizes}
    asked = sizes if complements is None else complements
    unknown = np.full(len(trials.pairs), np.nan)
    circuits = np.stack([trials.metric(kept[size]) for size in sizes])
    rest = np.stack([trials.metric(~kept[size]) if size in asked else unknown for size in sizes])
    return FaithfulnessCurve(trials.space.size, tuple(sizes), circuits, rest, trials.full, trials.empty)


def smallest_size(
    trials: Trials, order: Int[Tensor, " units"], level: float, along: FaithfulnessCurve, pairs: slice = ALL_PAIRS
) -> int | None:
    """How many units a circuit needs for a level of faithfulness, to the unit: bisected where ``along`` first reaches it.

    None where no size on the curve does. Only ``pairs`` are looked at: on others the circuit may be measured without bias.
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
    """How much faithfulness a circuit loses without each of its units (or some of them): near 0 it was not needed."""
    chosen = kept.nonzero().flatten() if units is None else units
    without = np.array([trials.metric(_without(kept, int(unit)))[pairs].mean() for unit in chosen])
    with np.errstate(divide="ignore", invalid="ignore"):
        return (trials.metric(kept)[pairs].mean() - without) / (trials.full[pairs].mean() - trials.empty[pairs].mean())


def _without(kept: Bool[Tensor, " units"], unit: int) -> Bool[Tensor, " units"]:
    fewer = kept.clone()
    fewer[unit] = False
    return fewer


def stability(scores: UnitScores, size: int, ranking: str = "signed", draws: int = 100, seed: int = 0) -> float:
    """Mean Jaccard index of the circuit of all pairs and those of pairs drawn anew with replacement.

    Raises:
        ValueError: If the method did not look at pairs one by one.
    """
    if scores.per_pair is None:
        raise ValueError("stability: expected scores of every pair, got their mean only. Discover on resampled pairs instead.")
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
    """Units in both, of those in either; of two empty circuits it is 1."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0
