"""Tables of a comparison of circuits for the terminal."""

from typing import Any

from .overlaps import EQUAL

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def comparison_tables(found: Row) -> list[Table]:
    """Return the tables of overlaps, changed units and repairs, without those that do not apply."""
    return [(head, rows) for head, rows in (_overlaps(found), _changed(found), _repairs(found)) if rows]


def _overlaps(found: Row) -> Table:
    head = ["family", "method", "a", "b", "units", "jaccard", "two halves", "by chance", "p", "shared on a", "shared on b"]
    rows = []
    for row in found["overlaps"]:
        if "refused" in row or row["at"] != EQUAL:
            continue
        keys = ("jaccard", "ceiling", "floor", "p_holm", "shared_on_a", "shared_on_b")
        figures = [_shown(row[key]) for key in keys]
        rows.append([row["family"], row["method"], row["a"], row["b"], str(row["size_a"]), *figures])
    return head, rows


def _changed(found: Row) -> Table:
    head = ["family", "method", "task", "units, base", "units, tuned", "lost without gained", "closed by gained"]
    rows = [
        [row["family"], row["method"], row["task"], str(row["size_base"]), str(row["size_tuned"])]
        + [_shown(row.get(effect, {}).get(key)) for effect, key in (("ablated", "lost"), ("put", "closed"))]
        for row in found["changed"]
    ]
    return head, rows


def _repairs(found: Row) -> Table:
    head = ["family", "method", "repaired", "by", "accuracy", "after", "random units", "opposite answers"]
    rows = [
        [row["family"], row["method"], row["b"], row["a"]]
        + [_shown(row.get(key)) for key in ("accuracy_before", "accuracy_after", "floor", "accuracy_opposite")]
        for row in found["repairs"]
    ]
    return head, rows


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
