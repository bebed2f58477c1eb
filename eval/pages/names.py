"""Page of the names of latents: their cosines and margins beside those of random directions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .document import document, encoder_label
from .numbers import show
from .plots import ACCENT, MUTED, plot_card
from .tables import Cell, Column, FigureTile

# Latents on the page, those of the largest cosines; all are in names.json.
SHOWN = 1000
BINS = 40
COLUMNS = [
    Column("cosine", "cosine", None, "Cosine of the latent's decoder direction and the vector of its name."),
    Column("margin", "margin", None, "That cosine less the one with the second name."),
    Column("random", "floor_share", None, "Share of random directions whose best cosine is as large: small is sure."),
]


def render_names(found: Mapping[str, Any], features: str | None = None) -> str:
    """Render ``names.json`` as a page. Equal input gives equal bytes.

    Args:
        features: Address of the page of features, to which latents link.
    """
    latents = sorted(
        (row for row in found["latents"] if row["name"] is not None), key=lambda row: (-row["cosine"], row["latent"])
    )
    return document(
        "names.html",
        f"sparsary name \u00b7 {found['checkpoint']}",
        ("table.css", "probing.css"),
        ("page.js", "table.js", "probing.js"),
        command="name",
        heading=f"Names of {show(found['n_latents'])} latents",
        shape=f"of {show(found['words'])}: {found['source']}" + (", less their mean" if found["center"] else ""),
        facts={
            "vectors": found["source"],
            "encoder": encoder_label(found["encoder"]),
            "checkpoint": found["checkpoint"],
            "floor": f"{show(found['floor_directions'])} random mixtures of the decoder directions, seed {found['seed']}",
        },
        tiles=[
            FigureTile(
                "above_floor",
                "above the floor",
                show(found["above_floor"]),
                f"{show(found['above_floor_share'], digits=3)} of the latents, {show(1 - found['floor'], digits=2)} of random "
                "directions",
            ),
            FigureTile("distinct", "different names", show(found["distinct"]), "of the latents above the floor"),
            FigureTile(
                "median_cosine",
                "median cosine",
                show(found["median_cosine"], digits=3),
                f"of random directions {show(found['median_floor_cosine'], digits=3)}",
            ),
            FigureTile(
                "floor_cosine",
                "floor",
                show(found["floor_cosine"], digits=3),
                f"{show(found['floor'], digits=2)} of random directions have a lower best cosine",
            ),
        ],
        plots=[plot_card("Cosines", "Latents by the cosine with their name.", lambda ax: _cosines(ax, found))],
        columns=COLUMNS,
        shown=show(min(SHOWN, len(latents))),
        latents=[
            {
                "latent": row["latent"],
                "href": f"{features}#{row['latent']}" if features else "",
                "name": row["name"].strip() or repr(row["name"]),
                "second": (row["second"] or "").strip() or repr(row["second"]),
                "cells": [Cell(show(row[column.key], digits=3), row[column.key]) for column in COLUMNS],
            }
            for row in latents[:SHOWN]
        ],
    )


def _cosines(ax: Axes, found: Mapping[str, Any]) -> str:
    cosines = np.array([row["cosine"] for row in found["latents"]])
    floor = found["floor_cosine"]
    counts, edges = np.histogram(cosines, BINS, (min(0.0, float(cosines.min())), 1.0))
    colors = [ACCENT if left >= floor else MUTED for left in edges[:-1]]
    ax.bar(edges[:-1], counts, width=(edges[1] - edges[0]) * 0.92, align="edge", color=colors)
    ax.axvline(floor, color=MUTED, linestyle="--", linewidth=1.2, label=f"floor {show(floor, digits=3)}")
    ax.set(xlabel="cosine with the name", ylabel="latents", ylim=(0, max(counts) * 1.25))
    ax.legend(loc="upper right")
    return f"Histogram of cosines: median {show(found['median_cosine'], digits=3)}, floor {show(floor, digits=3)}."
