"""Page that compares recipes: a table of families, and plots of every run."""

import math
import statistics
import textwrap
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .charts import COLORS, look, seed_spread, swatch
from .differences import difference_table, off_target_words
from .document import document, encoder_parts
from .fronts import LEGEND as AREAS_LEGEND
from .fronts import area_rows, front_cards
from .numbers import UNDEFINED, UNMEASURED, finite, show
from .plots import INK, MUTED, name_points, plain_log_ticks, plot_card
from .tables import Cell, Column, explained

Family = dict[str, Any]
Comparison = dict[str, Any]
PER_TOKEN = "per token"


COLUMNS = (
    Column("fvu", "fvu", min),
    Column("ce recovered", "ce_recovered_mean", max),
    Column("ce increase", "ce_increase", min),
    Column("KL", "kl_spliced", min),
    # The sparsity budget is chosen, so neither direction is better.
    Column("l0", "l0_mean", None),
    Column("dead", "dead_fraction", min),
    Column("dead in training", "dead_training_fraction", min),
    Column("dense", "dense_fraction", min),
    Column("linear error", "linear_error_share", min),
    Column("tokens/s", "tokens_per_second", max),
)
WIDTH_INCHES = 430 / 72
SCATTER_INCHES, LEGEND_ROW_INCHES = 290 / 72, 19 / 72
# Heights of a family's row (a gap plus the lines of its name) and of the axis below the rows.
ROW_INCHES, LINE_INCHES, AXIS_INCHES = 10 / 72, 15 / 72, 52 / 72
NAME_WIDTH = 20
DAGGER = "\u2020 Hollow: latents not selected per token."
LEGEND = (
    "Large: mean over seeds. Small: lowest\u2013highest seed. Shaded: best mean of the column among run groups at the common "
    "l0; if ranges overlap, other seeds may give another order."
)
ORACLE = (
    "Run groups with a label next to their name select latents with information beyond the token (hollow in the plots). Their "
    "figures are optimistic, and they are never marked as best."
)
REMARK = (
    "A run group is one recipe with several seeds, which change the initial weights and the token order. All runs are "
    "evaluated on the same held-out tokens and trained on one activation store, unless a row says streamed from the model."
)


def render_recipes(comparison: Comparison, report_of: Callable[[str], str | None] = lambda directory: None) -> str:
    """Render a comparison of recipes as a page; ``report_of`` maps directories to the addresses of their reports."""
    families = comparison["families"]
    oracle = any(map(is_oracle, families))
    trained = sorted({family["training_tokens"] or 0 for family in families})
    seeds = sorted({len(family.get("seeds") or family["directories"]) for family in families})
    heading = f"{len(families)} run group{'s' * (len(families) != 1)}, {_span(seeds)} seed{'s' * (seeds != [1])} each"
    return document(
        "comparison.html",
        f"sparsary comparison \u00b7 {comparison['hook'] or heading}",
        ("table.css", "comparison.css"),
        ("page.js", "table.js", "comparison.js"),
        COLORS,
        command="comparison",
        heading=heading,
        facts={
            "model": comparison["model"],
            "hook": comparison["hook"],
            "text": comparison["text"],
            "trained on": f"{_span(trained)} tokens" if trained[0] else None,
            "evaluated on": f"{show(comparison['tokens'])} tokens",
            "dead latents": _dead_windows(comparison),
        }
        | ({} if comparison.get("target_l0") is None else {"compared at l0": show(comparison["target_l0"])}),
        warnings={},
        thing="run group",
        things="Run groups",
        example="fvu<0.1, dead<0.05",
        columns=explained(COLUMNS),
        rows=[
            _row(family, index, comparison, len(trained) > 1) | _links(family, report_of)
            for index, family in enumerate(families)
        ],
        tested=difference_table(comparison, COLUMNS),
        areas=area_rows(comparison),
        areas_legend=AREAS_LEGEND,
        legend=LEGEND,
        plots=[
            plot_card(
                title,
                f"{note} {DAGGER}" if oracle else note,
                lambda ax, draw=draw: draw(ax, families),
                (WIDTH_INCHES, height(families)),
                COLORS,
            )
            for title, note, draw, height in PLOTS
        ]
        + front_cards(comparison),
        sections={},
        remarks=[ORACLE, REMARK] if oracle else [REMARK],
    )


def _dead_windows(comparison: Comparison) -> str:
    """Describe the token windows of the two dead-latent columns."""
    words = f"silent for {show(comparison['dead_window_tokens'])} tokens"
    windows = {family.get("dead_training_window_tokens") for family in comparison["families"]} - {None}
    return f"{words}; in training for {_span(sorted(windows))}" if windows else words


def is_oracle(family: Family) -> bool:
    """Return True if latents were not selected per token; such figures are not comparable with the others."""
    return family["selection"] != PER_TOKEN


def fvu_against_l0(ax: Axes, families: list[Family]) -> str | None:
    """Draw one point per run."""
    return _scatter(ax, families, "fvu", "fvu")


def recovered_against_l0(ax: Axes, families: list[Family]) -> str | None:
    """Draw one point per run."""
    return _scatter(ax, families, "ce_recovered_mean", "ce recovered (mean ablation)")


def fvu_rows(ax: Axes, families: list[Family]) -> str | None:
    """Draw one row of points per family, because families of equal l0 overlap in the plot against l0."""
    return _strip(ax, families, "fvu", "fvu")


def recovered_rows(ax: Axes, families: list[Family]) -> str | None:
    """Draw one row of points per family."""
    return _strip(ax, families, "ce_recovered_mean", "ce recovered (mean ablation)")


def dead_bars(ax: Axes, families: list[Family]) -> str | None:
    """Draw the mean over seeds as a bar and the range as a line."""
    return _bars(ax, families, "dead_fraction", "fraction of dead latents")


def dense_bars(ax: Axes, families: list[Family]) -> str | None:
    """Draw the mean over seeds as a bar and the range as a line."""
    return _bars(ax, families, "dense_fraction", "fraction of dense latents")


def _row(family: Family, index: int, comparison: Comparison, say_tokens: bool) -> dict[str, Any]:
    name, arguments = encoder_parts(family["encoder"])
    parts = [name, arguments, f"{show(family['n_latents'])} latents"]
    parts += [f"{show(family['training_tokens'])} tokens"] * say_tokens
    parts += ["streamed from the model"] * family["live"]
    parts += [f"interpolated between {', '.join(family['between'])}"] if family.get("between") else []
    return {
        "number": index,
        "name": family["name"],
        "marker": swatch(index, is_oracle(family)),
        "badge": family["selection"] if is_oracle(family) else off_target_words(family),
        "words": " \u00b7 ".join(part for part in parts if part),
        "cells": [
            _cell(
                family["figures"].get(column.key),
                _decimals(comparison["families"], column.key),
                family["name"] in comparison["best"].get(column.key, ()),
            )
            for column in COLUMNS
        ],
    }


def _links(family: Family, report_of: Callable[[str], str | None]) -> dict[str, Any]:
    """Return the addresses of a family's reports: that of the only run, or one per seed."""
    directories = family.get("directories") or []
    seeds = family.get("seeds") or range(len(directories))
    found = [(f"seed {seed}", href) for seed, name in zip(seeds, directories, strict=False) if (href := report_of(name))]
    alone = len(directories) == 1 and len(found) == 1
    return {"href": found[0][1] if alone else None, "more": [] if alone else found}


def _cell(entry: dict[str, Any] | None, decimals: int, is_best: bool) -> Cell:
    mean = None if entry is None else finite(entry["mean"])
    if entry is None or mean is None:
        return Cell(_undrawn(entry), None)
    known = [value for value in entry["values"] if value is not None]
    low, middle, high = (_number(value, decimals) for value in (entry["min"], mean, entry["max"]))
    notes = [f"{low}\u2013{high}"] if low != high else []
    notes += [f"{len(known)} of {len(entry['values'])} seeds"] if len(known) < len(entry["values"]) else []
    return Cell(middle, mean, tuple(notes), "best mean" if is_best else "")


def _decimals(families: list[Family], key: str) -> int:
    """Return the decimals that show a typical value of the column, or its distance from 1, to three digits."""
    means = [entry["mean"] for family in families if (entry := family["figures"].get(key)) and entry["mean"] is not None]
    sizes = [size for mean in means if (size := min(abs(mean), abs(1 - mean))) > 0]
    return min(6, max(0, 2 - math.floor(math.log10(statistics.median(sizes))))) if sizes else 0


def _number(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    # A small number must not read as zero, and zero needs no decimals.
    return text if float(text.replace(",", "")) != 0 else show(value, digits=1)


def _span(values: list[int]) -> str:
    """Format sorted values as a single one, or as a range."""
    return show(values[0]) if len(values) == 1 else f"{show(values[0])}\u2013{show(values[-1])}"


def _scatter(ax: Axes, families: list[Family], key: str, label: str) -> str | None:
    words: list[str] = []
    points: list[tuple[float, float]] = []
    named: dict[str, tuple[str, float, float]] = {}
    for index, family in enumerate(families):
        figures = family["figures"]
        if key not in figures or "l0_mean" not in figures:
            continue
        runs = zip(figures["l0_mean"]["values"], figures[key]["values"], strict=True)
        known = [(x, y) for x, y in runs if x is not None and y is not None]
        if not known:
            continue
        ax.scatter([x for x, _ in known], [y for _, y in known], label=_name(family), **_points(index, family))
        points += known
        named[f"name-{key}-{index}"] = (_name(family), *known[0])
        words.append(f"{_name(family)} {show(figures[key]['mean'])} at l0 {show(figures['l0_mean']['mean'])}")
    if not points:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log_x, log_y = seed_spread(xs) > 4, seed_spread(ys) > 10
    if log_x:
        ax.set_xscale("log")
        plain_log_ticks(ax.xaxis)
    elif max(xs) - min(xs) < 0.04 * max(xs):
        # A single budget: without margins its noise would fill the axis.
        ax.set_xlim(0.9 * min(xs), 1.1 * max(xs))
    if log_y:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)
    ax.set(xlabel="l0, log scale" if log_x else "l0", ylabel=f"{label}, log scale" if log_y else label)
    ax.grid(visible=True)
    figure = ax.get_figure()
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=_legend_columns(families), columnspacing=1.2, handletextpad=0.3)
    name_points(ax, named)
    return f"{label} against l0, means: {', '.join(words)}."


def _strip(ax: Axes, families: list[Family], key: str, label: str) -> str | None:
    entries = [family["figures"].get(key) for family in families]
    known = [value for entry in entries if entry for value in entry["values"] if value is not None]
    if not known:
        return None
    for row, (family, entry) in enumerate(zip(families, entries, strict=True)):
        values = [value for value in entry["values"] if value is not None] if entry else []
        if values:
            ax.plot([min(values), max(values)], [row, row], color=MUTED, linewidth=1)
            ax.scatter(values, [row] * len(values), **_points(row, family))
        else:
            ax.text(0.01, row, _undrawn(entry), va="center", color=MUTED, transform=ax.get_yaxis_transform())
    if seed_spread(known) > 10:
        ax.set_xscale("log")
        plain_log_ticks(ax.xaxis)
        label += ", log scale"
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5))
    _name_rows(ax, families, label)
    ax.grid(visible=True, axis="both")
    return _row_words(families, entries, label)


def _bars(ax: Axes, families: list[Family], key: str, label: str) -> str | None:
    entries = [family["figures"].get(key) for family in families]
    widest = max((entry["max"] for entry in entries if entry and entry["max"] is not None), default=None)
    if widest is None:
        return None
    widest = widest or 1.0
    for row, (family, entry) in enumerate(zip(families, entries, strict=True)):
        if entry is None or entry["mean"] is None:
            ax.text(0.01, row, _undrawn(entry), va="center", color=MUTED, transform=ax.get_yaxis_transform())
            continue
        color, _ = look(row)
        ax.barh(row, entry["mean"], height=0.6, facecolor="none" if is_oracle(family) else color, edgecolor=color)
        ax.plot([entry["min"], entry["max"]], [row, row], color=INK, linewidth=1.4)
        ax.text(entry["max"] + 0.015 * widest, row, show(entry["mean"], digits=3), va="center")
    ax.set_xlim(0, 1.17 * widest)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _name_rows(ax, families, label)
    return _row_words(families, entries, label)


def _name_rows(ax: Axes, families: list[Family], label: str) -> None:
    """Label one row per family, the first on top."""
    ax.set_yticks(range(len(families)), [textwrap.fill(_name(family), NAME_WIDTH) for family in families])
    ax.set(ylim=(len(families) - 0.4, -0.6), xlabel=label)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=True, axis="x")


def _row_words(families: list[Family], entries: list[dict[str, Any] | None], label: str) -> str:
    means = [UNMEASURED if entry is None else show(entry["mean"], digits=3) for entry in entries]
    return f"{label}, means: {', '.join(f'{_name(family)} {mean}' for family, mean in zip(families, means, strict=True))}."


def _undrawn(entry: dict[str, Any] | None) -> str:
    return UNMEASURED if entry is None else UNDEFINED


def _points(index: int, family: Family) -> dict[str, Any]:
    color, marker = look(index)
    face = "none" if is_oracle(family) else color
    return {
        "s": 58 if marker == "*" else 30,
        "marker": marker,
        "facecolors": face,
        "edgecolors": color,
        "alpha": 0.8,
        "zorder": 3,
    }


def _name(family: Family) -> str:
    return f"{family['name']} \u2020" if is_oracle(family) else family["name"]


def _legend_columns(families: list[Family]) -> int:
    longest = max(len(_name(family)) for family in families)
    return 3 if longest <= 13 else 2 if longest <= 22 else 1


def _scatter_height(families: list[Family]) -> float:
    return SCATTER_INCHES + LEGEND_ROW_INCHES * math.ceil(len(families) / _legend_columns(families))


def _rows_height(families: list[Family]) -> float:
    lines = max(len(textwrap.wrap(_name(family), NAME_WIDTH)) for family in families)
    return AXIS_INCHES + len(families) * (ROW_INCHES + LINE_INCHES * lines)


# Title, note, drawing function, and height function.
PLOTS = (
    ("Reconstruction against sparsity", "One point per seed; down and left is better.", fvu_against_l0, _scatter_height),
    ("Cost to the model against sparsity", "One point per seed; up and left is better.", recovered_against_l0, _scatter_height),
    ("Reconstruction by run group", "One point per seed; left is better.", fvu_rows, _rows_height),
    ("Cost to the model by run group", "One point per seed; right is better.", recovered_rows, _rows_height),
    ("Dead latents", "Bar: mean over seeds. Line: lowest to highest seed.", dead_bars, _rows_height),
    ("Dense latents", "They carry little information. Bar: mean over seeds. Line: range.", dense_bars, _rows_height),
)
