"""Interface of discovery methods, and their results."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..tasks.pairs import PromptPairs
from ..units.passes import Cost
from ..units.space import Space


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Importance of every unit: the drop in the metric if it is patched from the corrupted run, or an estimate.

    ``per_pair`` holds the scores of each pair, for methods that score pairs one at a time; their mean is ``values``. Units that
    a method was not asked to score are NaN.
    """

    values: Float[Tensor, " units"]
    cost: Cost
    per_pair: Float[Tensor, "pairs units"] | None = None

    @property
    def measured(self) -> Bool[Tensor, " units"]:
        """Mask of units that have a score."""
        return ~self.values.isnan()


class Method(ABC):
    """Discovery method; the constructor's arguments are its options."""

    @abstractmethod
    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        """Return a score for every unit of the space."""


def score_batches(
    space: Space, pairs: PromptPairs, batch: int, contributions: Callable[[PromptPairs], Float[Tensor, "some units"]]
) -> UnitScores:
    """Return the scores of a method that scores pairs one by one; pairs run through the model in batches."""
    with space.passes.counted() as cost:
        per_pair = torch.cat([contributions(some) for some in pairs.batches(batch)])
    return UnitScores(per_pair.mean(0), cost, per_pair)
