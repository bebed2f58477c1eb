"""Edges between circuit nodes: the part of a unit's effect on the metric that passes directly through another unit.

Source: sparse feature circuits, Marks et al. 2024, arXiv:2403.19647, section 3. There the gradients that edges are multiplied
with are averaged over pairs; here every pair has its own.
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
    """Weighted edges between units; receiver number ``n_units`` is the metric itself.

    The weight is the linear estimate of the drop in the metric when the sender is patched from the corrupted run along this
    edge alone. The weights of a sender's edges sum to its attribution patching score, if all units that it reaches are kept as
    receivers.
    """

    n_units: int
    senders: Int[Tensor, " edges"]
    receivers: Int[Tensor, " edges"]
    weights: Float[Tensor, " edges"]
    cost: Cost

    def above(self, threshold: float) -> "FeatureEdges":
        """Return the edges whose absolute weight exceeds ``threshold``."""
        strong = self.weights.abs() > threshold
        return replace(self, senders=self.senders[strong], receivers=self.receivers[strong], weights=self.weights[strong])

    def describe(self, names: list[str]) -> list[tuple[str, str, float]]:
        """Return (sender, receiver, weight) of every edge by unit name, largest absolute weight first."""
        every = [*names, "metric"]
        order = self.weights.abs().argsort(descending=True, stable=True)
        rows = zip(self.senders[order].tolist(), self.receivers[order].tolist(), self.weights[order].tolist(), strict=True)
        return [(every[sender], every[receiver], weight) for sender, receiver, weight in rows]


def feature_edges(
    space: NodeSpace, pairs: PromptPairs, kept: Bool[Tensor, " units"], threshold: float = 0.0, batch: int = BATCH
) -> FeatureEdges:
    """Compute the edges among the ``kept`` units and from them to the metric, averaged over pairs.

    An edge is the direct path: it passes through no other unit of the space, kept or not. The residual stream flows between
    parts, including attention and norms, unless a part sits in the stream itself; there only signals outside the units pass.
    Each batch costs three forward passes, two backward passes, and one more backward pass per kept unit.

    Raises:
        ValueError: If ``kept`` does not have one entry per unit.
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
    """Return edge weights summed over pairs; the last receiver is the metric."""
    _, corrupted = space.see(pairs.corrupted)
    seen, grads = space.passes.gradients(pairs.clean, space.hooks, pairs.measure)
    with torch.no_grad():
        slopes = space.slopes(seen, grads)
        clean = space.state(seen)
    with torch.enable_grad():
        cut = _Cut(space)
        with space.model.hooked(cut.readers()):
            metric = pairs.measure(space.passes.run(pairs.clean)).sum()
        # A unit's activation times the total gradient of the metric, along all paths.
        live = space.contrast(cut.state(), [torch.zeros_like(tensor) for tensor in clean], slopes).sum(0)
        received = [live[unit] for unit in units.tolist()]
        columns = [cut.effects(some, clean, corrupted)[units] for some in [*received, metric]]
    return torch.stack(columns, dim=1)


class _Cut:
    """Forward pass in which every part's output is a new leaf: gradients reach the nearest upstream units and stop there."""

    def __init__(self, space: NodeSpace):
        self.space = space
        self.leaves: Seen = {}
        # Activations after the cut; unchanged at hooks that are only read.
        self._seen: Seen = {}
        self._states: dict[str, State] = {}

    def readers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """Return the functions to hook the model with."""
        writers = {part.hook_out: self._cutter(part) for part in self.space.parts}
        return {hook: writers.get(hook) or self._keeper(hook) for hook in self.space.hooks}

    def _cutter(self, part: Part) -> Callable[[Tensor], Tensor]:
        def cut(y: Tensor) -> Tensor:
            y = y.clone()
            x = y if part.hook_in == part.hook_out else self._seen[part.hook_in]
            self._states[part.name] = part.state(x, y)
            # Direct paths run through a transcoder's skip path, and through errors that are not nodes.
            past = part.past(x, y, self._states[part.name])
            self.leaves[part.hook_out] = leaf = y.detach().requires_grad_(True)
            self._seen[part.hook_out] = leaf + (past - past.detach())
            # Downstream modules may write to their inputs in place.
            return self._seen[part.hook_out].clone()

        return cut

    def _keeper(self, hook: str) -> Callable[[Tensor], None]:
        return lambda x: self._seen.update({hook: x.clone()})

    def state(self) -> State:
        """Return unit activations as functions of the outputs of upstream units."""
        return [tensor for part in self.space.parts for tensor in self._states[part.name]]

    def effects(self, received: Tensor, clean: State, corrupted: State) -> Float[Tensor, " units"]:
        """Return the drop of a scalar when units are patched from the corrupted run along direct paths, summed over pairs."""
        if not received.requires_grad:
            # No unit precedes the first part.
            return torch.zeros(self.space.size, device=received.device)
        self.space.passes.backwards += 1
        found = torch.autograd.grad(received, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        grads = {
            hook: torch.zeros_like(leaf) if grad is None else grad
            for (hook, leaf), grad in zip(self.leaves.items(), found, strict=True)
        }
        with torch.no_grad():
            return self.space.contrast(clean, corrupted, self.space.slopes({}, grads)).sum(0)
