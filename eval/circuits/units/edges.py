"""Edges as units: one component's contribution to another's input, patched while all other receivers read the original.

A receiver's input is the residual stream before its norm. For every ablated edge the sender's replacement output minus its
current output is added to that input; all activations are recomputed, so edges interact as they do in the model. Queries, keys
and values of a head are separate receivers, also in grouped-query attention: the graph is then that of the same model with keys
and values copied for every head. Terms that belong to no sender (biases of attention outputs) are never ablated. With all edges
kept the output is bit-identical.

Source: edge attribution patching, Syed et al. 2023, arXiv:2310.10348; evaluation as in Mueller et al. 2025, arXiv:2504.13151.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ....training.activations.architecture import Architecture, Norm
from ....training.activations.model import LanguageModel
from ....training.activations.ungrouped_attention import ungrouped
from .edge_list import SIDES, EdgeList, Stage
from .passes import Seen
from .space import Space, State


class _Hooks:
    """Hooks of one block: inputs and outputs of its heads and its MLP; ``mlp`` is None if there is no MLP."""

    def __init__(self, anatomy: Architecture, layer: int):
        block = anatomy.blocks[layer]
        self.stream = f"{anatomy.attention_norm_path(layer)}:in"
        self.inputs = anatomy.head_inputs(layer)
        self.mixed = f"{block.attention_projection}:in"
        self.mlp = None if block.mlp is None else (f"{block.mlp_norm}:in", f"{block.mlp[0]}:in", f"{block.mlp[1]}:out")

    def all(self) -> Iterator[str]:
        """Yield every hook, in no particular order."""
        yield from (self.stream, *{place.hook for place in self.inputs.values()}, self.mixed, *(self.mlp or ()))


class EdgeSpace(Space):
    """All edges of a model that ``Architecture`` supports; ``edges`` lists them.

    A state holds the embedding, then for each layer the attention-weighted values of its heads (the inputs of ``W_O``) and the
    MLP output. Slopes are gradients with respect to receiver inputs, ``(pairs, positions, receivers, d_model)`` for every stage
    of ``edges``.

    Raises:
        ValueError: If the architecture is not supported.
    """

    def __init__(self, model: LanguageModel):
        self.anatomy = anatomy = Architecture(model)
        super().__init__(ungrouped(anatomy))
        self._frozen_norms = False
        mlps = [block.mlp is not None for block in anatomy.blocks]
        self.edges = EdgeList(anatomy.n_layers, anatomy.n_heads, mlps, anatomy.parallel)
        self.groups = self.edges.groups
        self.at = [_Hooks(anatomy, layer) for layer in range(anatomy.n_layers)]
        self.hooks = (*(hook for at in self.at for hook in at.all()), anatomy.final_norm_hook)

    @property
    def size(self) -> int:
        return len(self.edges)

    def names(self) -> list[str]:
        return self.edges.names()

    def state(self, seen: Seen) -> State:
        found = [seen[self.at[0].stream]]
        for at in self.at:
            found.append(seen[at.mixed])
            if at.mlp is not None:
                found.append(seen[at.mlp[2]])
        return found

    def writes(self, state: State) -> Float[Tensor, "pairs positions senders d_model"]:
        """Return every sender's output to the residual stream."""
        rest = iter(state)
        found = [next(rest)[:, :, None]]
        for layer, at in enumerate(self.at):
            found.append(self.head_writes(layer, next(rest)))
            if at.mlp is not None:
                found.append(next(rest)[:, :, None])
        return torch.cat(found, dim=2)

    def head_writes(
        self, layer: int, mixed: Float[Tensor, "pairs positions width"]
    ) -> Float[Tensor, "pairs positions n_heads d_model"]:
        """Return the outputs of a layer's heads from their attention-weighted values."""
        by_head = mixed.unflatten(-1, (self.anatomy.n_heads, self.anatomy.d_head))
        return torch.einsum("pthc,hcd->pthd", by_head, self.anatomy.layers[layer].W_O.to(mixed))

    def streams(self, seen: Seen) -> list[Float[Tensor, "pairs positions d_model"]]:
        """Return the residual stream that the receivers of every stage read, before their norm."""
        found = []
        for at in self.at:
            found.append(seen[at.stream])
            if at.mlp is not None:
                found.append(seen[at.mlp[0]])
        return [*found, seen[self.anatomy.final_norm_hook]]

    def slopes(self, seen: Seen, grads: Seen) -> State:
        found = []
        for at, layer in zip(self.at, self.anatomy.layers, strict=True):
            weights = (layer.W_Q, layer.W_K, layer.W_V)
            sides = []
            for place, weight in zip(at.inputs.values(), weights, strict=True):
                grad = place.of(grads[place.hook])
                sides.append(torch.einsum("pthc,hcd->pthd", grad, weight.to(grad)))
            found.append(self._before(layer.attention_norm, seen[at.stream], torch.stack(sides, dim=3).flatten(2, 3)))
            if at.mlp is not None:
                stream, reads, _ = at.mlp
                found.append(self._before(layer.mlp_norm, seen[stream], grads[reads][:, :, None]))
        # Only the final norm reads this stream, so the gradient has already passed through it.
        return [*found, grads[self.anatomy.final_norm_hook][:, :, None]]

    @contextmanager
    def frozen_norms(self) -> Iterator[None]:
        self._frozen_norms = True
        try:
            yield
        finally:
            self._frozen_norms = False

    def _before(self, norm: Norm, stream: Tensor, grads: Tensor) -> Float[Tensor, "pairs positions receivers d_model"]:
        if self._frozen_norms:
            return norm.fold(grads) / norm.scale(stream)[..., None, None]
        return norm.pull_back(stream[:, :, None], grads)

    def contrast(self, clean: State, corrupted: State, slopes: State) -> Float[Tensor, "pairs edges"]:
        difference = self.writes([a - b for a, b in zip(clean, corrupted, strict=True)])
        found = []
        for stage, slope in zip(self.edges.stages, slopes, strict=True):
            products = torch.einsum("ptsd,ptrd->prs", difference[:, :, : stage.n_senders], slope)
            found.append(products.flatten(1))
        return torch.cat(found, dim=1)

    def distance(self, a: State, b: State) -> Float[Tensor, "pairs edges"]:
        difference = self.writes([x - y for x, y in zip(a, b, strict=True)])
        return difference.pow(2).sum((1, 3)).sqrt()[:, self.edges.sources]

    def run(self, token_ids: Int[Tensor, "pairs positions"], kept: Tensor, filler: State) -> Tensor:
        absent = 1.0 - kept.to(self.model.device).to(self.anatomy.W_E.dtype)
        with self.model.hooked(_Replacement(self, absent.view(-1, self.size), filler).readers()):
            return self.passes.run(token_ids)


class _Replacement:
    """Forward pass with edges patched; ``lacking`` is the replacement output minus the current output of the senders so far."""

    def __init__(self, space: EdgeSpace, absent: Float[Tensor, "rows edges"], filler: State):
        self.space, self.absent, self.filler = space, absent, iter(filler)
        self.stream = self.lacking = absent.new_zeros(0)

    def readers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """Return the hook functions. Attention runs before the MLP in a pass, also in parallel blocks."""
        anatomy, stages = self.space.anatomy, iter(self.space.edges.stages)
        found: dict[str, Callable[[Tensor], Tensor | None]] = {}
        for layer, at in enumerate(self.space.at):
            found[at.stream] = self._keep_stream
            stage = next(stages)
            for hook in dict.fromkeys(place.hook for place in at.inputs.values()):
                found[hook] = self._head_reader(layer, hook, stage)
            found[at.mixed] = self._head_writer(layer)
            if at.mlp is not None:
                stream, reads, writes = at.mlp
                found |= {stream: self._keep_stream, reads: self._mlp_reader(layer, next(stages)), writes: self._note}
        # The stream before the first block is the embedding.
        found[self.space.at[0].stream] = self._note_embedding
        last = next(stages)
        found[anatomy.final_norm_hook] = lambda x: self._changed(x[:, :, None], last.of(self.absent))[:, :, 0]
        return found

    def _keep_stream(self, x: Tensor) -> None:
        # Downstream modules may write to their inputs in place.
        self.stream = x.clone()

    def _note_embedding(self, x: Tensor) -> None:
        self._keep_stream(x)
        self.lacking = (next(self.filler).to(x) - x)[:, :, None]

    def _note(self, x: Tensor) -> None:
        self.lacking = torch.cat([self.lacking, (next(self.filler).to(x) - x)[:, :, None]], dim=2)

    def _head_writer(self, layer: int) -> Callable[[Tensor], None]:
        def writer(mixed: Tensor) -> None:
            lacking = self.space.head_writes(layer, next(self.filler).to(mixed) - mixed)
            self.lacking = torch.cat([self.lacking, lacking], dim=2)

        return writer

    def _head_reader(self, layer: int, hook: str, stage: Stage) -> Callable[[Tensor], Tensor | None]:
        weights, norm = self.space.anatomy.layers[layer], self.space.anatomy.layers[layer].attention_norm
        by_head = stage.of(self.absent).unflatten(1, (-1, len(SIDES)))
        at_hook = [
            (place, weight, by_head[:, :, side])
            for side, (place, weight) in enumerate(
                zip(self.space.at[layer].inputs.values(), (weights.W_Q, weights.W_K, weights.W_V), strict=True)
            )
            if place.hook == hook
        ]

        def reader(x: Tensor) -> Tensor:
            x = x.clone()
            for place, weight, absent in at_hook:
                heads = _any_absent(absent)
                if len(heads):
                    change = self._beyond(norm, absent[:, heads])
                    place.of(x)[:, :, heads] += torch.einsum("pthd,hcd->pthc", change, weight[heads].to(x))
            return x

        return reader

    def _mlp_reader(self, layer: int, stage: Stage) -> Callable[[Tensor], Tensor]:
        absent, norm = stage.of(self.absent), self.space.anatomy.layers[layer].mlp_norm

        def reader(x: Tensor) -> Tensor:
            return x + self._beyond(norm, absent)[:, :, 0] if len(_any_absent(absent)) else x

        return reader

    def _beyond(
        self, norm: Norm, absent: Float[Tensor, "rows receivers senders"]
    ) -> Float[Tensor, "pairs positions receivers d_model"]:
        """Return the normalized input of every receiver minus the normalized stream: exactly zero if all edges are kept."""
        stream = self.stream[:, :, None]
        changed = self._changed(stream, absent)
        return norm.apply(changed, norm.scale(changed)) - norm.apply(stream, norm.scale(stream))

    def _changed(
        self, stream: Float[Tensor, "pairs positions 1 d_model"], absent: Float[Tensor, "rows receivers senders"]
    ) -> Float[Tensor, "pairs positions receivers d_model"]:
        return stream + absent[:, None] @ self.lacking[:, :, : absent.shape[2]]


def _any_absent(absent: Float[Tensor, "rows receivers senders"]) -> Int[Tensor, " some"]:
    """Return the receivers that lack an edge in any row, or all receivers if gradients flow to edges."""
    if absent.requires_grad:
        return torch.arange(absent.shape[1], device=absent.device)
    return absent.any(0).any(-1).nonzero().flatten()
