"""Page of a selection: ways of ranking compared, the latents behind the choice, and documents with their causes."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from .document import document, encoder_label
from .numbers import UNMEASURED, finite, show, show_interval
from .plots import ACCENT, MUTED, WARN, plot_card
from .tables import Cell, Column, FigureTile

METHOD_NAMES = {
    "latents": "latents",
    "latents, diverse": "latents, diverse",
    "neurons": "neurons",
    "dimensions": "dimensions",
    "activation": "activation, cosine",
    "tfidf": "TF-IDF",
    "bm25": "BM25",
}
METHOD_COLUMNS = [
    Column(
        "examples found",
        "recovered",
        max,
        "Share of the examples that rank within the share of the pool that is kept, by the half of the examples that they are "
        "not in. Small: 95% interval over examples.",
    ),
    Column("AUROC", "auroc", max, "Probability that a held-back example scores above a document of the pool."),
    Column("shared", "shared", None, "Share of the documents chosen by latents that this way of ranking chooses, too."),
]
TRUTH_COLUMNS = [
    Column("precision", "precision", max, "Share of the chosen documents that are right by --truth."),
    Column("AP", "average_precision", max, "Average precision of the ranking of the whole pool, by --truth."),
]
LATENT_COLUMNS = [
    Column(
        "lift", "lift", None, "Mean part of the chosen documents' similarity that the latent causes, less that of the pool."
    ),
    Column(
        "chosen", "chosen", None, "Mean part of the similarity of the chosen documents; the parts of all latents add up to it."
    ),
    Column("pool", "pool", None, "The same over the whole pool."),
    Column("documents", "density_chosen", None, "Share of the chosen documents in which it is among the largest entries."),
    Column("in the pool", "density_pool", None, "The same over the whole pool."),
]


def render_select(found: Mapping[str, Any], features: str | None = None) -> str:
    """Render ``select.json`` as a page. Equal input gives equal bytes.

    Args:
        features: Address of the page of features, to which latents link.
    """
    has_truth = found["truth"] is not None
    return document(
        "select.html",
        f"sparsary select \u00b7 {found['pool']}",
        ("table.css", "probing.css", "select.css"),
        ("page.js", "table.js", "probing.js"),
        command="select",
        heading=f"{show(found['chosen'])} of {show(found['documents'])} documents",
        shape=f"most like {show(found['examples'])} examples by {METHOD_NAMES[found['by']]}",
        facts={
            "pool": found["pool"],
            "examples": found["like"],
            "pooling": f"{found['pooling']} over tokens, {show(found['top'])} largest entries",
            "model": found["model"],
            "hook": found["hook"],
            "encoder": encoder_label(found["encoder"]),
            "checkpoint": found["checkpoint"],
            **({"right by": found["truth"]} if has_truth else {}),
            **({"left out": "; ".join(found["skipped"])} if found["skipped"] else {}),
            **({"identical to examples": show(found["identical"])} if found["identical"] else {}),
        },
        tiles=_tiles(found),
        plots=[
            plot_card("Similarity", "Documents of the pool by their similarity to the examples.", lambda ax: _scores(ax, found))
        ],
        method_columns=[*METHOD_COLUMNS, *(TRUTH_COLUMNS if has_truth else [])],
        methods=_methods(found, has_truth),
        latent_columns=LATENT_COLUMNS,
        latents=[_latent(entry, features) for entry in found["latents"]],
        shown=[_document(entry, features) for entry in found["shown"]],
        has_truth=has_truth,
    )


def _tiles(found: Mapping[str, Any]) -> list[FigureTile]:
    own = next(row for row in found["methods"] if row["method"] == found["by"])
    share = finite(own.get("recovered"))
    interval = "" if share is None else show_interval(own["recovered_low"], own["recovered_high"])
    tiles = [
        FigureTile(
            "chosen", "chosen", show(found["chosen"]), f"{show(found['chosen'] / found['documents'], digits=2)} of the pool"
        ),
        FigureTile("limit", "similarity of the last", show(found["limit"], digits=3), "1: equal to the examples' mean"),
        FigureTile(
            "recovered",
            "examples found",
            show(share, UNMEASURED, 3),
            "by the other half of the examples",
            share is None,
            METHOD_COLUMNS[0].text,
            interval,
        ),
    ]
    if "precision" in own:
        row = next((row for row in found["methods"] if row["method"] == "latents, diverse"), own)
        note = f"of the pool, {show(found['relevant_share'], digits=3)} is right"
        tiles.append(FigureTile("precision", "precision", show(row["precision"], digits=3), note, text=TRUTH_COLUMNS[0].text))
    if found["diverse"]:
        cover = found["diverse"]
        note = f"{show(cover['coverage_of_best'], digits=3)} by the most similar alone"
        tiles.append(FigureTile("coverage", "prototype covered", show(cover["coverage"], digits=3), note))
    return tiles


def _methods(found: Mapping[str, Any], has_truth: bool) -> list[tuple[str, list[Cell]]]:
    columns = [*METHOD_COLUMNS, *(TRUTH_COLUMNS if has_truth else [])]
    best = {
        column.key: column.better(
            [row[column.key] for row in found["methods"] if finite(row.get(column.key)) is not None] or [0]
        )
        for column in columns
        if column.better
    }
    rows = []
    for row in found["methods"]:
        cells = []
        for column in columns:
            value = finite(row.get(column.key))
            low, high = (finite(row.get(f"{column.key}_{end}")) for end in ("low", "high"))
            notes = () if low is None or high is None else (show_interval(low, high),)
            mark = "best of its column" if value is not None and value == best.get(column.key) else ""
            cells.append(Cell(show(value, UNMEASURED, 3), value, notes, mark))
        rows.append((METHOD_NAMES[row["method"]], cells))
    return rows


def _latent(entry: Mapping[str, Any], features: str | None) -> dict[str, Any]:
    values = dict(entry) | {"lift": entry["chosen"] - entry["pool"]}
    return {
        "name": f"{entry['latent']}{', negative' if entry['negative'] else ''}",
        "href": f"{features}#{entry['latent']}" if features else "",
        "label": entry["label"],
        "cells": [Cell(show(values[column.key], digits=3), values[column.key]) for column in LATENT_COLUMNS],
    }


def _document(entry: Mapping[str, Any], features: str | None) -> dict[str, Any]:
    causes = [
        {
            "name": cause["label"] or f"latent {cause['latent']}",
            "title": f"latent {cause['latent']}, {show(cause['lift'], digits=2)}",
        }
        | {"href": f"{features}#{cause['latent']}" if features else ""}
        for cause in entry["causes"]
    ]
    return {
        "rank": "not chosen" if entry["rank"] is None else show(entry["rank"]),
        "score": show(entry["score"], digits=3),
        "text": entry["text"],
        "causes": causes,
        "relevant": entry.get("relevant"),
    }


def _scores(ax: Axes, found: Mapping[str, Any]) -> str:
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    limit = found["limit"]
    colors = [ACCENT if left >= limit else MUTED for left in edges[:-1]]
    ax.bar(edges[:-1], counts, width=(edges[1] - edges[0]) * 0.92, align="edge", color=colors)
    ax.set_yscale("symlog", linthresh=1)
    ticks = [tick for tick in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000) if tick <= max(counts) * 2]
    ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    examples = found["histogram"]["examples"]
    ax.plot(examples, [0.5] * len(examples), "|", color=WARN, markersize=13, label=f"examples ({len(examples)})")
    ax.axvline(limit, color=MUTED, linestyle="--", linewidth=1.2, label=f"last chosen {show(limit, digits=3)}")
    ax.set(xlabel="similarity to the examples", ylabel="documents", ylim=(0, max(counts) * 4))
    ax.legend(loc="upper right")
    ends = [show(each, digits=3) for each in (edges[0], edges[-1], limit, examples[0], examples[-1])]
    return (
        f"Histogram of similarities: {show(sum(counts))} documents from {ends[0]} to {ends[1]}, the last chosen at {ends[2]}; "
        f"examples from {ends[3]} to {ends[4]}."
    )
