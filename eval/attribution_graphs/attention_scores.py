"""QK attribution: attention scores on a prompt as sums over pairs of sources, one of the query and one of the key position.

A score is bilinear in the stream at its query and at its key position. With attention patterns of earlier layers and all norm
denominators frozen (those of query and key norms too), each of the two is a sum over the graph's sources: active latents,
errors, tokens, and a constant, which collects the biases and what is written at the leading positions that are left out. The
products of all pairs add up to the score. A soft cap on scores (Gemma 2) comes after the sum: scores here are those before it.

Source: Ameisen, Lindsey et al. 2025, "Circuit Tracing", and Kamath, Ameisen et al. 2025, "Tracing Attention Computation Through
Feature Interactions", which decompose scores over features in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...training.activations.attention_scores import AttentionRule, attention_rule
from .edges import MAX_NUMBERS, Edges, targets_within
from .graph import GraphNode
from .local_replacement_model import LocalReplacement

# Largest difference of a recomputed attention weight from the recorded one; patterns are computed in half or single precision.
TOLERANCE = 0.02


class ScorePlace(NamedTuple):
    """One attention weight: a head's from a query position to a key position."""

    layer: int
    head: int
    query: int
    key: int


class ScoreTerm(NamedTuple):
    """Part of a score that a source at the query and one at the key position make together; None is the constant."""

    query: int | None
    key: int | None
    value: float


@dataclass(frozen=True)
class AttentionScore:
    """The score of one place, before the soft cap (``cap``, if any), and its sources' parts of the query and of the key.

    The columns are the sources, in the order of ``source_node``, and the constant, which is last. ``weight`` is the attention
    weight.
    """

    place: ScorePlace
    score: float
    weight: float
    cap: float | None
    scaling: float
    query_parts: Float[Tensor, "d_head sources"]
    key_parts: Float[Tensor, "d_head sources"]

    def terms(self) -> Float[Tensor, "sources sources"]:
        """Return the term of every pair: a row per source of the query, a column per source of the key."""
        return self.scaling * self.query_parts.T @ self.key_parts

    def by_query(self) -> Float[Tensor, " sources"]:
        """Return what each source of the query contributes, with the whole key."""
        return self.scaling * self.query_parts.T @ self.key_parts.sum(1)

    def by_key(self) -> Float[Tensor, " sources"]:
        """Return what each source of the key contributes, with the whole query."""
        return self.scaling * self.key_parts.T @ self.query_parts.sum(1)

    def largest(self, count: int, max_numbers: int = MAX_NUMBERS) -> list[ScoreTerm]:
        """Return the nonzero terms of greatest magnitude, in descending order."""
        columns = self.key_parts.shape[1]
        values, places = self.query_parts.new_zeros(0), torch.zeros(0, dtype=torch.long, device=self.query_parts.device)
        for rows in torch.arange(columns, device=places.device).split(max(1, max_numbers // columns)):
            terms = (self.scaling * self.query_parts[:, rows].T @ self.key_parts).flatten()
            best = terms.abs().topk(min(count, len(terms))).indices
            values, places = torch.cat([values, terms[best]]), torch.cat([places, rows[0] * columns + best])
        order = values.abs().argsort(descending=True, stable=True)[:count]
        found = []
        for place, value in zip(places[order].tolist(), values[order].tolist(), strict=True):
            query, key = (None if at == columns - 1 else at for at in divmod(place, columns))
            found += [ScoreTerm(query, key, value)] if value else []
        return found


@torch.no_grad()
def attention_scores(
    local: LocalReplacement, places: Sequence[tuple[int, int, int, int]], max_numbers: int = MAX_NUMBERS
) -> list[AttentionScore]:
    """Return the decomposed scores of (layer, head, query position, key position).

    Raises:
        ValueError: If a place does not exist or is masked, or the model's attention weights are not a softmax of scaled
            products of queries and keys.
    """
    found = [ScorePlace(*place) for place in places]
    for place in found:
        _require_place(local, place)
    rules = {layer: attention_rule(local.anatomy, local.trace, layer) for layer in {place.layer for place in found}}
    for row in dict.fromkeys((place.layer, place.head, place.query) for place in found):
        _require_softmax(local, rules[row[0]], *row[1:])
    sides = [
        *dict.fromkeys(("q", place.layer, place.head, place.query) for place in found),
        *dict.fromkeys(("k", place.layer, place.head, place.key) for place in found),
    ]
    parts: dict[tuple[str, int, int, int], Tensor] = {}
    # The d_head targets of a side stay together.
    at_once = max(1, targets_within(local, max_numbers, max_numbers) // local.anatomy.d_head)
    for start in range(0, len(sides), at_once):
        some = sides[start : start + at_once]
        parts |= dict(zip(some, _parts(local, rules, some), strict=True))
    scores = []
    for place in found:
        rule, query = rules[place.layer], parts["q", place.layer, place.head, place.query]
        key = parts["k", place.layer, place.head, place.key]
        score = float(rule.scaling * query.sum(1) @ key.sum(1))
        weight = float(local.trace.layers[place.layer].pattern[0, place.head, place.query, place.key])
        scores.append(AttentionScore(place, score, weight, rule.cap, rule.scaling, query, key))
    return scores


def source_node(local: LocalReplacement, number: int) -> GraphNode:
    """Return the description of a source by its number: active latents, then errors layer by layer, then tokens."""
    active, positions = local.active, len(local.token_ids)
    if number < len(active):
        return GraphNode("latent", int(active.positions[number]), int(active.layers[number]), int(active.latents[number]))
    layer, position = divmod(number - len(active), positions)
    if layer < local.anatomy.n_layers:
        return GraphNode("error", position, layer)
    return GraphNode("token", position, index=int(local.token_ids[position]))


def _parts(
    local: LocalReplacement, rules: dict[int, AttentionRule], sides: Sequence[tuple[str, int, int, int]]
) -> list[Tensor]:
    """Return the sources' and the constant's parts of some queries and keys: ``(d_head, sources + 1)`` each."""
    readers = [rules[layer].reader(side, head, position) for side, layer, head, position in sides]
    d_head, device = local.anatomy.d_head, local.token_ids.device
    layers, positions = (
        torch.tensor([side[place] for side in sides], device=device).repeat_interleave(d_head) for place in (1, 3)
    )
    edges = Edges(local, len(layers))
    slopes = local.slopes(layers, positions, torch.cat([reader.matrix for reader in readers]), edges.visit, at_attention=True)
    constants = slopes.constants + torch.cat([reader.constant for reader in readers])
    return list(torch.cat([edges.whole(slopes), constants[:, None]], 1).split(d_head))


def _require_place(local: LocalReplacement, place: ScorePlace) -> None:
    sizes = {"layer": local.anatomy.n_layers, "head": local.anatomy.n_heads}
    sizes |= dict.fromkeys(("query", "key"), len(local.token_ids))
    for name, size in sizes.items():
        if not 0 <= getattr(place, name) < size:
            raise ValueError(f"places: {name}: expected 0 to {size - 1}, got {getattr(place, name)}.")
    if not local.trace.layers[place.layer].pattern[0, place.head, place.query, place.key]:
        raise ValueError(
            f"places: expected a key position that head {place.head} of layer {place.layer} sees from position {place.query}, "
            f"got {place.key}, whose attention weight is zero."
        )


def _require_softmax(local: LocalReplacement, rule: AttentionRule, head: int, query: int) -> None:
    """Raise ``ValueError`` if the recorded weights of a row are not what the scores give."""
    weights = local.trace.layers[rule.layer].pattern[0, head, query]
    seen = weights > 0
    expected = torch.zeros_like(weights)
    expected[seen] = rule.capped(rule.scores(head, query)[seen]).softmax(0)
    gap = float((expected - weights).abs().max())
    if gap > TOLERANCE:
        raise ValueError(
            f"{local.anatomy.model.id}: expected attention weights that are a softmax of scaled products of queries and "
            f"keys, got weights of layer {rule.layer}, head {head} at position {query} that differ by {gap:.2g}. Its scores "
            "cannot be decomposed; leave attention out of its graphs."
        )
