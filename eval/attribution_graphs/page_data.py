"""Data of an attribution graph's page: ``graph-page.json``, next to the graph in circuit-tracer's format."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .attention import ExplainedScore, GraphAttention
from .export import GraphLabels
from .graph import KINDS, AttributionGraph, GraphNode
from .labels import Note
from .levels import GraphLevel, LevelSearch
from .pruning import Pruned, normalised_influence

PAGE_VERSION = 1
DATA_FILE = "graph-page.json"
# Number of shades for the activations in a context.
SHADES = 100


def page_data(
    graph: AttributionGraph,
    pruned: Pruned,
    labels: GraphLabels,
    measures: Mapping[str, Any] | None = None,
    attention: GraphAttention | None = None,
    found: LevelSearch | None = None,
) -> dict[str, Any]:
    """Return key figures, nodes and edges; edges refer to nodes by list index and are sorted, strongest first.

    ``measures`` are further figures of the graph by name, as ``attribution_graph`` returns them. With ``attention``,
    ``edge_heads`` has the direct part and the heads of every edge, and ``attention_scores`` the decomposed scores. With the
    search ``found``, ``levels`` has its clusters and circuit.
    """
    kept = pruned.nodes.nonzero()[:, 0].tolist()
    places = {number: place for place, number in enumerate(kept)}
    reached = graph.influence + graph.weights
    shares = normalised_influence(graph.adjacency)
    targets, sources = pruned.edges.nonzero(as_tuple=True)
    strength = (shares * reached[:, None])[targets, sources]
    order = strength.argsort(descending=True, stable=True)
    columns = (targets[order], sources[order])
    edges = [
        [places[source], places[target], _rounded(weight), _rounded(share), _rounded(size)]
        for target, source, weight, share, size in zip(
            *(column.tolist() for column in (*columns, graph.adjacency[columns], shares[columns], strength[order])), strict=True
        )
    ]
    whole = float(graph.weights.sum())
    nodes = [_node(graph, number, float(reached[number]) / whole) for number in kept]
    scores = graph.scores()
    carried = None if attention is None else _carried(attention, zip(*(column.tolist() for column in columns), strict=True))
    return {
        "page_version": PAGE_VERSION,
        "model": labels.model,
        "transcoders": labels.checkpoint,
        "prompt": labels.prompt,
        "replacement_score": scores.replacement,
        "completeness_score": scores.completeness,
        "n_nodes_all": graph.n_nodes,
        "n_edges_all": int((graph.adjacency != 0).sum()),
        "latents_left_out": graph.n_left_out,
        "left_out_share": graph.left_out_share,
        "exclude_leading": graph.exclude_leading,
        "error_shares": graph.error_shares().tolist(),
        "kl_last": (measures or {}).get("kl_last"),
        "tokens": list(labels.tokens),
        "layers": graph.n_layers,
        "targets": list(labels.targets),
        "probabilities": [target.probability for target in graph.targets],
        "nodes": nodes,
        "edges": edges,
        "edge_heads": carried,
        "levels": None if found is None else _levels(found, places),
        "attention_scores": None if attention is None else [_score(score) for score in attention.scores],
        "notes": {f"{layer}.{latent}": _note(note) for (layer, latent), note in labels.notes.items()},
    }


def node_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the kept nodes of ``page_data`` as rows of a table, the most influential first.

    ``value`` is a latent's activation or a logit's probability, ``influence`` the share of the logits' influence through it.
    """
    rows = []
    for kind, layer, position, place, influence, value, *_ in data["nodes"]:
        row = {"kind": KINDS[kind], "layer": layer, "latent": place if KINDS[kind] == "latent" else None, "position": position}
        row |= {"token": data["tokens"][position], "influence": influence, "value": value}
        label = data["targets"][place] if KINDS[kind] == "logit" else data["notes"].get(f"{layer}.{place}", {}).get("label")
        rows.append(row | {"label": label or ""})
    return sorted(rows, key=lambda row: -row["influence"])


def _node(graph: AttributionGraph, number: int, share: float) -> list[Any]:
    """Return kind, layer, position, index, share of influence, value or probability, total and constant."""
    node, value = graph.node(number), None
    if node.kind == "latent":
        value = float(graph.active.values[number])
    elif node.kind == "logit":
        value = graph.targets[number - graph.logits.start].probability
    has_row = node.kind in ("latent", "logit")
    total, constant = (_rounded(float(x[number])) if has_row else None for x in (graph.totals, graph.constants))
    place = number - graph.logits.start if node.kind == "logit" else node.index
    number_of_kind = KINDS.index(node.kind)
    shown = None if value is None else _rounded(value)
    return [number_of_kind, node.layer, node.position, place, _rounded(share), shown, total, constant]


def _levels(found: LevelSearch, places: Mapping[int, int]) -> dict[str, Any]:
    """Return the levels' clusters as influence, effect (None if not measured), opened, number of latents and shown nodes."""

    def shown(mask: Tensor) -> list[int]:
        return [places[number] for number in mask.nonzero()[:, 0].tolist() if number in places]

    def cluster(level: GraphLevel, number: int) -> list[Any]:
        effect, members = float(level.effects[number]), level.labels == number
        kept = None if math.isnan(effect) else _rounded(effect)
        influence = _rounded(float(level.influence[number]))
        return [influence, kept, bool(level.opened[number]), int(members.sum()), shown(members)]

    return {
        "faithfulness": _rounded(found.faithfulness),
        "passes": found.passes,
        "flat_passes": found.flat_passes,
        "size": int(found.circuit.sum()),
        "circuit": shown(found.circuit),
        "levels": [[cluster(level, number) for number in range(len(level.opened))] for level in found.levels],
    }


def _carried(attention: GraphAttention, edges: Iterable[tuple[int, int]]) -> list[Any]:
    """Return the direct part of every edge, and its heads as layer, head, position attended to and weight."""
    found = [attention.edges[edge] for edge in edges]
    return [
        [_rounded(edge.direct), [[part.layer, part.head, part.key, _rounded(part.weight)] for part in edge.heads]]
        for edge in found
    ]


def _score(score: ExplainedScore) -> dict[str, Any]:
    def described(node: GraphNode | None) -> list[Any] | None:
        return None if node is None else [KINDS.index(node.kind), node.layer, node.position, node.index]

    return {
        "place": list(score.place),
        "influence": _rounded(score.influence),
        "weight": _rounded(score.weight),
        "score": _rounded(score.score),
        "cap": score.cap,
        "terms": [[described(query), described(key), _rounded(value)] for query, key, value in score.terms],
        "rest": _rounded(score.rest),
    }


def _note(note: Note) -> dict[str, Any]:
    top = note.maximum or 1.0
    return {
        "label": note.label,
        "maximum": note.maximum and _rounded(note.maximum),
        "density": note.density and _rounded(note.density),
        "promoted": list(note.promoted),
        "suppressed": list(note.suppressed),
        "windows": [
            [
                list(window.tokens),
                [round(SHADES * max(0.0, min(1.0, value / top))) for value in window.activations],
                window.peak,
            ]
            for window in note.windows
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
