"""Overlap of two circuits: shared units, their number by chance, and a test of one overlap against another.

The null of an overlap: each circuit has its number of units in every group (hook), drawn at random from the units of the group
that have any score in its task. A circuit of latents can only have latents that fire on the task's prompts, so two tasks share
more of them than random latents would. The null of a difference of overlaps: which of two circuits a unit belongs to, if it is
in one of them, is random (an exact sign test on the units of the third circuit).
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, rankdata
from torch import Tensor

PERMUTATIONS = 9999


def share_of_smaller(a: Bool[Tensor, " units"], b: Bool[Tensor, " units"]) -> float:
    """Return the number of shared units divided by that of the smaller circuit, 1 if it is empty."""
    smaller = min(int(a.sum()), int(b.sum()))
    return int((a & b).sum()) / smaller if smaller else 1.0


def jaccard_of_counts(
    shared: Int[np.ndarray, " draws"], a: Int[np.ndarray, " draws"], b: Int[np.ndarray, " draws"]
) -> Float[np.ndarray, " draws"]:
    """Return Jaccard indices from numbers of units, 1 if both circuits are empty."""
    either = a + b - shared
    return np.where(either > 0, shared / np.maximum(either, 1), 1.0)


def shared_by_chance(
    groups: Mapping[str, slice],
    a: Bool[Tensor, " units"],
    b: Bool[Tensor, " units"],
    possible_a: Bool[Tensor, " units"],
    possible_b: Bool[Tensor, " units"],
    seed: int = 0,
) -> Int[np.ndarray, " permutations"]:
    """Return the number of shared units under the null, PERMUTATIONS times; ``possible`` are the units a circuit may have."""
    rng, total = np.random.default_rng(seed), np.zeros(PERMUTATIONS, dtype=np.int64)
    for group in groups.values():
        in_a, in_b = int(a[group].sum()), int(b[group].sum())
        both = int((possible_a[group] & possible_b[group]).sum())
        if not (in_a and in_b and both):
            continue
        # Of each circuit's units, those in the part of the group that both may have; then how many of these coincide.
        first = rng.hypergeometric(both, int(possible_a[group].sum()) - both, in_a, size=PERMUTATIONS)
        second = rng.hypergeometric(both, int(possible_b[group].sum()) - both, in_b, size=PERMUTATIONS)
        total += rng.hypergeometric(first, both - first, second)
    return total


def chance_p(shared: int, by_chance: Int[np.ndarray, " permutations"]) -> float:
    """Return the one-sided p-value of at least as many shared units."""
    return (1 + int((by_chance >= shared).sum())) / (1 + len(by_chance))


def swap_p(a: Bool[Tensor, " units"], b: Bool[Tensor, " units"], c: Bool[Tensor, " units"]) -> float:
    """Return the two-sided p-value of a circuit ``a`` that shares more units with ``b`` than with ``c``, or fewer."""
    only_b, only_c = int((a & b & ~c).sum()), int((a & c & ~b).sum())
    return float(binomtest(only_b, only_b + only_c).pvalue) if only_b + only_c else 1.0


def rank_correlation(a: Float[np.ndarray, "*rows units"], b: Float[np.ndarray, "*rows units"]) -> Float[np.ndarray, "*rows"]:
    """Return Spearman's correlation of every row; NaN if a row is constant."""
    ranks = [rankdata(values, axis=-1) for values in (a, b)]
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))
