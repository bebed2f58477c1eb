"""Forward passes of the full model, each with a set of the graph's latents ablated at their positions."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .edges import MAX_NUMBERS
from .graph import AttributionGraph, target_vectors
from .interventions import runs_within
from .local_replacement_model import LocalReplacement


class AblatedRuns:
    """The model on the graph's prompt with what sets of latents write left out; nothing else is frozen.

    What an ablated latent would write in the run itself is subtracted from the MLP outputs, so that errors and all other
    latents respond as the model has them. ``passes`` counts the runs, each a forward pass of the prompt.
    """

    def __init__(self, local: LocalReplacement, graph: AttributionGraph, max_numbers: int = MAX_NUMBERS):
        self.local, self.graph, self.passes = local, graph, 0
        self._at_once = runs_within(local, max_numbers)
        self._weights = graph.weights[graph.logits] / graph.weights[graph.logits].sum()
        self._vectors = target_vectors(local, graph.targets)

    @torch.no_grad()
    def metric(self, ablated: Bool[Tensor, "runs latents"]) -> Float[Tensor, " runs"]:
        """Return the targets' weighted mean in each run: logits minus the mean logit or the foil's, by starting influence."""
        self.passes += len(ablated)
        return torch.cat([self._targets(some) for some in ablated.split(self._at_once)]) @ self._weights

    def _targets(self, ablated: Bool[Tensor, "runs latents"]) -> Float[Tensor, "runs targets"]:
        local, runs = self.local, len(ablated)
        changes = local.errors.new_zeros(runs, *local.errors.shape)
        last: list[Tensor] = []
        readers: dict[str, Callable[[Tensor], Tensor | None]] = {}
        for layer in local.replacement.layers:
            reads, writes = local.replacement.hooks(layer)
            readers[reads] = self._reader(layer, ablated, changes)
            readers[writes] = self._writer(layer, changes)
        final = local.anatomy.final_norm_hook
        # Cloned: later modules may modify it in place.
        with local.anatomy.model.hooked(readers | {final: lambda x: last.append(x[:, -1].clone())}):
            local.anatomy.model.logits(local.token_ids.expand(runs, -1))
        norm = local.anatomy.final_norm
        return norm.apply(last[0], norm.scale(last[0])) @ self._vectors.T

    def _reader(self, layer: int, ablated: Tensor, changes: Tensor) -> Callable[[Tensor], None]:
        """Return a reader that subtracts what the layer's ablated latents write from ``changes``."""
        replacement, active = self.local.replacement, self.graph.active
        here = (active.layers == layer).nonzero()[:, 0]
        some, written = active.where(here), list(replacement.written(layer))

        def read(x: Tensor) -> None:
            if not len(here) or not bool(ablated[:, here].any()):
                return
            latents, places = some.latents.unique(return_inverse=True)
            values = replacement.encode(layer, x.flatten(0, 1)).columns(latents).unflatten(0, x.shape[:2])
            lost = values[:, some.positions, places].to(changes) * ablated[:, here]
            for _, position, which in some.groups():
                atoms = replacement.writes(layer, some.latents[which])
                changes[:, written, position] -= torch.einsum("rn,nwm->rwm", lost[:, which], atoms)

        return read

    def _writer(self, layer: int, changes: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: y + changes[:, layer].to(y)
