"""Rankings of units by their scores, for one row of scores or many."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....sae.suggestions import require_choice

RANKINGS = ("signed", "absolute")


def ordered(values: Float[Tensor, "*rows units"], ranking: str = "signed") -> Int[Tensor, "*rows units"]:
    """Units from most to least: those that help most first, or those that matter most either way; equals in their order.

    Raises:
        ValueError: If there is no such ranking.
    """
    return strengths(values, ranking).argsort(dim=-1, descending=True, stable=True)


def strengths(values: Float[Tensor, "*rows units"], ranking: str) -> Float[Tensor, "*rows units"]:
    """What a ranking sorts by.

    Raises:
        ValueError: If there is no such ranking.
    """
    require_choice("ranking", ranking, RANKINGS)
    return values if ranking == "signed" else values.abs()


def largest(values: Float[Tensor, "*rows units"], size: int, ranking: str = "signed") -> Bool[Tensor, "*rows units"]:
    """The circuit of the first ``size`` units of every row."""
    chosen = ordered(values, ranking)[..., :size]
    return values.new_zeros(values.shape).scatter(-1, chosen, 1.0).bool()
