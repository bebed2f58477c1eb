"""What a method of discovery is, and what it finds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..pairs import Pairs
from ..passes import Cost
from ..space import Space

BATCH = 32


@dataclass(frozen=True, eq=False)
class Scores:
    """How much every unit matters: the fall of the metric if it is taken from the corrupted run, or an estimate of it.

    ``per_pair`` are the same pair by pair, for methods that look at one pair at a time; their mean is ``values``.
    """

    values: Float[Tensor, " units"]
    cost: Cost
    per_pair: Float[Tensor, "pairs units"] | None = None


class Method(ABC):
    """One way to find circuits. The constructor's arguments are its options."""

    @abstractmethod
    def discover(self, space: Space, pairs: Pairs) -> Scores:
        """A number for every unit of the space."""
