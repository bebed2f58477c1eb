"""Export of a pruned graph as JSON for circuit-tracer's front end and Neuronpedia.

Names of entries and nodes follow circuit-tracer 0.5 (``frontend/graph_models.py``, ``frontend/feature_models.py``), schema
version 1, in which a latent's ``feature`` is the Cantor pairing of its layer and index. To view a folder of such files, run
``circuit_tracer.frontend.local_server.serve(data_dir=FOLDER)``. Entries beyond that schema, as in Neuronpedia's own graphs,
record how the graph was made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...sae.files import write_json
from .attention import ExplainedScore, GraphAttention
from .graph import AttributionGraph, GraphNode
from .labels import Latent, Note
from .levels import LevelSearch
from .pruning import Pruned

SCHEMA_VERSION = 1
GRAPH_FILE, INDEX_FILE, LATENTS_FOLDER = "graph.json", "graph-metadata.json", "features"
# Path of the latents' folder for the front end's local server, which serves the data folder as /data.
SCAN = f"./data/{LATENTS_FOLDER}"


@dataclass(frozen=True)
class GraphLabels:
    """Text labels of a graph: the prompt, its tokens and targets, and notes on its latents."""

    model: str
    checkpoint: str
    prompt: str
    tokens: Sequence[str]
    targets: Sequence[str]
    notes: Mapping[Latent, Note]


def cantor(layer: int, latent: int) -> int:
    """Return the Cantor pairing number of a layer and a latent."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def as_json(
    graph: AttributionGraph,
    pruned: Pruned,
    labels: GraphLabels,
    node_threshold: float,
    edge_threshold: float,
    attention: GraphAttention | None = None,
    found: LevelSearch | None = None,
) -> dict[str, Any]:
    """Return ``metadata``, ``qParams``, ``nodes`` and ``links``; ``influence`` of a node is its cumulative share in pruning.

    With ``attention``, links have the parts of their weight by head, and ``attention_scores`` is a further entry. With the
    search ``found``, ``levels`` is one, and clusters of the coarsest level are supernodes. Further entries are beyond
    circuit-tracer's schema.
    """
    kept = pruned.nodes.nonzero()[:, 0].tolist()
    identities = {number: node_id(graph, number) for number in kept}
    scores = graph.scores()
    targets, sources = pruned.edges.nonzero(as_tuple=True)
    weights = graph.adjacency[targets, sources].tolist()
    values: dict[str, Any] = {
        "metadata": {
            "slug": "graph",
            "scan": SCAN,
            "transcoder_list": [],
            "prompt_tokens": list(labels.tokens),
            "prompt": labels.prompt,
            "node_threshold": node_threshold,
            "schema_version": SCHEMA_VERSION,
            "info": {"creator_name": "sparsary", "model": labels.model, "transcoders": labels.checkpoint},
            "generation_settings": {
                "max_n_logits": len(graph.targets),
                "max_feature_nodes": len(graph.active),
                "features_left_out": graph.n_left_out,
                "positions_left_out": graph.exclude_leading,
                # Differences from circuit-tracer: its token nodes hold W_E alone, and its skip paths run at all positions.
                "token_nodes": "token and position embedding",
                "skip_paths_at_positions_left_out": False,
            },
            "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
            "replacement_score": scores.replacement,
            "completeness_score": scores.completeness,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(graph, pruned, labels, number) for number in kept],
        "links": [
            {"source": identities[source], "target": identities[target], "weight": weight}
            for target, source, weight in zip(targets.tolist(), sources.tolist(), weights, strict=True)
        ],
    }
    if attention is not None:
        for link, target, source in zip(values["links"], targets.tolist(), sources.tolist(), strict=True):
            carried = attention.edges[target, source]
            link |= {"direct": carried.direct, "heads": [part._asdict() for part in carried.heads]}
        values["attention_scores"] = [_score(graph, score) for score in attention.scores]
    if found is not None:
        values["levels"] = _levels(graph, found)
        shown = pruned.nodes[graph.latents]
        for cluster in range(len(found.levels[0].opened)):
            members = ((found.levels[0].labels == cluster) & shown).nonzero()[:, 0].tolist()
            if members:
                values["qParams"]["supernodes"].append([f"cluster {cluster}", *(identities[member] for member in members)])
    return values


def latent_json(layer: int, latent: int, note: Note) -> dict[str, Any]:
    """Return the front end's description of a latent."""
    examples = [
        {
            "tokens": list(window.tokens),
            "tokens_acts_list": list(window.activations),
            "train_token_ind": window.peak,
            "is_repeated_datapoint": False,
        }
        for window in note.windows
    ]
    return {
        "transcoder_id": SCAN,
        "index": cantor(layer, latent),
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}],
        "top_logits": list(note.promoted),
        "bottom_logits": list(note.suppressed),
        "act_min": 0.0,
        "act_max": note.maximum or 0.0,
        "quantile_values": [],
        "histogram": [],
        "activation_frequency": note.density or 0.0,
    }


def write_graph(directory: str | Path, values: Mapping[str, Any], notes: Mapping[Latent, Note]) -> Path:
    """Write the graph, the front end's index of graphs, and one file per latent; return the graph's path."""
    target = Path(directory)
    (target / LATENTS_FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(target / GRAPH_FILE, values)
    write_json(target / INDEX_FILE, {"graphs": [values["metadata"]]})
    for (layer, latent), note in notes.items():
        write_json(target / LATENTS_FOLDER / f"{cantor(layer, latent)}.json", latent_json(layer, latent, note))
    return target / GRAPH_FILE


def node_id(graph: AttributionGraph, number: int) -> str:
    """Return the front end's node id: layer, index and position."""
    return _identity(graph.node(number), graph.n_layers)


def _identity(node: GraphNode, n_layers: int) -> str:
    layer = {"token": "E", "logit": str(n_layers + 1)}.get(node.kind, str(node.layer))
    # Minus one is no latent's number, so error nodes cannot collide with latents.
    return f"{layer}_{-1 if node.index is None else node.index}_{node.position}"


def _levels(graph: AttributionGraph, found: LevelSearch) -> dict[str, Any]:
    """Return all clusters with the node ids of their latents, which need not be among the shown nodes."""
    ids = [node_id(graph, number) for number in range(len(graph.active))]

    def members(mask: Tensor) -> list[str]:
        return [ids[number] for number in mask.nonzero()[:, 0].tolist()]

    return {
        "faithfulness": found.faithfulness,
        "circuit": members(found.circuit),
        "passes": found.passes,
        "flat_passes": found.flat_passes,
        "levels": [
            [
                {
                    "nodes": members(level.labels == cluster),
                    "influence": influence,
                    "effect": None if math.isnan(effect) else effect,
                    "opened": opened,
                }
                for cluster, (influence, effect, opened) in enumerate(
                    zip(level.influence.tolist(), level.effects.tolist(), level.opened.tolist(), strict=True)
                )
            ]
            for level in found.levels
        ],
    }


def _score(graph: AttributionGraph, score: ExplainedScore) -> dict[str, Any]:
    def named(node: GraphNode | None) -> str | None:
        return None if node is None else _identity(node, graph.n_layers)

    return {
        **score.place._asdict(),
        "weight": score.weight,
        "score": score.score,
        "cap": score.cap,
        "influence": score.influence,
        "terms": [{"query": named(query), "key": named(key), "value": value} for query, key, value in score.terms],
        "rest": score.rest,
    }


def _node(graph: AttributionGraph, pruned: Pruned, labels: GraphLabels, number: int) -> dict[str, Any]:
    node, identity = graph.node(number), node_id(graph, number)
    layer, index, position = identity.split("_")
    entries = {
        "node_id": identity,
        "feature": node.index,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": "cross layer transcoder",
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{index}-{position}",
        "clerp": "",
        "influence": float(pruned.cumulative[number]),
        "activation": None,
    }
    if node.kind == "latent":
        assert node.layer is not None
        assert node.index is not None
        note = labels.notes.get((node.layer, node.index), Note())
        return entries | {
            "feature": cantor(node.layer, node.index),
            "jsNodeId": f"{layer}_{index}-0",
            "clerp": note.label,
            "activation": float(graph.active.values[number]),
        }
    if node.kind == "error":
        return entries | {"feature": -1, "feature_type": "mlp reconstruction error"}
    if node.kind == "token":
        return entries | {"feature": node.position, "feature_type": "embedding"}
    place = number - graph.logits.start
    target = graph.targets[place]
    return entries | {
        "feature_type": "logit",
        "token_prob": target.probability,
        "is_target_logit": place == 0,
        "jsNodeId": f"L_{index}-{position}",
        # The front end parses the probability from this text.
        "clerp": f'Output "{labels.targets[place]}" (p={target.probability:.3f})',
        "influence": None,
    }
