"""Space: the numbered units that a circuit is a subset of, and forward passes with some units patched.

Units are the parts a circuit can keep or ablate: latents, neurons, heads, whole components (``nodes``), or the edges between
components (``edges``). A discovery method scores every unit; a circuit consists of the top-scoring units.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....training.activations.model import LanguageModel
from .passes import Passes, Seen

# Unit activations on some prompts, or gradients of the same form: ``(pairs, positions, ...)``, one or more tensors per part.
State = list[Tensor]


class Space(ABC):
    """Units in named ``groups`` (index ranges). ``hooks`` are all hooks that a pass must read."""

    hooks: tuple[str, ...]
    groups: dict[str, slice]

    def __init__(self, model: LanguageModel):
        self.model, self.passes = model, Passes(model)

    @property
    def size(self) -> int:
        """Number of units."""
        return max(group.stop for group in self.groups.values())

    @abstractmethod
    def names(self) -> list[str]:
        """Return the name of every unit."""

    @abstractmethod
    def state(self, seen: Seen) -> State:
        """Return unit activations from the activations that a pass saw at the hooks."""

    @abstractmethod
    def slopes(self, seen: Seen, grads: Seen) -> State:
        """Return the metric's gradients with respect to unit activations (or receiver inputs), from those at the hooks.

        Linear in ``grads``, so slopes of several passes can be averaged.
        """

    @contextmanager
    def frozen_norms(self) -> Iterator[None]:
        """Treat the denominators of norms between a unit and its hook as constants in slopes, while open."""
        yield

    @abstractmethod
    def contrast(self, clean: State, corrupted: State, slopes: State) -> Float[Tensor, "pairs units"]:
        """Return the linear estimate of the drop in the metric if a unit is patched: activation difference times slope."""

    @abstractmethod
    def distance(self, a: State, b: State) -> Float[Tensor, "pairs units"]:
        """Return the Euclidean distance between each unit's activations in two states, over positions and coordinates."""

    @abstractmethod
    def run(
        self, token_ids: Int[Tensor, "pairs positions"], kept: Tensor, filler: State
    ) -> Float[Tensor, "pairs positions vocabulary"]:
        """Return the logits with units that are not kept taken from ``filler``; everything downstream is recomputed.

        ``kept`` is ``(units,)`` or ``(pairs, units)``; values between 0 and 1 interpolate, and gradients flow to them.
        ``filler`` has the form of a state; its rows and positions may be broadcast.
        """

    def zeros(self, state: State) -> State:
        """Return the state of units that do nothing, in the form of ``state``: zeros, unless a unit is off otherwise."""
        return [torch.zeros_like(tensor) for tensor in state]

    def frequency(
        self, token_ids: Int[Tensor, "pairs positions"], counted: Bool[Tensor, "pairs positions"]
    ) -> Float[Tensor, "pairs units"]:
        """Return the share of the ``counted`` positions at which each unit is active.

        Raises:
            ValueError: If units are not either active or silent.
        """
        raise ValueError("frequency: expected experts, latents or neurons, got edges, which always carry something.")

    def see(self, token_ids: Int[Tensor, "pairs positions"]) -> tuple[Tensor, State]:
        """Return the logits and unit activations of the unmodified model, in one forward pass."""
        logits, seen = self.passes.see(token_ids, self.hooks)
        return logits, self.state(seen)

    def group_of(self, units: Sequence[int]) -> list[str]:
        """Return the group of each of some units."""
        return [next(name for name, group in self.groups.items() if group.start <= unit < group.stop) for unit in units]
