"""Concept bottleneck on the probing page: classes with their concepts, and the path of penalties."""

import re
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from .numbers import finite, show
from .plots import ACCENT, WARN, plain_log_ticks
from .tables import Cell, Column

CLASS_COLUMNS = [
    Column("concepts", "n_concepts", None, "Latents with a weight other than 0 for the class."),
    Column("recall", "recall", max, "Share of the class's test rows that are recognized."),
    Column(
        "zeroed",
        "recall_zeroed",
        None,
        "The same with the strongest concept silent (all latents of its name); nothing is refitted.",
    ),
    Column("random", "recall_random", None, "The same with as many random latents of about the same density silent."),
    Column("others", "others", max, "Share of the other classes' test rows that are recognized."),
    Column("others, zeroed", "others_zeroed", None, "The same with this class's strongest concept silent."),
]
POINT = re.compile(r"bottleneck_path_(\d+)_accuracy")


def bottleneck_class(row: Mapping[str, Any], features: str | None) -> dict[str, Any]:
    """Return a class for the page's table, with its concepts and their addresses on the page of features."""
    concepts = [
        {
            "text": concept.get("name") or f"latent {concept['latent']}",
            "title": f"latent {concept['latent']}, weight {show(concept['weight'], digits=3)}",
            "href": f"{features}#{concept['latent']}" if features else "",
        }
        for concept in row["concepts"]
    ]
    cells = [Cell(show(row[column.key], digits=3), finite(row[column.key])) for column in CLASS_COLUMNS]
    return {"set": row["set"], "class": row["class"], "concepts": concepts, "cells": cells}


def draw_path(ax: Axes, found: Mapping[str, Any]) -> str | None:
    """Draw accuracy along the path of penalties; return a text alternative, or ``None`` if there is no path."""
    steps = sorted(int(match[1]) for key in found if (match := POINT.fullmatch(key)))
    points = [(found[f"bottleneck_path_{step}_concepts"], found[f"bottleneck_path_{step}_accuracy"]) for step in steps]
    points = [(concepts, accuracy) for concepts, accuracy in points if concepts > 0]
    if not points:
        return None
    ax.plot(*zip(*points, strict=True), color=ACCENT, marker="o", markersize=4.5, linewidth=1.8, label="latents, L1")
    dense = float(found["bottleneck_dense_accuracy"])
    ax.axhline(dense, color=WARN, linestyle="--", linewidth=1, label=f"dense probe {show(dense, digits=3)}")
    ax.set(xscale="log", xlabel="concepts a class, log scale", ylabel="accuracy")
    plain_log_ticks(ax.xaxis)
    ax.grid(visible=True)
    ax.legend(loc="lower right")
    said = ", ".join(f"{show(accuracy, digits=3)} with {show(concepts, digits=3)}" for concepts, accuracy in points)
    return f"Accuracy by concepts a class: {said}; dense probe {show(dense, digits=3)}."
