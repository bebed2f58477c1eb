"""Attention of a pruned graph: the heads that carry its edges, and why those heads attend where they do."""

from dataclasses import dataclass

import torch

from .attention_scores import ScorePlace, ScoreTerm, attention_scores, source_node
from .edge_heads import HeadPart, edge_heads
from .edges import MAX_NUMBERS
from .graph import AttributionGraph, GraphNode
from .local_replacement_model import LocalReplacement
from .pruning import SMALLEST_SUM, Pruned, normalised_influence

HEADS_PER_EDGE, SCORES, TERMS = 3, 24, 6


@dataclass(frozen=True)
class CarriedEdge:
    """The part of an edge that passes no head, and its largest parts by last head."""

    direct: float
    heads: tuple[HeadPart, ...]


@dataclass(frozen=True)
class ExplainedScore:
    """An attention score with its largest terms; ``rest`` is the sum of all others.

    ``influence`` is the share of the influence of the shown edges that their listed heads carry here. Sources of terms are
    described by ``GraphNode``, None is the constant: they need not be among the shown nodes.
    """

    place: ScorePlace
    influence: float
    weight: float
    score: float
    cap: float | None
    terms: tuple[tuple[GraphNode | None, GraphNode | None, float], ...]
    rest: float


@dataclass(frozen=True)
class GraphAttention:
    """Heads of the kept edges, by numbers of target and source, and the scores of the places that carry most influence."""

    edges: dict[tuple[int, int], CarriedEdge]
    scores: tuple[ExplainedScore, ...]


@torch.no_grad()
def graph_attention(
    local: LocalReplacement,
    graph: AttributionGraph,
    pruned: Pruned,
    heads_per_edge: int = HEADS_PER_EDGE,
    n_scores: int = SCORES,
    n_terms: int = TERMS,
    max_numbers: int = MAX_NUMBERS,
) -> GraphAttention:
    """Return the heads that carry the kept edges, and the decomposed scores of the most influential ones."""
    kept = pruned.nodes.nonzero()[:, 0]
    targets = kept[(kept < graph.latents.stop) | (kept >= graph.logits.start)]
    sources = kept[kept < graph.logits.start]
    found = edge_heads(local, graph, targets, sources, heads_per_edge, max_numbers)
    strength = normalised_influence(graph.adjacency) * (graph.influence + graph.weights)[:, None]
    positions = [graph.node(number).position for number in targets.tolist()]
    edges: dict[tuple[int, int], CarriedEdge] = {}
    carried: dict[ScorePlace, float] = {}
    for row, column in pruned.edges[targets][:, sources].nonzero().tolist():
        target, source = int(targets[row]), int(sources[column])
        parts = found.parts(row, column)
        edges[target, source] = CarriedEdge(float(found.direct[row, column]), tuple(parts))
        scale = float(strength[target, source] / found.magnitudes[row, column].clamp_min(SMALLEST_SUM))
        for part in parts:
            place = ScorePlace(part.layer, part.head, positions[row], part.key)
            carried[place] = carried.get(place, 0.0) + abs(part.weight) * scale
    best = sorted(carried, key=lambda place: (-carried[place], place))[:n_scores]
    total = max(float(strength[pruned.edges].sum()), SMALLEST_SUM)
    scores = []
    for score in attention_scores(local, best, max_numbers):
        terms = score.largest(n_terms, max_numbers)
        described = tuple((_described(local, term, 0), _described(local, term, 1), term.value) for term in terms)
        rest = score.score - sum(term.value for term in terms)
        share = carried[score.place] / total
        scores.append(ExplainedScore(score.place, share, score.weight, score.score, score.cap, described, rest))
    return GraphAttention(edges, tuple(scores))


def _described(local: LocalReplacement, term: ScoreTerm, side: int) -> GraphNode | None:
    number = term[side]
    return None if number is None else source_node(local, int(number))
