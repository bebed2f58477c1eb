"""Rankings of units by score, for one row of scores or many."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....sae.suggestions import require_choice

RANKINGS = ("signed", "absolute")


def ordered(values: Float[Tensor, "*rows units"], ranking: str = "signed") -> Int[Tensor, "*rows units"]:
    """Return unit indices by decreasing score (``signed``) or magnitude (``absolute``); ties keep their order.

    Raises:
        ValueError: If the ranking is unknown.
    """
    return strengths(values, ranking).argsort(dim=-1, descending=True, stable=True)


def strengths(values: Float[Tensor, "*rows units"], ranking: str) -> Float[Tensor, "*rows units"]:
    """Return the values that a ranking sorts by: scores or their magnitudes.

    Raises:
        ValueError: If the ranking is unknown.
    """
    require_choice("ranking", ranking, RANKINGS)
    return values if ranking == "signed" else values.abs()


def largest(values: Float[Tensor, "*rows units"], size: int, ranking: str = "signed") -> Bool[Tensor, "*rows units"]:
    """Return a mask of the first ``size`` units of every row."""
    chosen = ordered(values, ranking)[..., :size]
    return values.new_zeros(values.shape).scatter(-1, chosen, 1.0).bool()
