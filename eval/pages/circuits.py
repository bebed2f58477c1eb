"""Page of a circuit benchmark: curves, a table by family and method, and drawings of the circuits.

The URL fragment holds the view's state, so that a view can be shared: ``#method=attribution&q=latents&sort=-cpr``.
"""

from collections.abc import Mapping
from typing import Any

from .charts import COLORS
from .circuit_drawing import CircuitDrawing, draw_circuit
from .circuit_glossary import EXPLANATIONS, explanation
from .circuit_heads import head_tables_of
from .circuit_plots import LEVEL, PANELS, family_labels, panel, sample
from .document import document
from .drawn_latents import DrawnLatent
from .numbers import UNDEFINED, UNMEASURED, UNRECORDED, finite, show, show_interval
from .tables import Cell, Column, FigureTile

Row = dict[str, Any]
# Family and unit name -> what is known of the latent.
Latents = Mapping[tuple[str, str], DrawnLatent]
NO_FEATURES = (
    " Nodes show top tokens and link to features after: sparsary features {checkpoint} (each dictionary of a folder by itself) "
    "and sparsary render circuits.json."
)

COLUMNS = (
    Column("CPR", "cpr", max),
    Column("CMD", "cmd", min),
    Column("nodes 50%", "nodes_50", min),
    Column("nodes 80%", "nodes_80", min),
    Column("nodes 90%", "nodes_90", min),
    Column("held out", "faithfulness_80", None),
    # Neither direction is better: both depend on circuit size (all units leave nothing out; few large ones are each needed).
    Column("completeness", "completeness", None),
    Column("minimality", "minimality", None),
    Column("stability", "stability", max),
    Column("r exact", "exact_pearson", max),
    Column("all kept", "faithfulness_all", None),
    # Neither direction is better: random scores cost nothing.
    Column("passes", "forwards", None),
    Column("seconds", "seconds", None),
)
AUC = Column("AUC", "auc", max)
# Reasons why a figure may be null.
REASONS = {
    "faithfulness_80": f"no circuit has faithfulness {LEVEL:g}",
    "completeness": f"no circuit has faithfulness {LEVEL:g}",
    "minimality": f"no circuit has faithfulness {LEVEL:g}",
    "stability": f"no circuit has faithfulness {LEVEL:g}, or the method does not score pair by pair",
    "exact_pearson": "too few units differ in score or in effect",
}


def render_circuits(found: Row, latents: Latents | None = None) -> str:
    """Render ``circuits.json`` as a page. Equal input gives equal bytes.

    ``latents`` says of the drawn units, by family and name, what is known of them.
    """
    rows: list[Row] = found["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    labels = family_labels(found)
    counted = (
        _count(len(tasks), "task"),
        _count(len(labels), "unit set"),
        _count(len(methods), "method"),
    )
    return document(
        "circuits.html",
        f"sparsary circuits \u00b7 {found['model']}",
        ("table.css", "circuits.css"),
        ("page.js", "table.js", "circuits.js"),
        COLORS,
        command="circuits",
        heading=f"Circuits of {found['model']}",
        shape=" \u00b7 ".join(counted),
        facts={
            "tasks": ", ".join(found["tasks"]),
            "ablation": found.get("ablation"),
            "corruption": show(found.get("corruption"), "task default"),
            "pairs": f"{show(found.get('pairs'), UNRECORDED)}, half to find circuits, half to evaluate them",
            "seed": found.get("seed"),
            **({"doubts": "; ".join(found["doubts"])} if found.get("doubts") else {}),
        },
        dictionaries={name: f"{_count(len(hooks), 'hook')}: {', '.join(hooks)}" for name, hooks in found["hooks"].items()},
        methods=methods,
        families=[{"name": name, "label": label, "line": sample(index)} for index, (name, label) in enumerate(labels.items())],
        sections=[_section(found, task, index, methods, labels, latents or {}) for index, task in enumerate(tasks)],
        known=_known(rows, tasks, labels),
        notes={title: _notes(entries) for title, entries in EXPLANATIONS.items()},
    )


def _section(found: Row, task: str, index: int, methods: list[str], labels: dict[str, str], latents: Latents) -> Row:
    rows = [row for row in found["rows"] if row["task"] == task]
    # Files of older versions lack some figures.
    columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
    best = {column.key: _best(rows, column) for column in columns}
    return {
        "task": task,
        "columns": [column._replace(title=explanation(column.key)) for column in columns],
        "families": [
            {"number": number, "label": label, "line": sample(number)}
            for number, (name, label) in enumerate(labels.items())
            if any(row["family"] == name for row in rows)
        ],
        "tiles": _tiles(rows, labels),
        "plots": {method: [panel(found, task, method, key, list(labels)) for key in PANELS] for method in methods},
        "rows": [
            _family_row(row, labels)
            | {
                "units": _count(row["units"], "unit") if "units" in row else "",
                "refused": row.get("refused"),
                "cells": [] if "refused" in row else [_cell(row, key, best[key]) for key in best],
            }
            for row in rows
        ],
        "heads": head_tables_of(found, task),
        "circuits": {
            method: _circuits(found, task, method, f"{index}-{at}", labels, latents) for at, method in enumerate(methods)
        },
    }


def _family_row(row: Row, labels: dict[str, str]) -> Row:
    """Return a table row's cells on family and method."""
    number = list(labels).index(row["family"])
    about = {"number": number, "line": sample(number), "label": labels[row["family"]], "units": ""}
    return about | {key: row[key] for key in ("family", "method")}


def _tiles(rows: list[Row], labels: dict[str, str]) -> list[FigureTile]:
    first = rows[0]
    metric, corruption = (show(first.get(key), UNRECORDED) for key in ("metric", "corruption"))
    figures = (
        ("accuracy", "accuracy", "of clean prompts answered correctly"),
        ("metric_clean", "clean", f"{metric}, mean over pairs"),
        ("metric_corrupted", "corrupted", f"{metric}; corruption: {corruption}"),
        ("pairs", "pairs", "for evaluation; others find the circuits"),
    )
    tiles = [
        FigureTile(key, label, show(first.get(key), UNMEASURED, 3), note, text=explanation(key)) for key, label, note in figures
    ]
    for key, label, better in (("nodes_80", "smallest circuit of 0.8", min), ("cpr", "best CPR", max)):
        known = [(value, row) for row in rows if (value := finite(row.get(key))) is not None]
        value, note = UNDEFINED, "no circuit reaches it"
        if known:
            best, row = better(known, key=lambda pair: pair[0])
            value = show(int(best) if key == "nodes_80" else best, digits=3)
            note = f"{'nodes: ' * (key == 'nodes_80')}{labels[row['family']]}, {row['method']}"
        tiles.append(FigureTile(key, label, value, note, text=explanation(key)))
    return tiles


def _cell(row: Row, key: str, best: float | None) -> Cell:
    value = finite(row.get(key))
    if value is None:
        nothing = UNMEASURED if key not in row else "never" if key.startswith("nodes_") else "none"
        return Cell(nothing, None, reason=REASONS.get(key, "") if key in row else "")
    return Cell(show(row[key], digits=3), value, _beside(row, key, value), "best of this task" if value == best else "")


def _beside(row: Row, key: str, value: float) -> tuple[str, ...]:
    """Return the small notes below a figure."""
    low, high = (finite(row.get(f"{key}_{end}")) for end in ("low", "high"))
    if low is not None and high is not None:
        return (show_interval(low, high),)
    if key.startswith("nodes_") and row.get("units"):
        share = 100 * value / row["units"]
        return (f"{share:.0f}%" if share >= 10 else f"{show(share, digits=2)}%",)
    said = {
        "faithfulness_all": f"empty {show(row.get('metric_empty'), UNMEASURED, 3)}",
        "exact_pearson": f"rank {show(row.get('exact_spearman'), digits=2)}",
        "forwards": f"+{show(row.get('backwards'))} back",
    }
    return (said[key],) if key in said else ()


def _best(rows: list[Row], column: Column) -> float | None:
    values = [value for row in rows if (value := finite(row.get(column.key))) is not None]
    # If all are equal, none is best.
    return column.better(values) if column.better is not None and len(set(values)) > 1 else None


def _circuits(
    found: Row, task: str, method: str, prefix: str, labels: dict[str, str], latents: Latents
) -> list[CircuitDrawing]:
    """Return the drawings of a method's circuits."""
    own = [entry for entry in found["circuits"] if (entry["task"], entry["method"]) == (task, method)]
    return [_circuit(found, entry, f"{prefix}-{number}", labels, latents) for number, entry in enumerate(own)]


def _circuit(found: Row, entry: Row, identifier: str, labels: dict[str, str], latents: Latents) -> CircuitDrawing:
    hooks = next((own for name, own in found["hooks"].items() if entry["family"].startswith(f"{name}: ")), [])
    sizes = [
        row.get("nodes_80") for row in found["rows"] if all(row[key] == entry[key] for key in ("task", "family", "method"))
    ]
    size, drawn = next(iter(sizes), None), len(entry["units"])
    which = f"The {drawn} of largest score" if size is not None and size > drawn else "All"
    note = (
        f"{which} of the {show(size, 'unrecorded')} units with faithfulness {LEVEL:g}. Rows are hooks, the first at the "
        f"bottom; shading: score. Lines: {explanation('weight').removeprefix('Edge: ')}"
    )
    title = f"Circuit \u00b7 {entry['task']} \u00b7 {entry['method']} \u00b7 {labels.get(entry['family'], entry['family'])}"
    known = {name: latent for (family, name), latent in latents.items() if family == entry["family"]}
    note += "" if known or not hooks else NO_FEATURES.format(checkpoint=entry["family"].rpartition(": ")[0])
    return draw_circuit(entry, hooks, identifier, title, note, known)


def _known(rows: list[Row], tasks: list[str], labels: dict[str, str]) -> Row:
    """Return the table of AUCs against ground-truth units, for rows that have them."""
    known = {(row["family"], row["method"], row["task"]): row for row in rows if "auc" in row}
    shown = [task for task in tasks if any(place[2] == task for place in known)]
    best = {task: _best([row for place, row in known.items() if place[2] == task], AUC) for task in shown}
    return {
        "columns": [Column(task, f"auc_{index}", None) for index, task in enumerate(shown)],
        "rows": [
            _family_row({"family": family, "method": method}, labels)
            | {"cells": [_cell(known.get((family, method, task), {}), "auc", best[task]) for task in shown]}
            for family, method in dict.fromkeys(place[:2] for place in known)
        ],
        "note": explanation("auc"),
    }


def _notes(entries: dict[str, str]) -> list[Column]:
    labels: dict[str, str] = {column.key: column.label for column in (*COLUMNS, AUC)}
    return [Column(labels.get(key, key.replace("_", " ")), key, None, text) for key, text in entries.items()]


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
