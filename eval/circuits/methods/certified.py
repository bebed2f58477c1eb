"""Certified circuits: units that a method selects, or excludes, on nearly every random subsample of the pairs.

Every pair is dropped from a subsample with probability ``p_del``. With confidence ``1 - alpha``, a unit is IN if the method
selects it on more than ``tau`` of all subsamples, and OUT if the method excludes it on more than ``tau``; other units are
undecided. A data set that differs by ``r`` pairs gives the same subsample whenever those pairs are dropped, with probability
``p_del^r``, so its votes differ by at most ``1 - p_del^r``: after up to ``r = floor(log(1.5 - tau) / log(p_del))`` deletions,
insertions and substitutions of pairs, more than half of all subsamples still select every IN unit and exclude every OUT unit.

Source: Anani et al. 2026, arXiv:2602.22968; the bound is that of Huang et al. 2023, arXiv:2302.01757.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import beta
from torch import Tensor

from ..tasks.pairs import PromptPairs
from ..units.passes import Cost
from ..units.ranking import largest, strengths
from ..units.space import Space
from .attribution import AttributionPatching
from .method import Method, UnitScores

# Share of all units that is selected if neither a size nor a threshold is given.
SHARE = 0.1
# Number of subsamples scored together.
CHUNK = 64


@dataclass(frozen=True, eq=False)
class Certificate:
    """Votes (share of subsamples that selected a unit), and decisions valid for any data set within ``radius`` edits."""

    votes: Float[Tensor, " units"]
    included: Bool[Tensor, " units"]
    excluded: Bool[Tensor, " units"]
    radius: int
    cost: Cost

    @property
    def abstained(self) -> Bool[Tensor, " units"]:
        """Mask of units without a decision."""
        return ~(self.included | self.excluded)

    def decisions(self) -> list[str]:
        """Return IN, OUT or ABSTAIN for every unit."""
        return [
            "IN" if included else "OUT" if excluded else "ABSTAIN"
            for included, excluded in zip(self.included.tolist(), self.excluded.tolist(), strict=True)
        ]


class Certified(Method):
    """Certification by subsampling of the circuits that ``base`` finds.

    The circuit of a subsample is its ``size`` largest scores, or those above ``threshold``, in ``ranking``; by default a tenth
    of all units. A score of 0 is never selected. Methods with per-pair scores run once on every pair; others run again on each
    subsample. ``simultaneous`` divides ``alpha`` by the number of units, so that with probability ``1 - alpha`` all decisions
    are right; otherwise this holds for each unit by itself.
    """

    def __init__(
        self,
        base: Method | None = None,
        size: int | None = None,
        threshold: float | None = None,
        ranking: str = "signed",
        subsamples: int = 1000,
        p_del: float = 0.6,
        tau: float = 0.95,
        alpha: float = 0.001,
        simultaneous: bool = False,
        seed: int = 0,
    ):
        if size is not None and threshold is not None:
            raise ValueError("size: expected size or threshold, got both. Give one of them.")
        for name, value, low in (("p_del", p_del, 0.0), ("tau", tau, 0.5), ("alpha", alpha, 0.0)):
            if not low < value < 1.0:
                raise ValueError(f"{name}: expected a number between {low:g} and 1, got {value}.")
        if subsamples < 1 or (threshold or 0.0) < 0.0:
            raise ValueError(f"subsamples, threshold: expected at least 1 and at least 0, got {subsamples} and {threshold}.")
        self.base, self.size, self.threshold, self.ranking = base or AttributionPatching(), size, threshold, ranking
        self.subsamples, self.p_del, self.tau, self.alpha = subsamples, p_del, tau, alpha
        self.simultaneous, self.seed = simultaneous, seed

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        found = self.certify(space, pairs)
        return UnitScores(found.votes, found.cost)

    def certify(self, space: Space, pairs: PromptPairs) -> Certificate:
        """Count the votes and decide."""
        draw = torch.Generator().manual_seed(self.seed)
        subsamples = torch.rand(self.subsamples, len(pairs), generator=draw) >= self.p_del
        with space.passes.counted() as cost:
            whole = self.base.discover(space, pairs)
            if whole.per_pair is None:
                counts = self._rerun(space, pairs, subsamples)
            else:
                counts = self._average(whole.per_pair.cpu(), subsamples)
        counts, alpha = counts.double().numpy(), self.alpha / (space.size if self.simultaneous else 1)
        included = torch.from_numpy(lower_bound(counts, self.subsamples, alpha) > self.tau)
        excluded = torch.from_numpy(lower_bound(self.subsamples - counts, self.subsamples, alpha) > self.tau)
        votes = torch.from_numpy(counts / self.subsamples).float()
        return Certificate(votes, included, excluded, radius(self.tau, self.p_del), cost)

    def _average(self, per_pair: Float[Tensor, "pairs units"], subsamples: Bool[Tensor, "n pairs"]) -> Float[Tensor, " units"]:
        votes = torch.zeros(per_pair.shape[1])
        for some in subsamples.split(CHUNK):
            chosen = some.to(per_pair)
            means = chosen @ per_pair / chosen.sum(1, keepdim=True).clamp_min(1)
            votes += self._select(means).float().sum(0)
        return votes

    def _rerun(self, space: Space, pairs: PromptPairs, subsamples: Bool[Tensor, "n pairs"]) -> Float[Tensor, " units"]:
        votes = torch.zeros(space.size)
        for some in subsamples:
            # An empty subsample selects nothing.
            if some.any():
                values = self.base.discover(space, pairs.take(some.nonzero().flatten())).values
                votes += self._select(values[None].cpu()).float()[0]
        return votes

    def _select(self, values: Float[Tensor, "n units"]) -> Bool[Tensor, "n units"]:
        found = strengths(values, self.ranking)
        if self.threshold is not None:
            return found > self.threshold
        size = max(1, round(SHARE * values.shape[1])) if self.size is None else self.size
        return largest(values, size, self.ranking) & (found > 0)


def radius(tau: float, p_del: float) -> int:
    """Return the number of pairs that may be deleted, inserted or replaced."""
    return math.floor(math.log(1.5 - tau) / math.log(p_del))


def lower_bound(counts: Float[np.ndarray, " units"], n: int, alpha: float) -> Float[np.ndarray, " units"]:
    """Return the Clopper-Pearson (1934) lower bound of a probability at confidence ``1 - alpha``, for ``counts`` of ``n``."""
    bounds = beta.ppf(alpha, np.maximum(counts, 1), n - counts + 1)
    return np.where(counts > 0, bounds, 0.0)
