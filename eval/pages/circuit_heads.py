"""Tables of the circuits page about heads: direct effects with attention to labels, and accuracy by rank."""

from typing import Any

from .circuit_glossary import explanation
from .numbers import UNMEASURED, finite, show, show_interval
from .tables import Cell, Column

Row = dict[str, Any]

EFFECTS = (
    Column("direct effect", "direct", None),
    Column("share", "direct_share", None),
    Column("right label", "attention_right", None),
    Column("other labels", "attention_others", None),
)


def head_tables_of(found: Row, task: str) -> Row | None:
    """Return the tables of a task for the page, or None if heads were not measured on it."""
    rows = [row for row in found.get("head_effects", ()) if row["task"] == task]
    if not rows:
        return None
    columns = [column for column in EFFECTS if any(column.key in row for row in rows)]
    return {
        "columns": [column._replace(title=explanation(column.key)) for column in columns],
        "attends": explanation("attends"),
        "rows": [
            {
                "node": row["node"],
                "attends": row.get("attends", ""),
                "cells": [_cell(row, column.key) for column in columns],
            }
            for row in rows
        ],
        "ranks": [_ranks(row) for row in found.get("head_ranks", ()) if row["task"] == task],
        "ranks_note": explanation("rank_needed"),
    }


def _cell(row: Row, key: str) -> Cell:
    value = finite(row.get(key))
    if value is None:
        return Cell(UNMEASURED if key in row else "", None)
    low, high = (finite(row.get(f"{key}_{end}")) for end in ("low", "high"))
    return Cell(show(value, digits=3), value, () if low is None or high is None else (show_interval(low, high),))


def _ranks(row: Row) -> Row:
    """Return one curve as a row: accuracy at every rank, with random directions below it."""
    points = zip(row["ranks"], row["accuracy_by_rank"], row["accuracy_random"], strict=True)
    cells = {rank: Cell(show(value, digits=3), value, (show(floor, digits=3),)) for rank, value, floor in points}
    needed = row["rank_needed"]
    cells[needed] = cells[needed]._replace(best=f"least rank with 95 % of the accuracy, {show(row['accuracy'], digits=3)}")
    return {"part": row["part"], "heads": ", ".join(row["heads"]), "ranks": list(cells), "cells": list(cells.values())}
