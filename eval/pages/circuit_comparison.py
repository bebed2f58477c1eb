"""Page of a comparison of circuits: matrices of tasks, overlaps, shared units, changed units, repairs."""

from typing import Any

from .circuit_comparison_glossary import EXPLANATIONS
from .document import document
from .numbers import UNDEFINED, finite, show, show_interval
from .tables import Cell, Column

Row = dict[str, Any]
EQUAL, FAITHFUL = "equal size", "faithfulness 0.8"
ALPHA = 0.05
TEXTS = {key: text for entries in EXPLANATIONS.values() for key, text in entries.items()}


def _column(label: str, key: str) -> Column:
    return Column(label, key, None, TEXTS.get(key, ""))


OVERLAPS = (
    _column("shared units", "shared"),
    _column("Jaccard", "jaccard"),
    _column("of smaller", "share_of_smaller"),
    _column("rank corr.", "spearman"),
    _column("halves", "jaccard_halves"),
    _column("ceiling", "ceiling"),
    _column("floor", "floor"),
    _column("p", "p"),
    _column("shared on a", "shared_on_a"),
    _column("shared on b", "shared_on_b"),
)
DIFFERENCES = (_column("difference", "difference"), Column("p", "p", None))
UNITS = (
    Column("score, base", "score_base", None),
    Column("score, tuned", "score_tuned", None),
    _column("gain", "gain"),
    _column("exchanged", "exchanged"),
    Column("into base", "into_base", None),
    Column("into tuned", "into_tuned", None),
)
REPAIRS = (
    Column("before", "accuracy_before", None),
    _column("after", "accuracy_after"),
    Column("change", "change", None),
    Column("random units", "floor", None, TEXTS["random"]),
    _column("opposite answers", "accuracy_opposite"),
    _column("all of a", "accuracy_all_of_a"),
)


def render_circuit_comparison(found: Row) -> str:
    """Render ``circuit_comparison.json`` as a page. Equal input gives equal bytes."""
    places = list(dict.fromkeys((row["family"], row["method"]) for row in found["tasks_scored"]))
    models = found["models"]
    return document(
        "circuit_comparison.html",
        f"sparsary circuits \u00b7 {' and '.join(models)}",
        ("table.css", "circuit_comparison.css"),
        ("page.js", "table.js", "sorted.js"),
        command="circuits --compare",
        heading=f"Circuits compared: {' and '.join(models)}",
        shape=f"{_count(len(found['tasks']), 'task')} \u00b7 {_count(len(models), 'model')} \u00b7 "
        f"{_count(len(places), 'unit set and method', 'unit sets and methods')}",
        facts={
            "tasks": ", ".join(found["tasks"]),
            "dictionaries": ", ".join(found["checkpoints"]) or "none",
            "ablation": found["ablation"],
            "pairs": f"{show(found['pairs'])}, half to find circuits, half to evaluate them",
            "random circuits": found["random_circuits"],
            "seed": found["seed"],
        },
        doubts=found["doubts"],
        competence=[_competence(row) for row in found["competence"]],
        sections=[_section(found, family, method, number) for number, (family, method) in enumerate(places)],
        refused=found["refused"],
        notes={
            title: [Column(key.replace("_", " "), key, None, text) for key, text in entries.items()]
            for title, entries in EXPLANATIONS.items()
        },
    )


def _section(found: Row, family: str, method: str, number: int) -> Row:
    """Return what one unit set and method show: matrices, then tables."""

    def own(table: str) -> list[Row]:
        return [row for row in found[table] if (row["family"], row["method"]) == (family, method)]

    tasks, overlaps, cross = own("tasks_scored"), own("overlaps"), own("cross")
    names = [row["name"] for row in tasks]
    return {
        "title": f"{family} \u00b7 {method}",
        "id": f"set-{number}",
        "tasks": [_task(row) for row in tasks],
        "names": names,
        "matrices": [_jaccards(names, overlaps, at) for at in (EQUAL, FAITHFUL)],
        "crosses": [_crosses(names, cross, at) for at in (EQUAL, FAITHFUL)],
        "overlap_columns": OVERLAPS,
        "overlaps": [_overlap(row) for row in overlaps],
        "difference_columns": DIFFERENCES,
        "differences": [_texts(row, ("a", "b", "c")) | {"cells": _cells(row, DIFFERENCES)} for row in own("differences")],
        "shared": [_shared(row, names) for row in own("shared")],
        "changed": [_changed(row) for row in own("changed")],
        "unit_columns": UNITS,
        "repair_columns": REPAIRS,
        "repairs": [_repair(row) for row in own("repairs")],
    }


def _competence(row: Row) -> Row:
    at = "at chance" if row["at_chance"] else ""
    return {
        "task": row["task"],
        "model": row["model"],
        "cells": [Cell(show(row[key], digits=3), finite(row[key])) for key in ("accuracy", "chance", "metric", "difference")],
        "note": at,
    }


def _task(row: Row) -> Row:
    size = "never" if row["nodes_80"] is None else show(row["nodes_80"])
    return {
        "name": row["name"],
        "words": f"{size} of {show(row['units'])} units for faithfulness 0.8",
        "equal": show(row["equal_size"]),
        "refused": row["refused"],
    }


def _jaccards(names: list[str], overlaps: list[Row], at: str) -> Row:
    """Return the matrix of Jaccard indices; its diagonal is the ceiling of each task."""
    found: dict[tuple[str, str], Row] = {}
    for row in overlaps:
        if row["at"] == at:
            found[row["a"], row["b"]] = found[row["b"], row["a"]] = row
    rows = []
    for a in names:
        cells = [_ceiling(a, overlaps, at) if a == b else _jaccard(found.get((a, b))) for b in names]
        rows.append({"name": a, "cells": cells})
    return {"title": f"Jaccard index, {at}", "rows": rows}


def _jaccard(row: Row | None) -> Row:
    if row is None or "refused" in row:
        return {"text": "none", "notes": (), "shade": 0, "title": "" if row is None else row["refused"]}
    marked = "*" if row["p_holm"] <= ALPHA else ""
    notes = (show_interval(row["jaccard_low"], row["jaccard_high"]), f"chance {show(row['floor'], digits=2)}")
    title = f"p = {show(row['p_holm'], digits=2)} after correction; {row['shared']} shared units"
    return {"text": show(row["jaccard"], digits=3) + marked, "notes": notes, "shade": _shade(row["jaccard"]), "title": title}


def _ceiling(name: str, overlaps: list[Row], at: str) -> Row:
    known = [
        row[f"ceiling_{side}"] for row in overlaps for side in "ab" if row["at"] == at and row[side] == name and "p" in row
    ]
    if not known:
        return {"text": "none", "notes": (), "shade": 0, "title": "no circuit of this size"}
    return {"text": show(known[0], digits=3), "notes": ("two halves",), "shade": _shade(known[0]), "title": TEXTS["ceiling"]}


def _crosses(names: list[str], cross: list[Row], at: str) -> Row:
    """Return the matrix of every circuit's faithfulness on every task."""
    found = {(row["circuit"], row["task"]): row for row in cross if row["at"] == at}
    rows = [{"name": name, "cells": [_cross(found.get((name, task))) for task in names]} for name in names]
    return {"title": f"Faithfulness on each task, {at}", "rows": rows}


def _cross(row: Row | None) -> Row:
    value = None if row is None else finite(row.get("faithfulness"))
    if row is None or value is None:
        return {
            "text": "none",
            "notes": (),
            "shade": 0,
            "title": "no circuit" if row is None else row.get("refused", UNDEFINED),
        }
    notes = (_interval(row, "faithfulness"), f"random {_decimals(row['floor'])}, best {_decimals(row['floor_best'])}")
    return {"text": _decimals(value), "notes": notes, "shade": _shade(value), "title": f"{row['size']} units"}


def _overlap(row: Row) -> Row:
    about = _texts(row, ("a", "b", "at")) | {"refused": row.get("refused")}
    return about | {"cells": [] if "refused" in row else _cells(row, OVERLAPS)}


def _cells(row: Row, columns: tuple[Column, ...]) -> list[Cell]:
    return [_cell(row, column.key) for column in columns]


def _cell(row: Row, key: str) -> Cell:
    value = finite(row.get(key))
    if value is None:
        return Cell("none", None, reason="not defined")
    notes = [_interval(row, key)] if finite(row.get(f"{key}_low")) is not None else []
    notes += [f"corrected {show(row['p_holm'], digits=2)}"] if key == "p" else []
    notes += [f"random, best {show(row['floor_best'], digits=3)}"] if key == "floor" and "floor_best" in row else []
    notes += [f"97.5% {show(row['floor_high'], digits=2)}"] if key == "floor" and "floor_high" in row else []
    beyond = "exceeds the difference between two halves of the pairs" if row.get(f"{key}_beyond_ceiling") else ""
    small = key.startswith(("shared_on", "accuracy", "jaccard"))
    return Cell(_decimals(value) if small else show(row[key], digits=3), value, tuple(notes), beyond)


def _interval(row: Row, key: str) -> str:
    low, high = (finite(row.get(f"{key}_{end}")) for end in ("low", "high"))
    return "no interval" if low is None or high is None else show_interval(round(low, 3) + 0.0, round(high, 3) + 0.0)


def _decimals(value: float | None) -> str:
    """Return a share with three decimals at most; tiny ones are 0."""
    return show(None if value is None else round(value, 3) + 0.0, digits=3)


def _shared(row: Row, names: list[str]) -> Row:
    cells = [
        Cell(
            show(row["scores"].get(name), digits=3),
            finite(row["scores"].get(name)),
            (),
            "in its circuit" * (name in row["circuits"]),
        )
        for name in names
    ]
    return {"unit": row["unit"], "group": row["group"], "cells": cells}


def _changed(row: Row) -> Row:
    counts = {status: row[status] for status in ("gained", "lost", "kept")}
    effects = []
    for key, figure, words in (
        ("ablated", "lost", "of the tuned model's metric is lost with the gained units ablated"),
        ("put", "closed", "of the models' difference is closed by the gained units' outputs in the base model"),
    ):
        if effect := row.get(key):
            effects.append(_effect(effect, figure, words))
    return {
        "task": row["task"],
        "shown": show(len(row["units"])),
        "counts": ", ".join(f"{show(number)} {status}" for status, number in counts.items()),
        "sizes": f"{show(row['size_base'])} units in the base model's circuit, {show(row['size_tuned'])} in the tuned one's",
        "ceiling": show(row["ceiling_exchanged"], digits=3),
        "ceiling_gain": show(row["ceiling_gain"], digits=3),
        "doubts": row["doubts"],
        "effects": effects,
        "units": [
            _texts(unit, ("unit", "status")) | {"group": unit["group"], "cells": _cells(unit, UNITS)} for unit in row["units"]
        ],
    }


def _effect(effect: Row, figure: str, words: str) -> str:
    accuracy = f"accuracy {show(effect['accuracy_before'], digits=3)} before, {show(effect['accuracy_after'], digits=3)} after"
    random = (
        f"random units of equal counts per hook: {show(effect['floor'], digits=3)}, best {show(effect['floor_best'], digits=3)}"
    )
    return f"{show(effect[figure], digits=3)} ({_interval(effect, figure)}) {words}; {accuracy}; {random}."


def _repair(row: Row) -> Row:
    about = _texts(row, ("a", "b")) | {"refused": row.get("refused"), "note": row.get("doubt", "")}
    if "refused" in row:
        return about | {"cells": [], "words": ""}
    left = f", {row['pairs_left_out']} without a partner" if row["pairs_left_out"] else ""
    words = f"{_count(row['n_units'], 'unit')} at {', '.join(row['positions'])}; {_count(row['pairs'], 'pair')}{left}"
    return about | {"words": words, "cells": _cells(row, REPAIRS)}


def _texts(row: Row, keys: tuple[str, ...]) -> Row:
    return {key: row[key] for key in keys}


def _shade(value: float) -> int:
    """Return the shading of a cell in percent."""
    return round(55 * min(1.0, max(0.0, value)))


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
