"""Edges between the nodes of a circuit: how much of a unit's effect reaches the metric by way of another, directly.

Source: sparse feature circuits, Marks et al. 2024, arXiv:2403.19647, section 3; there the gradients that edges are multiplied
with are means over pairs, here every pair has its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .tasks.pairs import BATCH, PromptPairs
from .units.nodes import NodeSpace, Part
from .units.passes import Cost, Seen
from .units.space import State


@dataclass(frozen=True, eq=False)
class FeatureEdges:
    """Weighted edges between units; a receiver that is no unit, number ``n_units``, is the metric itself.

    The weight is the linear estimate of the fall of the metric if, along this edge alone, the sender is taken from the
    corrupted run: what a sender's edges weigh together is the attribution patching score of that unit, if all units that it
    reaches are kept as receivers.
    """

    n_units: int
    senders: Int[Tensor, " edges"]
    receivers: Int[Tensor, " edges"]
    weights: Float[Tensor, " edges"]
    cost: Cost

    def above(self, threshold: float) -> "FeatureEdges":
        """The edges whose weight is larger than that, whichever its sign."""
        strong = self.weights.abs() > threshold
        return replace(self, senders=self.senders[strong], receivers=self.receivers[strong], weights=self.weights[strong])

    def describe(self, names: list[str]) -> list[tuple[str, str, float]]:
        """Sender, receiver and weight of every edge, by the names of the space's units, the largest weight first."""
        every = [*names, "metric"]
        order = self.weights.abs().argsort(descending=True, stable=True)
        rows = zip(self.senders[order].tolist(), self.receivers[order].tolist(), self.weights[order].tolist(), strict=True)
        return [(every[sender], every[receiver], weight) for sender, receiver, weight in rows]


def feature_edges(
    space: NodeSpace, pairs: PromptPairs, kept: Bool[Tensor, " units"], threshold: float = 0.0, batch: int = BATCH
) -> FeatureEdges:
    """The edges among the units that are ``kept``, and from them to the metric, means over pairs.

    An edge is the direct path: it passes no other unit of the space, kept or not. The residual stream flows on between parts,
    attention and norms included, unless a part stands in the stream itself; there only what is no unit gets past. For every
    batch there are three forward passes and two backward passes, and one more backward pass for each unit that is kept.

    Raises:
        ValueError: If ``kept`` is not one entry for each unit.
    """
    if kept.shape != (space.size,):
        raise ValueError(f"kept: expected one entry for each of the {space.size} units, got {tuple(kept.shape)}.")
    units = kept.nonzero().flatten()
    total = torch.zeros(len(units), len(units) + 1, dtype=torch.float64)
    with space.passes.counted() as cost:
        for some in pairs.batches(batch):
            total += _weights(space, some, units).double().cpu()
    weights = (total / len(pairs)).float()
    senders, receivers = (weights.abs() > threshold).nonzero(as_tuple=True)
    numbers = torch.cat([units.cpu(), torch.tensor([space.size])])
    return FeatureEdges(space.size, numbers[senders], numbers[receivers], weights[senders, receivers], cost)


def _weights(space: NodeSpace, pairs: PromptPairs, units: Int[Tensor, " kept"]) -> Float[Tensor, "kept receivers"]:
    """Summed over pairs; the last receiver is the metric."""
    _, corrupted = space.see(pairs.corrupted)
    seen, grads = space.passes.gradients(pairs.clean, space.hooks, pairs.measure)
    with torch.no_grad():
        slopes = space.slopes(seen, grads)
        clean = space.state(seen)
    with torch.enable_grad():
        cut = _Cut(space)
        with space.model.hooked(cut.readers()):
            metric = pairs.measure(space.passes.run(pairs.clean)).sum()
        # What a unit carries, times how much the metric depends on it by whatever way.
        live = space.contrast(cut.state(), [torch.zeros_like(tensor) for tensor in clean], slopes).sum(0)
        received = [live[unit] for unit in units.tolist()]
        columns = [cut.effects(some, clean, corrupted)[units] for some in [*received, metric]]
    return torch.stack(columns, dim=1)


class _Cut:
    """A pass in which whatever units write is a new beginning: gradients reach the units before, and go no further."""

    def __init__(self, space: NodeSpace):
        self.space = space
        self.leaves: Seen = {}
        # Behind the cut; at hooks that are only read, as they are.
        self._seen: Seen = {}
        self._states: dict[str, State] = {}

    def readers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """What to hook the model with."""
        writers = {part.hook_out: self._cutter(part) for part in self.space.parts}
        return {hook: writers.get(hook) or self._keeper(hook) for hook in self.space.hooks}

    def _cutter(self, part: Part) -> Callable[[Tensor], Tensor]:
        def cut(y: Tensor) -> Tensor:
            y = y.clone()
            x = y if part.hook_in == part.hook_out else self._seen[part.hook_in]
            self._states[part.name] = part.state(x, y)
            # A transcoder's skip, or an error that is no node: direct paths lead through it.
            past = part.past(x, y, self._states[part.name])
            self.leaves[part.hook_out] = leaf = y.detach().requires_grad_(True)
            self._seen[part.hook_out] = leaf + (past - past.detach())
            # Modules above may write into what they get.
            return self._seen[part.hook_out].clone()

        return cut

    def _keeper(self, hook: str) -> Callable[[Tensor], None]:
        return lambda x: self._seen.update({hook: x.clone()})

    def state(self) -> State:
        """What units carry, as functions of what those before them write."""
        return [tensor for part in self.space.parts for tensor in self._states[part.name]]

    def effects(self, received: Tensor, clean: State, corrupted: State) -> Float[Tensor, " units"]:
        """By how much a number falls if units are taken from the corrupted run, along direct paths, all pairs together."""
        if not received.requires_grad:
            # Nothing lies before the first part.
            return torch.zeros(self.space.size, device=received.device)
        self.space.passes.backwards += 1
        found = torch.autograd.grad(received, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        grads = {
            hook: torch.zeros_like(leaf) if grad is None else grad
            for (hook, leaf), grad in zip(self.leaves.items(), found, strict=True)
        }
        with torch.no_grad():
            return self.space.contrast(clean, corrupted, self.space.slopes({}, grads)).sum(0)
