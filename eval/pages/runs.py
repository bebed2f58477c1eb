"""Page that compares runs: Pareto plots, and tables that can be sorted and filtered.

The URL fragment holds the view's state, so that a view can be shared: ``#q=topk l0<40&sort=fvu``.
"""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes

from .charts import COLORS, look, seed_spread, swatch
from .differences import difference_table
from .document import document, encoder_parts, kind_label
from .fronts import LEGEND as AREAS_LEGEND
from .fronts import area_rows, front_cards
from .glossary import EXPLANATIONS
from .numbers import UNMEASURED, finite, show, show_interval
from .plots import INK, name_points, plain_log_ticks, plot_card
from .tables import Cell, Column, explained, figure_cell

Run = dict[str, Any]
COLUMNS = (
    Column("l0", "l0_mean", None),
    Column("fvu", "fvu", min),
    Column("ce increase", "ce_increase", min),
    Column("ce recovered", "ce_recovered_mean", max),
    Column("KL", "kl_spliced", min),
    Column("same top token", "top1_agreement", max),
    Column("dead", "dead_fraction", min),
    Column("dead in training", "dead_training_fraction", min),
    Column("dense", "dense_fraction", min),
    Column("nearest direction", "decoder_max_cosine_mean", None),
    Column("linear error", "linear_error_share", min),
)
SIZE = (430 / 72, 330 / 72)
PLOTS = (
    ("fvu", "Reconstruction against sparsity", "Down and left is better. Bars: 95% intervals over documents."),
    ("ce_increase", "Cost to the model against sparsity", "Down and left is better. Bars: 95% intervals over documents."),
)
LEGEND = "Small: 95% intervals over documents. Shaded: on the Pareto front of the column against l0."
REMARK = (
    "Intervals cover the choice of documents, not of training seeds: two runs of one recipe may differ by more than their "
    "intervals. Compare dead fractions only over equal windows of tokens."
)


def render_runs(comparison: dict[str, Any], report_of: Callable[[str], str | None] = lambda directory: None) -> str:
    """Render the result of ``collect_runs`` as a page; ``report_of`` maps directories to the addresses of their reports."""
    runs: list[Run] = comparison["runs"]
    order = sorted(range(len(runs)), key=lambda index: _rank(runs[index]))
    families = list(dict.fromkeys(family_of(run) for run in runs))
    names = {"model": "model", "hook": "hook", "text": "text", "tokens": "evaluated on"}
    return document(
        "comparison.html",
        f"sparsary comparison \u00b7 {len(runs)} runs",
        ("table.css", "comparison.css"),
        ("page.js", "table.js", "comparison.js"),
        COLORS,
        command="comparison",
        heading=f"{len(runs)} runs",
        facts={name: _shared(runs, key) for key, name in names.items()},
        warnings={
            key: "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
            for key, values in comparison["different"].items()
        },
        thing="run",
        things="Runs",
        example="l0<40, fvu>0.1",
        columns=explained(COLUMNS),
        rows=[_row(runs[index], index, families, comparison["pareto"], report_of) for index in order],
        tested=difference_table(comparison, COLUMNS),
        areas=area_rows(comparison),
        areas_legend=AREAS_LEGEND,
        legend=LEGEND,
        plots=[
            plot_card(title, note, lambda ax, key=key: against_l0(ax, runs, families, comparison, key), SIZE, COLORS)
            for key, title, note in PLOTS
        ]
        + front_cards(comparison),
        sections={title: entries for title, texts in EXPLANATIONS.items() if (entries := _entries(list(texts), runs))},
        remarks=[REMARK, *_interpolated(comparison)],
    )


def _interpolated(comparison: dict[str, Any]) -> list[str]:
    """Return the remark on families whose figures are interpolated between sparsity budgets."""
    sweeps = [family for family in comparison.get("families", ()) if family["between"]]
    words = ", ".join(f"{family['name']} between {' and '.join(family['between'])}" for family in sweeps)
    return [f"Interpolated to an l0 of {show(comparison['match_l0'])}: {words}."] if sweeps else []


def family_of(run: Run) -> str:
    """Return the family of a run: runs that differ only in sparsity budget or seed share one, and are drawn alike."""
    report = run["report"]
    words = [
        encoder_parts(report.get("encoder"))[0],
        kind_label(report.get("kind")),
        f"{show(report.get('n_latents'))} latents",
    ]
    return " ".join(str(word) for word in words if word)


def against_l0(ax: Axes, runs: list[Run], families: list[str], comparison: dict[str, Any], key: str) -> str | None:
    """Draw one named point per run with its interval, lines through runs of one family and budget, and the Pareto front."""
    points = {
        index: (x, y)
        for index, run in enumerate(runs)
        if (x := finite(run["report"].get("l0_mean"))) is not None and (y := finite(run["report"].get(key))) is not None
    }
    if not points:
        return None
    for number, family in enumerate(families):
        color, marker = look(number)
        own = sorted((index for index in points if family_of(runs[index]) == family), key=lambda index: points[index])
        # Runs of unequal training are not a sweep over sparsity.
        for budget in dict.fromkeys(runs[index]["report"].get("training_tokens") for index in own):
            swept = [points[index] for index in own if runs[index]["report"].get("training_tokens") == budget]
            ax.plot(*zip(*swept, strict=True), color=color, linewidth=1, alpha=0.45)
        for place, index in enumerate(own):
            x, y = points[index]
            low, high = (finite(runs[index]["report"].get(f"{key}_{end}")) for end in ("low", "high"))
            if low is not None and high is not None:
                (line,) = ax.plot([x, x], [low, high], color=color, linewidth=1.4)
                line.set_gid(f"interval-{key}-{index}")
            dot = ax.scatter([x], [y], s=34, marker=marker, color=color, zorder=3, label=family if place == 0 else None)
            dot.set_gid(f"point-{key}-{index}")
    by_name = {run["name"]: index for index, run in enumerate(runs)}
    front = [points[by_name[name]] for name in comparison["pareto"][key]]
    if len(front) > 1:
        ax.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1, linestyle=":", label="Pareto front")
    ax.margins(0.12)
    budgets = [x for x, _ in points.values()]
    if max(budgets) - min(budgets) < 0.04 * max(budgets):
        # A single budget: without margins its noise would fill the axis.
        ax.set_xlim(0.9 * min(budgets), 1.1 * max(budgets))
    for values, axis, name in (
        ([x for x, _ in points.values()], ax.xaxis, "x"),
        (_tall(points, runs, key), ax.yaxis, "y"),
    ):
        if seed_spread(values) > 4:
            getattr(ax, f"set_{name}scale")("log")
            plain_log_ticks(axis)
    ax.set(xlabel="l0", ylabel=_explained_label(key))
    ax.grid(visible=True)
    figure = ax.get_figure()
    assert figure is not None
    figure.legend(
        loc="outside lower center", ncols=1 if max(map(len, families)) > 24 else 2, columnspacing=1.2, handletextpad=0.3
    )
    name_points(ax, {f"name-{key}-{index}": (runs[index]["name"], *point) for index, point in points.items()})
    words = ", ".join(
        f"{runs[index]['name']} {show(y, digits=3)} at l0 {show(x, digits=3)}" for index, (x, y) in points.items()
    )
    return f"{key} against l0: {words}. Pareto front: {', '.join(comparison['pareto'][key])}."


def _tall(points: dict[int, tuple[float, float]], runs: list[Run], key: str) -> list[float]:
    """Return all values drawn along the y axis, including interval ends."""
    ends = (finite(runs[index]["report"].get(f"{key}_{end}")) for index in points for end in ("low", "high"))
    return [y for _, y in points.values()] + [end for end in ends if end is not None]


def _explained_label(key: str) -> str:
    return {"ce_increase": "ce increase, nats per token"}.get(key, key)


def _rank(run: Run) -> tuple[int, float]:
    """Return the sort key of a run: lowest ce_increase first, then runs without it by fvu."""
    costs = [finite(run["report"].get(key)) for key in ("ce_increase", "fvu")]
    return next(((place, cost) for place, cost in enumerate(costs) if cost is not None), (len(costs), 0.0))


def _shared(runs: list[Run], key: str) -> str:
    values = list(dict.fromkeys(show(run["report"].get(key)) for run in runs))
    return values[0] + " tokens" * (key == "tokens") if len(values) == 1 else f"{len(values)} different"


def _row(
    run: Run, index: int, families: list[str], fronts: dict[str, list[str]], report_of: Callable[[str], str | None]
) -> dict[str, Any]:
    report = run["report"]
    name, arguments = encoder_parts(report.get("encoder"))
    words = [f"{name} {kind_label(report.get('kind'))}".strip(), arguments, f"{show(report.get('n_latents'))} latents"]
    words += [f"{show(report['training_tokens'])} tokens"] if report.get("training_tokens") else []
    selection = report.get("selection", "per token")
    return {
        "number": index,
        "name": run["name"],
        "href": report_of(run["directory"]),
        "more": [],
        "marker": swatch(families.index(family_of(run))),
        "badge": "" if selection == "per token" else str(selection),
        "words": " \u00b7 ".join(word for word in words if word),
        "cells": [_cell(run, column.key, run["name"] in fronts.get(column.key, ())) for column in COLUMNS],
    }


def _cell(run: Run, key: str, on_front: bool) -> Cell:
    cell = figure_cell(run["report"], key)
    if cell.value is None:
        return cell._replace(reason=run["reasons"].get(key, ""))
    low, high = (finite(run["report"].get(f"{key}_{end}")) for end in ("low", "high"))
    notes = () if low is None or high is None else (show_interval(low, high, " to "),)
    return cell._replace(notes=notes, best="on the Pareto front" if on_front else "")


def _entries(keys: list[str], runs: list[Run]) -> dict[str, list[str]]:
    """Return a section of the long table: every entry that is a number in at least one report."""
    values = {key: [run["report"].get(key, UNMEASURED) for run in runs] for key in keys}
    return {
        key: [show(value, digits=5) for value in row]
        for key, row in values.items()
        if any(finite(value) is not None for value in row)
    }
