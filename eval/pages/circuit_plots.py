"""Curves of circuits.html: faithfulness and completeness by circuit size, one line per family."""

import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from .charts import COLORS, FAMILY_COLORS, family_color
from .numbers import show
from .plots import INK, MUTED, PlotCard, plot_card

Row = dict[str, Any]
LEVEL = 0.8
# Position of 0 on the logarithmic axis: half a decade before 1.
ZERO = -0.5
# Limits of the y axis: one outlier must not flatten the other lines. The caption reports values beyond.
LOWEST, HIGHEST = -0.5, 1.75
INCHES = (560 / 72, 330 / 72)
# Lengths of dashes and gaps; with eleven colors they give 77 distinct pairs.
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (6.0, 2.0),
    (1.5, 1.5),
    (7.0, 2.0, 1.5, 2.0),
    (3.0, 1.5),
    (10.0, 3.0),
    (5.0, 1.5, 1.5, 1.5, 1.5, 1.5),
)
PANELS = {
    "faithfulness": (
        "Faithfulness",
        "Faithfulness of the circuit alone: 1 is the whole model, 0 everything ablated. Up and left is better. Bands: 95% "
        "intervals over pairs. Dots: smallest circuit of 0.8.",
    ),
    "completeness": (
        "Completeness",
        "Faithfulness of all units outside the circuit: near 0, nothing important is missing. Down and left is better.",
    ),
}


class LineSample(NamedTuple):
    """Style of a family's line: its color, and its dashes (empty for a solid line)."""

    color: str
    dashes: str


def family_labels(found: Row) -> dict[str, str]:
    """Map families to their labels, in row order; checkpoint paths are shortened as long as they stay distinct."""
    checkpoints = sorted(found["checkpoints"], key=len, reverse=True)
    short = _distinct_ends(checkpoints)
    labels = {}
    for family in dict.fromkeys(row["family"] for row in found["rows"]):
        owner = next((name for name in checkpoints if family.startswith(f"{name}: ")), None)
        kind = family if owner is None else family.removeprefix(f"{owner}: ")
        if owner is not None:
            kind = kind.replace("random, ", "random features, ") if kind.startswith("random, ") else f"latents, {kind}"
        labels[family] = f"{short[owner]}: {kind}" if owner is not None and len(checkpoints) > 1 else kind
    return labels


def _distinct_ends(paths: list[str]) -> dict[str, str]:
    """Map paths to their parts without the common beginning and end."""
    parts = [path.rstrip("/").split("/") for path in paths]
    start, end = _n_shared(parts), _n_shared([own[::-1] for own in parts])
    return {path: "/".join(own[start : len(own) - end]) or path for path, own in zip(paths, parts, strict=True)}


def _n_shared(sequences: list[list[str]]) -> int:
    """Return the length of the longest common prefix."""
    places = zip(*sequences, strict=False)
    return next((n for n, items in enumerate(places) if len(set(items)) > 1), min(map(len, sequences), default=0))


def dash(index: int) -> tuple[float, ...]:
    """Return the dashes and gaps of a family's line, in line widths."""
    return DASHES[index % len(DASHES)]


def sample(index: int) -> LineSample:
    """Return the family's line style for the legend and the tables."""
    return LineSample(family_color(index), " ".join(f"{length * 2:g}" for length in dash(index)))


def panel(found: Row, task: str, method: str, key: str, families: list[str]) -> PlotCard:
    """Return a plot card with the curves of all families."""
    title, note = PANELS[key]
    curves = [entry for entry in found["curves"] if (entry["task"], entry["method"]) == (task, method)]
    nodes = {row["family"]: row.get("nodes_80") for row in found["rows"] if (row["task"], row["method"]) == (task, method)}
    values = np.concatenate([_values(entry, key) for entry in curves] or [np.zeros(0)])
    if key == "faithfulness" and any(entry.get("floor_best") for entry in curves):
        note += " Dotted: the best of the random circuits with equal counts per hook."
    known = values[np.isfinite(values)]
    if len(known) and (known.min() < LOWEST or known.max() > HIGHEST):
        note += f" Values outside {LOWEST:g} to {HIGHEST:g} are cut off.".replace("-", "\u2212")
    return plot_card(
        f"{title} by circuit size \u00b7 {task} \u00b7 {method}",
        note,
        lambda ax: draw_curves(ax, curves, families, key, nodes if key == "faithfulness" else {}),
        INCHES,
        COLORS,
    )


def draw_curves(ax: Axes, curves: list[Row], families: list[str], key: str, nodes: dict[str, int | None]) -> str | None:
    """Draw one line per family, with its band and a dot where it reaches ``LEVEL``, and return a text alternative."""
    words, drawn = [], []
    for entry in curves:
        index, values = families.index(entry["family"]), _values(entry, key)
        if not np.isfinite(values).any():
            continue
        color = list(FAMILY_COLORS.values())[index % len(FAMILY_COLORS)][0]
        x = positions(entry["sizes"])
        if key == "faithfulness":
            band = ax.fill_between(x, _values(entry, "low"), _values(entry, "high"), color=color, alpha=0.13, linewidth=0)
            band.set_gid(_mark("band", key, entry, index))
        # Completeness is measured at fewer sizes than faithfulness.
        there = np.isfinite(values)
        (line,) = ax.plot(x[there], values[there], color=color, linewidth=1.9, dashes=dash(index) or (None, None), zorder=3)
        line.set_gid(_mark("line", key, entry, index))
        if key == "faithfulness" and entry.get("floor_best"):
            floor = _values(entry, "floor_best")
            (below,) = ax.plot(x, floor, color=color, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=2)
            below.set_gid(_mark("line", "floor", entry, index))
        size = nodes.get(entry["family"])
        if size is not None:
            dot = ax.scatter(positions([size]), [LEVEL], s=26, color=color, zorder=4)
            dot.set_gid(_mark("dot", key, entry, index))
        drawn.append(values)
        words.append(f"{entry['family']} {_said(entry, values)}")
    if not drawn:
        return None
    _axes(ax, max(entry["sizes"][-1] for entry in curves), np.concatenate(drawn), key)
    return f"{key} by number of nodes: {'; '.join(words)}."


def positions(sizes: list[int]) -> np.ndarray:
    """Return positions on the x axis: log10 of the sizes, with 0 a little before 1."""
    return np.array([math.log10(size) if size > 0 else ZERO for size in sizes])


def _axes(ax: Axes, largest: int, values: np.ndarray, key: str) -> None:
    known = values[np.isfinite(values)]
    low, high = max(LOWEST, min(0.0, known.min())), min(HIGHEST, max(1.0, known.max()))
    decades = range(math.ceil(math.log10(max(largest, 10))) + 1)
    right = math.log10(max(largest, 10)) + 0.05
    ticks = [(ZERO, "0"), *((power, f"{10**power:,}") for power in decades if power <= right)]
    ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.set_xticks([power + math.log10(step) for power in decades for step in range(2, 10)], minor=True)
    ax.set(xlim=(ZERO - 0.08, right), ylim=(low - 0.06, high + 0.06), xlabel="nodes in the circuit, log scale", ylabel=key)
    ax.grid(visible=True)
    for level, color in ((0.0, MUTED), (1.0, MUTED)):
        ax.axhline(level, color=color, linewidth=0.8, zorder=1)
    if key == "faithfulness":
        ax.axhline(LEVEL, color=INK, linewidth=1, linestyle=(0, (1, 2)), zorder=2)
        ax.text(ZERO - 0.04, LEVEL + 0.012, f"{LEVEL:g}", va="bottom", color=INK)


def _mark(kind: str, key: str, entry: Row, index: int) -> str:
    """Return the id by which the page's script finds a family's marks; the family's number comes last."""
    place = "-".join("".join(c if c.isalnum() else "." for c in str(entry[part])) for part in ("task", "method"))
    return f"{kind}-{key}-{place}-{index}"


def _values(entry: Row, key: str) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in entry[key]], dtype=float)


def _said(entry: Row, values: np.ndarray) -> str:
    known = [(size, value) for size, value in zip(entry["sizes"], values, strict=True) if math.isfinite(value)]
    picked = dict.fromkeys((known[0], known[len(known) // 2], known[-1]))
    return ", ".join(f"{show(float(value), digits=3)} at {size:,}" for size, value in picked)
