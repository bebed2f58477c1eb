"""A pruned graph as one self-contained page: layers are rows, positions columns; every node tells what it is made of."""

import json
from html import escape
from typing import Any

from ..page import document
from ..plots import show
from .graph import KINDS, AttributionGraph
from .graph_export import Labels
from .graph_notes import Note
from .graph_page_script import CSS, SCRIPT
from .graph_scores import Pruned, normalised

# Activations in a context are shaded no finer.
SHADES = 100


def render(graph: AttributionGraph, pruned: Pruned, labels: Labels, measures: dict[str, Any] | None = None) -> str:
    """One page of the nodes and edges that are kept. Equal input gives equal bytes.

    ``measures`` are further figures of the graph by name, as ``eval.circuits.graph_run`` reports them.
    """
    data = page_data(graph, pruned, labels)
    kept = f"{show(int(pruned.nodes.sum()))} of {show(graph.n_nodes)}"
    edges = f"{show(int(pruned.edges.sum()))} of {show(int((graph.adjacency != 0).sum()))}"
    scores = graph.scores()
    figures = [
        ("replacement score", show(scores.replacement), "of influence, what ends in tokens, not in errors"),
        ("completeness score", show(scores.completeness), "of edges' weight, what does not come from errors"),
        ("nodes shown", kept, "the most influential ones"),
        ("edges shown", edges, "the most influential ones"),
    ]
    if graph.n_left_out:
        note = f"of influence ends in {show(graph.n_left_out)} latents that were not looked into"
        figures.append(("left out", show(graph.left_out_share), note))
    if measures and "kl_last" in measures:
        figures.append(("KL", show(measures["kl_last"]), "nats, next token, if latents alone stood in for the MLPs"))
    likeliest = ", ".join(
        f"{text!r} {target.probability:.1%}" for text, target in zip(labels.targets, graph.targets, strict=True)
    )
    facts = {"model": labels.model, "transcoders": labels.checkpoint, "explained": likeliest}
    body = BODY.format(
        gapped="" if any(token[:1].isspace() for token in labels.tokens) else " gapped",
        prompt="".join(f"<span>{escape(_visible(token))}</span>" for token in labels.tokens),
        facts="".join(f"<div><dt>{key}</dt><dd>{escape(str(value))}</dd></div>" for key, value in facts.items()),
        tiles="".join(
            f'<div class="tile"><div class="label">{name}</div><div class="value">{escape(value)}</div>'
            f'<div class="note">{escape(note)}</div></div>'
            for name, value, note in figures
        ),
        errors=", ".join(f"{layer}: {share:.1%}" for layer, share in enumerate(graph.error_shares().tolist())),
        leading=LEADING.format(count=graph.exclude_leading) if graph.exclude_leading else "",
        # Nothing in it may end the element.
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )
    return document(f"sparsary graph · {labels.prompt[:60]}", body, CSS, script=SCRIPT)


def page_data(graph: AttributionGraph, pruned: Pruned, labels: Labels) -> dict[str, Any]:
    """What the page's script draws: nodes by place in a list, edges by these places, strongest first."""
    kept = pruned.nodes.nonzero()[:, 0].tolist()
    places = {number: place for place, number in enumerate(kept)}
    reached = graph.influence + graph.weights
    shares = normalised(graph.adjacency)
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
    return {
        "tokens": [_visible(token) for token in labels.tokens],
        "layers": graph.n_layers,
        "targets": [_visible(text) for text in labels.targets],
        "nodes": nodes,
        "edges": edges,
        "notes": {f"{layer}.{latent}": _note(note) for (layer, latent), note in labels.notes.items()},
    }


def _node(graph: AttributionGraph, number: int, share: float) -> list[Any]:
    """Kind, layer, position, index, share of influence, value or probability, total and constant."""
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


def _note(note: Note) -> dict[str, Any]:
    top = note.maximum or 1.0
    return {
        "label": note.label,
        "maximum": note.maximum and _rounded(note.maximum),
        "density": note.density and _rounded(note.density),
        "promoted": [_visible(token) for token in note.promoted],
        "suppressed": [_visible(token) for token in note.suppressed],
        "windows": [
            [
                list(window.tokens),
                [round(SHADES * max(0.0, min(1.0, value / top))) for value in window.activations],
                window.peak,
            ]
            for window in note.windows
        ],
    }


def _visible(token: str) -> str:
    return token.replace("\n", "\u21b5").replace("\t", "\u21e5")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


LEADING = """<p>Positions before {count} have neither latents nor errors: heads rest there that have nothing to do, and what
MLPs write there is held as a constant.</p>"""

BODY = """<header>
<p class="over">sparsary attribution graph</p>
<h1 class="prompt{gapped}">{prompt}</h1>
<dl>{facts}</dl>
</header>
<section class="tiles" aria-label="Key figures">{tiles}</section>
<div class="columns">
<section class="entries graph" aria-label="Graph">
<div class="controls">
<input id="search" type="search" placeholder="token, latent or label" aria-label="Search nodes">
<label>edges <input id="count" type="range" min="0" max="100" aria-label="How many edges are drawn"></label>
<span id="drawn" class="note"></span>
<span class="buttons"><button id="out" type="button" aria-label="Zoom out">\u2212</button>
<button id="in" type="button" aria-label="Zoom in">+</button><button id="fit" type="button">fit</button></span>
</div>
<svg id="graph" tabindex="0" role="application" aria-label="Graph. Arrow keys go from node to node, Escape deselects,
plus, minus and 0 zoom."></svg>
<div class="key note">
<span><svg viewBox="-8 -8 16 16"><circle r="6" class="latent"/></svg>latent</span>
<span><svg viewBox="-8 -8 16 16"><path d="M0-6 6 0 0 6-6 0Z" class="error"/></svg>error</span>
<span><svg viewBox="-8 -8 16 16"><rect x="-5" y="-5" width="10" height="10" class="token"/></svg>token</span>
<span><svg viewBox="-8 -8 16 16"><rect x="-5" y="-5" width="10" height="10" rx="3" class="logit"/></svg>logit</span>
<span><svg viewBox="0 -4 20 8"><path d="M0 0H20" class="up"/></svg>raises</span>
<span><svg viewBox="0 -4 20 8"><path d="M0 0H20" class="down"/></svg>lowers</span>
<span>larger and fuller: more influence</span>
</div>
</section>
<section class="entries" id="detail" aria-label="Node" aria-live="polite"></section>
</div>
<footer>
<p>An edge is what its source adds to its target directly: to a latent's pre-activation, or to a logit less the mean logit.
Attention patterns, denominators of norms and which latents fire are held as they are on this prompt; then all edges into a
node, those not shown too, and its constant add up exactly. An error is what latents leave of an MLP's output.</p>
<p>Influence starts on the logits by probability and walks down the edges in proportion to their magnitudes. Share of it that
ends in errors, by layer: {errors}.</p>
{leading}</footer>
<script type="text/plain" id="data">{data}</script>
"""
