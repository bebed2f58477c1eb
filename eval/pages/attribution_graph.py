"""A pruned graph as one self-contained page: layers are rows, positions columns; every node tells what it is made of."""

import json
from html import escape
from typing import Any

from ..attribution_graphs.export import GraphLabels
from ..attribution_graphs.graph import AttributionGraph
from ..attribution_graphs.page_data import _visible, page_data
from ..attribution_graphs.pruning import Pruned
from .attribution_graph_script import CSS, SCRIPT
from .document import document
from .numbers import show


def render_graph(graph: AttributionGraph, pruned: Pruned, labels: GraphLabels, measures: dict[str, Any] | None = None) -> str:
    """One page of the nodes and edges that are kept. Equal input gives equal bytes.

    ``measures`` are further figures of the graph by name, as ``eval.attribution_graphs.run`` reports them.
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
