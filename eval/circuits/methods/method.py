"""What a method of discovery is, and what it finds."""

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
    """How much every unit matters: the fall of the metric if it is taken from the corrupted run, or an estimate of it.

    ``per_pair`` are the same pair by pair, for methods that look at one pair at a time; their mean is ``values``. Units that
    a method was not asked about are not numbers (NaN).
    """

    values: Float[Tensor, " units"]
    cost: Cost
    per_pair: Float[Tensor, "pairs units"] | None = None

    @property
    def measured(self) -> Bool[Tensor, " units"]:
        """Which units have a score."""
        return ~self.values.isnan()


class Method(ABC):
    """One way to find circuits. The constructor's arguments are its options."""

    @abstractmethod
    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        """A number for every unit of the space."""


def score_batches(
    space: Space, pairs: PromptPairs, batch: int, contributions: Callable[[PromptPairs], Float[Tensor, "some units"]]
) -> UnitScores:
    """The scores of a method that looks at pairs one by one; a batch of them goes through the model together."""
    with space.passes.counted() as cost:
        per_pair = torch.cat([contributions(some) for some in pairs.batches(batch)])
    return UnitScores(per_pair.mean(0), cost, per_pair)
