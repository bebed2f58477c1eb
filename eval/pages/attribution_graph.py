"""Page of a pruned attribution graph: layers as rows, positions as columns, with a detail view per node."""

from typing import Any

from .document import document
from .numbers import show
from .tables import FigureTile

Graph = dict[str, Any]
DEFINITIONS = {
    "replacement_score": "Influence starts at the logits and is propagated back along the edges; this is the fraction that "
    "ends in tokens rather than error nodes. 1 if the transcoders reconstruct the MLPs exactly.",
    "completeness_score": "Fraction of the edges into a node, by magnitude, that do not come from errors; mean over nodes, "
    "weighted by influence. 1 is best.",
    "kl_last": "KL divergence from the model's prediction of the next token to that of the model with transcoders in "
    "place of the MLPs, without error nodes.",
}


def render_graph(graph: Graph) -> str:
    """Render ``graph-page.json``, which holds the kept nodes and edges. Equal input gives equal bytes."""
    likeliest = (f"{text!r} {share:.1%}" for text, share in zip(graph["targets"], graph["probabilities"], strict=True))
    return document(
        "attribution_graph.html",
        f"sparsary graph \u00b7 {graph['prompt'][:60]}",
        ("attribution_graph.css",),
        ("page.js", "attribution_graph.js"),
        command="attribution graph",
        facts={"model": graph["model"], "transcoders": graph["transcoders"], "explained": ", ".join(likeliest)},
        tiles=graph_tiles(graph),
        graph=graph,
        gapped=not any(token[:1].isspace() for token in graph["tokens"]),
        errors=", ".join(f"{layer}: {share:.1%}" for layer, share in enumerate(graph["error_shares"])),
    )


def graph_tiles(graph: Graph) -> list[FigureTile]:
    """Return the key figures of a graph, from ``graph-page.json``."""
    figures = [
        ("replacement_score", "replacement score", "fraction of influence that comes from tokens, not errors"),
        ("completeness_score", "completeness score", "fraction of edge weight that does not come from errors"),
    ]
    tiles = [FigureTile(key, label, show(graph[key]), note, text=DEFINITIONS[key]) for key, label, note in figures]
    for kind in ("nodes", "edges"):
        kept = f"{show(len(graph[kind]))} of {show(graph[f'n_{kind}_all'])}"
        tiles.append(FigureTile(kind, f"{kind} kept", kept, "the most influential ones; fewer are drawn at first"))
    if graph["latents_left_out"]:
        note = f"of influence comes from {show(graph['latents_left_out'])} unexpanded latents"
        tiles.append(FigureTile("left_out_share", "not expanded", show(graph["left_out_share"]), note))
    if graph["kl_last"] is not None:
        note = "nats, next token, with MLPs replaced by latents without errors"
        tiles.append(FigureTile("kl_last", "KL", show(graph["kl_last"]), note, text=DEFINITIONS["kl_last"]))
    return tiles
