"""Edges as units: what one component reads of what another wrote, taken from elsewhere while all others read it as it is.

A receiver's input is the stream in front of its norm. Without some edges it is that stream plus, for each of them, what the
sender carries in the filler less what it carries now: as all is recomputed on the way, edges interact as they do in the model.
Queries, keys and values of a head are receivers of their own, also where heads share keys and values: the graph is then that
of the same model with a copy for every head. What belongs to no sender (biases of attention outputs) is never ablated. With
all edges kept nothing changes, not even in the last bit.

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
    """Where a block's streams are read, and where its heads and its MLP write; None for those of an MLP that is not there."""

    def __init__(self, anatomy: Architecture, layer: int):
        block = anatomy.blocks[layer]
        self.stream = f"{anatomy.attention_norm_path(layer)}:in"
        self.inputs = anatomy.head_inputs(layer)
        self.mixed = f"{block.attention_projection}:in"
        self.mlp = None if block.mlp is None else (f"{block.mlp_norm}:in", f"{block.mlp[0]}:in", f"{block.mlp[1]}:out")

    def all(self) -> Iterator[str]:
        """Every hook, in no order."""
        yield from (self.stream, *{place.hook for place in self.inputs.values()}, self.mixed, *(self.mlp or ()))


class EdgeSpace(Space):
    """All edges of a model that an ``Architecture`` can take apart; ``edges`` says which is which.

    States are the embedding, then of each layer the mixed values of its heads (which ``W_O`` turns into what they write) and
    what its MLP writes. Slopes are gradients by the inputs of receivers, ``(pairs, positions, receivers, d_model)`` for every
    stage of ``edges``.

    Raises:
        ValueError: If the architecture is not one of those.
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
        """What every sender writes to the stream."""
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
        """What the heads of a layer write, from the values they have mixed."""
        by_head = mixed.unflatten(-1, (self.anatomy.n_heads, self.anatomy.d_head))
        return torch.einsum("pthc,hcd->pthd", by_head, self.anatomy.layers[layer].W_O.to(mixed))

    def streams(self, seen: Seen) -> list[Float[Tensor, "pairs positions d_model"]]:
        """What the receivers of every stage read, in front of their norm."""
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
        # Nothing but the last norm reads there, so this gradient has come through it.
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
    """One pass in which edges are replaced. ``lacking`` is what senders so far write in the filler less what they do now."""

    def __init__(self, space: EdgeSpace, absent: Float[Tensor, "rows edges"], filler: State):
        self.space, self.absent, self.filler = space, absent, iter(filler)
        self.stream = self.lacking = absent.new_zeros(0)

    def readers(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """What to hook. A pass meets attention before the MLP, also where they are parallel."""
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
        # The stream in front of the first block is the embedding.
        found[self.space.at[0].stream] = self._note_embedding
        last = next(stages)
        found[anatomy.final_norm_hook] = lambda x: self._changed(x[:, :, None], last.of(self.absent))[:, :, 0]
        return found

    def _keep_stream(self, x: Tensor) -> None:
        # Modules above may write into what they get.
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
        """What the norm of every receiver's own input has beyond that of the stream: exactly nothing where all is kept."""
        stream = self.stream[:, :, None]
        changed = self._changed(stream, absent)
        return norm.apply(changed, norm.scale(changed)) - norm.apply(stream, norm.scale(stream))

    def _changed(
        self, stream: Float[Tensor, "pairs positions 1 d_model"], absent: Float[Tensor, "rows receivers senders"]
    ) -> Float[Tensor, "pairs positions receivers d_model"]:
        return stream + absent[:, None] @ self.lacking[:, :, : absent.shape[2]]


def _any_absent(absent: Float[Tensor, "rows receivers senders"]) -> Int[Tensor, " some"]:
    """Receivers that lack an edge in some row; where gradients flow to edges, all of them."""
    if absent.requires_grad:
        return torch.arange(absent.shape[1], device=absent.device)
    return absent.any(0).any(-1).nonzero().flatten()
