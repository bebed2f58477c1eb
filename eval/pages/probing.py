"""Page of probing results: tiles and plots per task, and tables of factors that can be sorted and filtered."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from .bottleneck import CLASS_COLUMNS, bottleneck_class, draw_path
from .document import document, encoder_label
from .numbers import UNDEFINED, UNMEASURED, finite, show, show_interval
from .plots import ACCENT, BAD, INK, MUTED, WARN, PlotCard, plain_log_ticks, plot_card
from .probing_glossary import SECTIONS, TILES, definition
from .tables import Cell, Column, EntryRow, FigureTile

Results = dict[str, Any]
Row = dict[str, Any]
# What a factor is detected from: key, label, color.
DETECTORS = (
    ("latent", "best latent", ACCENT),
    ("probe", "linear probe", WARN),
    ("neuron", "best neuron", BAD),
    ("dimension", "best dimension", MUTED),
)
DICTIONARIES = {
    "latents": "reconstruction",
    "interpreted_latents": "interpreted latents",
    "mean_features": "supervised, means",
    "least_squares_features": "supervised, least squares",
}
PLACES = {"end": "end", "s2": "S2", "names": "names", "all": "all positions"}
ATTRIBUTES = {"io": "IO name", "s": "S name", "pos": "order"}
SUFFICIENCY = re.compile(r"supervised_(end|s2|names|all)_(\w+)_sufficiency")
EDIT = re.compile(r"supervised_edit_(io|s|pos)_(end|s2|names|all)_(\w+)")
TASKS = ("factors", "infomec", "supervised", "sparse_probing", "bottleneck", "scr", "tpp", "absorption")
SOURCE = re.compile(r"infomec_source_(.+?)_(\w*explicitness|nmi(?:_floor)?|latents?|values|tokens|entropy_nats)")
INCHES = (350 / 72, 270 / 72)
# SCR and TPP: labels of the lines by a part of their keys, and of the vertical axes.
SCORE = "score"
LINES = {"metric": SCORE, "total_metric": SCORE, "dir1": "spurious latents ablated", "dir2": "label latents ablated"}
LINES |= {"intended_diff_only": "own probe", "unintended_diff_only": "other probes"}
AXES = {"scr": "fraction of the gap closed", "tpp": "accuracy lost"}
COLORS = (MUTED, ACCENT, WARN, BAD)


def render_probing(found: Results, factors: list[Row], features: str | None = None, classes: Sequence[Row] = ()) -> str:
    """Render ``probing.json`` as a page. Equal input gives equal bytes.

    Args:
        factors: Lines of ``factors.jsonl``; may be empty.
        features: Address of the features page, to which latents link.
        classes: Lines of ``bottleneck.jsonl``; may be empty.
    """
    done = [task for task in TASKS if found.get(f"{task}_done")]
    return document(
        "probing.html",
        f"sparsary probing \u00b7 {found.get('checkpoint') or 'dictionary'}",
        ("table.css", "probing.css"),
        ("page.js", "table.js", "probing.js"),
        command="probing",
        heading=f"Probing of {show(found.get('n_latents'))} latents",
        shape=", ".join(task.replace("_", " ") for task in done) or "no task could run",
        facts={
            "model": found.get("model"),
            "hook": found.get("hook"),
            "encoder": encoder_label(found.get("encoder")),
            "checkpoint": found.get("checkpoint"),
            "labels": found.get("labels") or "embedded corpus",
            **({"factors": found["factor_file"]} if found.get("factor_file") else {}),
            "seed": found.get("seed"),
        },
        tiles=probing_tiles(found),
        plots=[card for card in _plots(found) if card.drawing is not None],
        left_out={task.replace("_", " "): found.get(f"{task}_why") for task in TASKS if found.get(f"{task}_done") is False},
        warnings=dict.fromkeys(found[key] for key in ("scr_warning", "tpp_warning") if found.get(key)),
        families=factor_families(found),
        sources=infomec_sources(found, features),
        source_columns=SOURCE_COLUMNS,
        factor_columns=FACTOR_COLUMNS,
        factors=[_factor(row, features) for row in factors],
        class_columns=CLASS_COLUMNS,
        classes=[bottleneck_class(row, features) for row in classes],
        sufficiency=_sufficiency(found),
        edits=_edits(found),
        sections=_entries(found),
    )


FACTOR_COLUMNS = [
    Column("tokens", "positives", None, "Number of tokens with the factor on the scored half of the documents."),
    *(Column(label, f"{key}_f1", max, definition(f"factors_{key}_f1")) for key, label, _ in DETECTORS),
    Column("AUROC", "latent_auroc", max, definition("factors_latent_auroc")),
    Column("precision", "latent_precision", max, "Precision of the best latent."),
    Column("recall", "latent_recall", max, "Recall of the best latent."),
    Column("split", "split", None, definition("factors_split")),
    Column("absorbed", "absorption_fraction", None, definition("factors_absorption_fraction")),
]


SOURCE_COLUMNS = [
    Column("values", "values", None, "Values that occur often enough in both halves of the documents."),
    Column("tokens", "tokens", None, "Tokens that have one of these values."),
    Column("NMI", "nmi", max, definition("infomec_source_x_nmi")),
    Column("floor", "nmi_floor", None, definition("infomec_source_x_nmi_floor")),
    Column("latents", "latents", None, definition("infomec_source_x_latents")),
    Column("explicit", "explicitness", max, definition("infomec_explicitness")),
    Column("in activation", "activation_explicitness", max, definition("infomec_activation_explicitness")),
]


def infomec_sources(found: Results, features: str | None) -> list[Row]:
    """Return a row for every source of InfoMEC, with its best latent."""
    rows: dict[str, Row] = {}
    for key, value in found.items():
        if match := SOURCE.fullmatch(key):
            rows.setdefault(match[1], {})[match[2]] = value
    shown = []
    for name, row in rows.items():
        latent = row.get("latent")
        href = f"{features}#{latent}" if features and isinstance(latent, int) else ""
        cells = [_cell(row, column.key) for column in SOURCE_COLUMNS]
        shown.append({"name": name, "latent": "" if latent is None else str(latent), "href": href, "cells": cells})
    return shown


def probing_tiles(found: Results) -> list[FigureTile]:
    """Return the key figures of the tasks that ran."""
    return [_tile(found, *entry) for entry in TILES if entry[0] in found]


def _tile(found: Results, key: str, label: str, note: str) -> FigureTile:
    low, high = (finite(found.get(f"{key}_{end}")) for end in ("low", "high"))
    words = re.sub(r"{(\w+)}", lambda match: show(found.get(match[1]), UNMEASURED, 3), note)
    missing, between = finite(found.get(key)) is None, "" if low is None or high is None else show_interval(low, high)
    return FigureTile(key, label, show(found[key], UNDEFINED, 3), words, missing, definition(key), between)


def factor_families(found: Results) -> Row:
    """Return the table of mean F1 by kind of factor."""
    names = [match[1] for key in found if (match := re.fullmatch(r"factors_(\w+)_latent_f1", key))]
    rows = [
        (
            name.replace("_", " "),
            [_cell(found, f"factors_{name}_{key}") for key in ("count", *(f"{d}_f1" for d, _, _ in DETECTORS))],
        )
        for name in names
    ]
    columns = [
        Column("factors", "count", None, "Number of factors of this kind."),
        *(Column(label, f"{key}_f1", max, definition(f"factors_{key}_f1")) for key, label, _ in DETECTORS),
    ]
    return {"columns": columns, "rows": rows}


def _factor(row: Row, features: str | None) -> Row:
    latent = row.get("latent")
    href = f"{features}#{latent}" if features and isinstance(latent, int) else ""
    return {
        "name": row["factor"],
        "latent": "" if latent is None else str(latent),
        "href": href,
        "cells": [_cell(row, column.key) for column in FACTOR_COLUMNS],
    }


def _cell(entries: Row, key: str) -> Cell:
    value = finite(entries.get(key))
    if value is None:
        why = next((entries[name] for name in (f"{key}_why", "absorption_why") if entries.get(name)), "")
        return Cell(UNDEFINED if key in entries else UNMEASURED, None, reason=str(why))
    low, high = (finite(entries.get(f"{key}_{end}")) for end in ("low", "high"))
    notes = () if low is None or high is None else (show_interval(low, high, " to "),)
    return Cell(show(entries[key], digits=3), value, notes)


def _sufficiency(found: Results) -> list[Row]:
    """Return sufficiency and necessity by dictionary and positions; positions without an effect give the reason."""
    pairs = dict.fromkeys(match.groups() for key in found if (match := SUFFICIENCY.fullmatch(key)))
    rows = []
    for place in dict.fromkeys(place for place, _ in pairs):
        kinds = [kind for at, kind in pairs if at == place]
        reasons = {found.get(f"supervised_{place}_{kind}_why") for kind in kinds}
        if len(kinds) > 1 and len(reasons) == 1 and None not in reasons:
            rows.append({"place": PLACES[place], "dictionary": "any", "why": reasons.pop(), "cells": []})
            continue
        for kind in kinds:
            cells = [_cell(found, f"supervised_{place}_{kind}_{key}") for key in ("sufficiency", "necessity")]
            name, why = DICTIONARIES.get(kind, kind.replace("_", " ")), found.get(f"supervised_{place}_{kind}_why")
            rows.append({"place": PLACES[place], "dictionary": name, "why": why, "cells": cells})
    return rows


def _edits(found: Results) -> Row:
    """Return how often edits of an attribute change the prediction as the counterfactual prompt does."""
    known = {match.groups(): key for key in found if (match := EDIT.fullmatch(key))}
    ways = list(dict.fromkeys(way for _, _, way in known if way != "why"))
    rows = []
    for attribute, place in dict.fromkeys(key[:2] for key in known):
        why = found.get(f"supervised_edit_{attribute}_{place}_why")
        cells = [_cell(found, f"supervised_edit_{attribute}_{place}_{way}") for way in ways]
        rows.append({"name": ATTRIBUTES[attribute], "place": PLACES[place], "why": why, "cells": cells})
    for name in ATTRIBUTES.values():
        own = [row for row in rows if row["name"] == name]
        if len(own) > 1 and own[0]["why"] and len({row["why"] for row in own}) == 1:
            rows = [row for row in rows if row["name"] != name or row is own[0]]
            own[0]["place"] = "any"
    labels = (re.sub(r"^latents_(\d+)$", r"\1 latents", way).replace("_", " ") for way in ways)
    return {"ways": [Column(label, way, None) for label, way in zip(labels, ways, strict=True)], "rows": rows}


def _plots(found: Results) -> Iterable[PlotCard]:
    yield plot_card(
        "Factors",
        "Mean F1 of the best detector of each kind, on held-out documents. Bars: 95% intervals.",
        lambda ax: _bars(ax, found),
        INCHES,
    )
    yield plot_card(
        "Sparse probing",
        "Accuracy of a probe on the k best latents or dimensions; dashed: on all of them. Bands: 95% intervals.",
        lambda ax: _accuracies(ax, found),
        INCHES,
    )
    yield plot_card(
        "Concept bottleneck",
        "Accuracy on validation rows along the path of L1 penalties, by nonzero weights; dashed: dense probe on test rows.",
        lambda ax: draw_path(ax, found),
        INCHES,
    )
    for task, title, note in (
        (
            "tpp",
            "Targeted probe perturbation",
            "Drop in accuracy when a class's latents are ablated. Score: own probe less other probes.",
        ),
        ("scr", "Spurious correlation removal", "Fraction of a biased probe's accuracy gap that ablation closes."),
    ):
        yield plot_card(title, note, lambda ax, task=task: _thresholds(ax, found, task), INCHES)


def _bars(ax: Axes, found: Results) -> str | None:
    entries = [entry for entry in DETECTORS if finite(found.get(f"factors_{entry[0]}_f1")) is not None]
    if not entries:
        return None
    for row, (key, _, color) in enumerate(entries):
        value = float(found[f"factors_{key}_f1"])
        low, high = (finite(found.get(f"factors_{key}_f1_{end}")) for end in ("low", "high"))
        ax.barh(row, value, height=0.6, color=color)
        if low is not None and high is not None:
            ax.errorbar(value, row, xerr=[[value - low], [high - value]], color=INK, linewidth=1.2, capsize=4)
        ax.text(max(value, high or value) + 0.025, row, show(value, digits=3), va="center")
    chance = finite(found.get("factors_chance_f1"))
    if chance is not None:
        ax.axvline(chance, color=MUTED, linestyle="--", linewidth=1, label=f"chance {show(chance, digits=2)}")
        ax.legend(loc="lower right")
    ax.set_yticks(range(len(entries)), [label for _, label, _ in entries])
    ax.set(xlim=(0, 1.1), ylim=(len(entries) - 0.4, -0.6), xlabel="mean F1 over factors")
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=True, axis="x")
    return "Mean F1: " + ", ".join(f"{label} {show(found[f'factors_{key}_f1'], digits=3)}" for key, label, _ in entries) + "."


def _accuracies(ax: Axes, found: Results) -> str | None:
    words = []
    for kind, label, color in (("sae", "latents", ACCENT), ("llm", "dimensions", WARN)):
        key = f"sparse_probing_{kind}_top_{{}}_test_accuracy"
        ks = sorted(
            int(m[1]) for name in found if (m := re.fullmatch(key.format(r"(\d+)"), name)) and finite(found[name]) is not None
        )
        values = [float(found[key.format(k)]) for k in ks]
        if not ks:
            continue
        ends = [[finite(found.get(f"{key.format(k)}_{end}")) for k in ks] for end in ("low", "high")]
        low, high = ([end for end in row if end is not None] for row in ends)
        if len(low) == len(high) == len(ks):
            ax.fill_between(ks, low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(ks, values, color=color, marker="o", markersize=4.5, linewidth=1.8, label=f"k {label}")
        words.append(f"{label} " + ", ".join(f"{show(v, digits=3)} at k {k}" for k, v in zip(ks, values, strict=True)))
        whole = finite(found.get(f"sparse_probing_{kind}_test_accuracy"))
        if whole is not None:
            ax.axhline(whole, color=color, linestyle="--", linewidth=1, label=f"all {label} {show(whole, digits=3)}")
    if not words:
        return None
    ax.set(xscale="log", xlabel="k, log scale", ylabel="test accuracy")
    plain_log_ticks(ax.xaxis)
    ax.grid(visible=True)
    ax.legend(loc="lower right")
    return f"Sparse probing accuracy: {'; '.join(words)}."


def _thresholds(ax: Axes, found: Results, task: str) -> str | None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, value in found.items():
        match = re.fullmatch(rf"{task}_(?:(\w+)_)?threshold_(\d+)(?:_(\w+))?", key)
        if match and finite(value) is not None and not key.endswith(("_low", "_high")):
            part = "_".join(part for part in (match[1], match[3]) if part)
            lines.setdefault(LINES.get(part, part.replace("_", " ")), []).append((int(match[2]), float(value)))
    if not lines:
        return None
    # The score may equal one of the others, so it is drawn below them and wider.
    for (label, points), color in zip(sorted(lines.items(), key=lambda line: line[0] != SCORE), COLORS, strict=False):
        size, width = (7, 4.5) if label == SCORE else (4.5, 1.8)
        ax.plot(*zip(*sorted(points), strict=True), color=color, marker="o", markersize=size, linewidth=width, label=label)
    ax.set(xscale="log", xlabel="latents ablated, log scale", ylabel=AXES[task])
    plain_log_ticks(ax.xaxis)
    ax.grid(visible=True)
    low, high = ax.get_ylim()
    # Room for the legend above the lines.
    ax.set_ylim(low, high + 0.16 * len(lines) * (high - low))
    ax.legend(loc="upper left")
    said = (
        f"{label} " + ", ".join(f"{show(y, digits=3)} at {x}" for x, y in sorted(points)) for label, points in lines.items()
    )
    return f"{task.upper()} by number of latents: {'; '.join(said)}."


def _entries(found: Results) -> dict[str, list[EntryRow]]:
    """Return every entry of the file by task, ends of intervals within their figure's row."""
    sections: dict[str, list[EntryRow]] = {title: [] for title in SECTIONS.values()}
    for key, value in found.items():
        if re.search(r"_(low|high|why)$", key) and re.sub(r"_(low|high|why)$", "", key) + "_done" not in found:
            continue
        prefix = next((prefix for prefix in SECTIONS if prefix and key.startswith(prefix)), "")
        text = show(value, UNDEFINED, 6) if value is None or isinstance(value, str | int | float) else None
        if text is None:
            continue
        low, high = (finite(found.get(f"{key}_{end}")) for end in ("low", "high"))
        reason = str(found.get(f"{key}_why") or "")
        text += f" ({show_interval(low, high)})" if low is not None and high is not None else ""
        sections[SECTIONS[prefix]].append(EntryRow(key, text, definition(key), reason))
    return {title: rows for title, rows in sections.items() if rows}
