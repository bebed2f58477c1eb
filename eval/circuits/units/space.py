"""Space: the numbered units that a circuit is a choice of, and the model run with some of them taken from elsewhere.

Units are whatever a circuit may keep or leave out: latents, neurons, heads, whole components (``nodes``), or the edges between
components (``edges``). A method of discovery gives every unit a number, and a circuit is those with the largest.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor

from ....training.activations.model import LanguageModel
from .passes import Passes, Seen

# What units carry on some prompts, or a gradient in the same terms: tensors ``(pairs, positions, ...)``, some for each part.
State = list[Tensor]


class Space(ABC):
    """Units in ``groups``, which are named ranges of them. ``hooks`` are all that a pass must see."""

    hooks: tuple[str, ...]
    groups: dict[str, slice]

    def __init__(self, model: LanguageModel):
        self.model, self.passes = model, Passes(model)

    @property
    def size(self) -> int:
        """How many units there are."""
        return max(group.stop for group in self.groups.values())

    @abstractmethod
    def names(self) -> list[str]:
        """What every unit is."""

    @abstractmethod
    def state(self, seen: Seen) -> State:
        """What units carry, from what a pass saw at the hooks."""

    @abstractmethod
    def slopes(self, seen: Seen, grads: Seen) -> State:
        """How the metric changes with what units carry (or what reads them gets), from a pass's gradients at the hooks.

        Linear in ``grads``, so that slopes of several passes may be averaged.
        """

    @contextmanager
    def frozen_norms(self) -> Iterator[None]:
        """While open, slopes take the denominators of norms for constants, where a norm lies between a unit and its hook."""
        yield

    @abstractmethod
    def contrast(self, clean: State, corrupted: State, slopes: State) -> Float[Tensor, "pairs units"]:
        """The linear estimate of how much the metric falls if a unit is taken from the corrupted run: difference by slope."""

    @abstractmethod
    def distance(self, a: State, b: State) -> Float[Tensor, "pairs units"]:
        """How far apart what each unit carries is: the Euclidean norm over positions and whatever it has several of."""

    @abstractmethod
    def run(
        self, token_ids: Int[Tensor, "pairs positions"], kept: Tensor, filler: State
    ) -> Float[Tensor, "pairs positions vocabulary"]:
        """Logits of the model with units that are not kept taken from ``filler``; all that depends on them is recomputed.

        ``kept`` is ``(units,)``, or ``(pairs, units)``; numbers between 0 and 1 mix both, and gradients flow to them.
        ``filler`` has the form of a state, and may have one row, or one position, for all.
        """

    def see(self, token_ids: Int[Tensor, "pairs positions"]) -> tuple[Tensor, State]:
        """Logits of the untouched model and what units carry in it: one forward pass."""
        logits, seen = self.passes.see(token_ids, self.hooks)
        return logits, self.state(seen)

    def group_of(self, units: Sequence[int]) -> list[str]:
        """The group that each of some units is in."""
        return [next(name for name, group in self.groups.items() if group.start <= unit < group.stop) for unit in units]
