"""Attention heads that carry the edges of an attribution graph.

An edge is the sum over all paths from its source to its target through the residual stream, skip paths and attention with this
prompt's patterns. Each path either passes no head or has a last one, which attends from the target's position to some position:
an edge is the sum of its direct part and of one part per last head and position attended to. A path may pass other heads before
its last; where it passes one only, that position is the source's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .edges import MAX_NUMBERS
from .graph import AttributionGraph, target_vectors
from .local_replacement_model import LocalReplacement

TARGETS_AT_ONCE = 64


class HeadPart(NamedTuple):
    """Part of an edge that a head carries last, from a position (``key``) to the target's."""

    layer: int
    head: int
    key: int
    weight: float


@dataclass(frozen=True)
class EdgeHeads:
    """Parts of the edges between some targets and sources, by node number.

    ``direct`` passes no head. ``weights`` are the parts of greatest magnitude, of heads ``places`` (in the order of layer, head
    and position); ``magnitudes`` are the sums of all parts' magnitudes, the direct one's included.
    """

    targets: Int[Tensor, " targets"]
    sources: Int[Tensor, " sources"]
    n_heads: int
    n_positions: int
    direct: Float[Tensor, "targets sources"]
    weights: Float[Tensor, "targets sources count"]
    places: Int[Tensor, "targets sources count"]
    magnitudes: Float[Tensor, "targets sources"]

    def parts(self, target: int, source: int) -> list[HeadPart]:
        """Return the heads of one edge, given by its places among the targets and sources, largest part first."""
        found = []
        for weight, place in zip(self.weights[target, source].tolist(), self.places[target, source].tolist(), strict=True):
            layer, rest = divmod(place, self.n_heads * self.n_positions)
            if weight:
                head, key = divmod(rest, self.n_positions)
                found.append(HeadPart(layer, head, key, weight))
        return found


@torch.no_grad()
def edge_heads(
    local: LocalReplacement,
    graph: AttributionGraph,
    targets: Int[Tensor, " targets"],
    sources: Int[Tensor, " sources"],
    count: int = 3,
    max_numbers: int = MAX_NUMBERS,
) -> EdgeHeads:
    """Return the parts of edges by last head, the ``count`` largest of each edge.

    Args:
        targets: Latents and logits of the graph, by node number.
        sources: Latents, errors and tokens of the graph, by node number.

    Raises:
        ValueError: If a node is of another kind, or ``count`` is below 1.
    """
    _require_kinds(graph, targets, sources)
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}.")
    anatomy, positions = local.anatomy, len(local.token_ids)
    count = min(count, anatomy.n_layers * anatomy.n_heads * positions)
    direct = graph.adjacency.new_zeros(len(targets), len(sources))
    weights, magnitudes = direct.new_zeros(*direct.shape, count), direct.clone()
    places = torch.zeros_like(weights, dtype=torch.long)
    per_edge = anatomy.n_heads * positions + count
    per_source = max(
        positions * max(anatomy.d_model, anatomy.n_heads * anatomy.d_head), min(TARGETS_AT_ONCE, len(targets)) * per_edge
    )
    rows = [_TargetReaders(local, graph, some) for some in targets.split(TARGETS_AT_ONCE)]
    for columns in torch.arange(len(sources), device=sources.device).split(max(1, max_numbers // per_source)):
        written = _Written(local, graph, sources[columns])
        for start, some in zip(range(0, len(targets), TARGETS_AT_ONCE), rows, strict=True):
            direct[start : start + TARGETS_AT_ONCE, columns] = some.direct(written)
        for layer, v in _values(local, written):
            pattern = local.trace.layers[layer].pattern[0]
            for start, some in zip(range(0, len(targets), TARGETS_AT_ONCE), rows, strict=True):
                here = slice(start, start + len(some.positions))
                parts = (
                    torch.einsum("thd,sphd->tshp", some.heads[layer], v) * pattern[:, some.positions].transpose(0, 1)[:, None]
                )
                parts = parts.flatten(2)
                magnitudes[here, columns] += parts.abs().sum(2)
                ids = torch.arange(parts.shape[2], device=parts.device) + layer * parts.shape[2]
                found = torch.cat([weights[here, columns], parts], 2)
                known = torch.cat([places[here, columns], ids.expand_as(parts)], 2)
                best = found.abs().topk(count, dim=2).indices
                weights[here, columns], places[here, columns] = found.gather(2, best), known.gather(2, best)
    magnitudes += direct.abs()
    return EdgeHeads(targets, sources, anatomy.n_heads, positions, direct, weights, places, magnitudes)


class _Written:
    """Vectors that sources write: to the initial stream and to each layer's MLP output, at one position each."""

    def __init__(self, local: LocalReplacement, graph: AttributionGraph, sources: Int[Tensor, " sources"]):
        width, n = local.anatomy.d_model, local.anatomy.n_layers
        nodes = [graph.node(number) for number in sources.tolist()]
        self.positions = torch.tensor([node.position for node in nodes], device=sources.device)
        self.initial = local.errors.new_zeros(len(nodes), width)
        self.layers = local.errors.new_zeros(len(nodes), n, width)
        for place, (number, node) in enumerate(zip(sources.tolist(), nodes, strict=True)):
            if node.kind == "token":
                self.initial[place] = local.embeddings[node.position]
            elif node.kind == "error":
                assert node.layer is not None
                self.layers[place, node.layer] = local.errors[node.layer, node.position]
            else:
                assert node.layer is not None
                atoms = local.replacement.writes(node.layer, graph.active.latents[number : number + 1])[0]
                self.layers[place, list(local.replacement.written(node.layer))] = atoms * graph.active.values[number]

    def spread(self, vectors: Float[Tensor, "sources d_model"], positions: int) -> Float[Tensor, "sources positions d_model"]:
        """Return vectors placed at the sources' positions."""
        stream = vectors.new_zeros(len(vectors), positions, vectors.shape[1])
        stream[torch.arange(len(vectors), device=vectors.device), self.positions] = vectors
        return stream


class _TargetReaders:
    """Gradients of targets at their own positions along paths without heads: on what heads and MLPs write, and on the start."""

    def __init__(self, local: LocalReplacement, graph: AttributionGraph, targets: Int[Tensor, " targets"]):
        anatomy, trace, n = local.anatomy, local.trace, local.anatomy.n_layers
        latents = targets[targets < len(graph.active)]
        vectors = torch.cat(
            [
                local.readers(graph.active.where(latents))[0],
                target_vectors(local, [graph.targets[i - graph.logits.start] for i in targets[len(latents) :].tolist()])
                if len(latents) < len(targets)
                else local.errors.new_zeros(0, anatomy.d_model),
            ]
        )
        last = targets.new_full((len(targets) - len(latents),), len(local.token_ids) - 1)
        self.positions = torch.cat([graph.active.positions[latents], last])
        layers = torch.cat([graph.active.layers[latents], torch.full_like(last, n)])
        here = self.positions
        grad = torch.where((layers == n)[:, None], anatomy.final_norm.fold(vectors) / trace.last_scale[0, here, None], 0.0)
        self.heads: dict[int, Tensor] = {}
        self.mlps: dict[int, Tensor] = {}
        for layer in reversed(range(n)):
            at, weights = trace.layers[layer], anatomy.layers[layer]
            post = local.mlp_post_norm(layer)
            self.mlps[layer] = grad if post is None else post.norm.fold(grad) / post.scale[here, None]
            into = torch.where((layers == layer)[:, None], vectors, 0.0)
            if layer in local.skips:
                into = into + torch.where((here >= local.exclude_leading)[:, None], self.mlps[layer] @ local.skips[layer], 0.0)
            to_mid = weights.mlp_norm.fold(into) / at.mlp_scale[0, here, None]
            heads = grad if anatomy.parallel else grad + to_mid
            post = local.attention_post_norm(layer)
            heads = heads if post is None else post.norm.fold(heads) / post.scale[here, None]
            self.heads[layer] = torch.einsum("tm,hdm->thd", heads, weights.W_O)
            grad = grad + to_mid
        self.initial = grad

    def direct(self, written: _Written) -> Float[Tensor, "targets sources"]:
        """Return the parts of the edges that pass no head."""
        parts = self.initial @ written.initial.T
        for layer, grads in self.mlps.items():
            parts = parts + grads @ written.layers[:, layer].T
        return parts * (self.positions[:, None] == written.positions)


def _values(
    local: LocalReplacement, written: _Written
) -> Iterator[tuple[int, Float[Tensor, "sources positions n_heads d_head"]]]:
    """Yield every layer and what the sources add to the values of its heads, with everything else frozen."""
    anatomy, positions = local.anatomy, len(local.token_ids)
    stream = written.spread(written.initial, positions)
    for layer in range(anatomy.n_layers):
        at, weights = local.trace.layers[layer], anatomy.layers[layer]
        normed = weights.attention_norm.centre(stream) / at.attention_scale[0, :, None] * weights.attention_norm.weight
        v = torch.einsum("spm,hdm->sphd", normed, weights.W_V)
        yield layer, v
        z = torch.einsum("htp,sphd->sthd", at.pattern[0], v)
        attention = torch.einsum("sthd,hdm->stm", z, weights.W_O)
        post = local.attention_post_norm(layer)
        attention = attention if post is None else post.carry(attention)
        mid = stream if anatomy.parallel else stream + attention
        moved = written.spread(written.layers[:, layer], positions)
        if layer in local.skips:
            x = weights.mlp_norm.centre(mid) / at.mlp_scale[0, :, None] * weights.mlp_norm.weight
            moved[:, local.exclude_leading :] += x[:, local.exclude_leading :] @ local.skips[layer].T
        post = local.mlp_post_norm(layer)
        stream = stream + attention + (moved if post is None else post.carry(moved))


def _require_kinds(graph: AttributionGraph, targets: Tensor, sources: Tensor) -> None:
    read = ((targets >= 0) & (targets < graph.latents.stop)) | ((targets >= graph.logits.start) & (targets < graph.n_nodes))
    if not bool(read.all()) or not torch.equal(targets, targets.sort().values):
        raise ValueError(f"targets: expected ascending numbers of latents and logits of the graph, got {targets.tolist()}.")
    if not bool(((sources >= 0) & (sources < graph.logits.start)).all()):
        raise ValueError(f"sources: expected numbers of latents, errors and tokens of the graph, got {sources.tolist()}.")
