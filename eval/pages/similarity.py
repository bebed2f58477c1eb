"""Page of the similarity of dictionaries, without requests: matrices, histograms of matched cosines, stitching."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .document import document
from .numbers import finite, show
from .plots import ACCENT, MUTED, SOFT, WARN, PlotCard, plot_card
from .tables import Cell, Column

Row = dict[str, Any]
# More pairs have a row in the table and no histogram.
MOST_HISTOGRAMS = 12
COLUMNS = (
    Column("latents a", "latents_a", None, "Latents of a that training did not count as dead."),
    Column("latents b", "latents_b", None, "The same of b."),
    Column("matched cosine", "matched_cosine", None, "Mean cosine of decoder directions matched one to one."),
    Column("floor", "random_cosine", None, "The same of as many random directions."),
    Column("same", "matched_share", None, "Share of the matched pairs with a cosine of at least {same}."),
    Column("nearest, a", "nearest_cosine_a", None, "Mean largest cosine of a latent of a with any of b."),
    Column("nearest, b", "nearest_cosine_b", None, "Mean largest cosine of a latent of b with any of a."),
    Column(
        "novel",
        "novel_share",
        None,
        "Stitching: share of the larger dictionary's active latents that lower the error of the smaller one when added to it.",
    ),
    Column("known", "reconstruction_share", None, "Share of those that do not: the smaller one writes it by other latents."),
    Column(
        "AUROC", "cosine_auroc", None, "Probability that a known latent has a larger nearest cosine than a novel one; 0.5: no."
    ),
    Column("fvu, smaller", "fvu_small", None, "Fraction of variance unexplained by the smaller one on the same tokens."),
    Column("fvu, larger", "fvu_large", None, "The same of the larger one."),
)
# Entry with a reason -> entries that are missing for it.
MISSING = {
    "matched_cosine": ("matched_cosine", "random_cosine", "matched_share", "nearest_cosine_a", "nearest_cosine_b"),
    "novel_share": ("novel_share", "reconstruction_share", "cosine_auroc", "fvu_small", "fvu_large"),
}


def render_similarity(found: Row, report_of: Callable[[str], str | None] = lambda checkpoint: None) -> str:
    """Render ``similarity.json`` as a page. Equal input gives equal bytes.

    Args:
        report_of: Returns the address of a checkpoint's report, if there is one.
    """
    rows, same = found["rows"], found["same"]
    names = list(dict.fromkeys(name for row in rows for name in (row["a"], row["b"])))
    drawn = [row for row in rows if row.get("matched_counts")][:MOST_HISTOGRAMS]
    stitched = [row for row in rows if row["novel_share"] is not None]
    plots = [_histogram(row, len(drawn)) for row in drawn]
    if stitched:
        plots.insert(0, _stitching(stitched))
    columns = [column._replace(text=column.text.format(same=show(same))) for column in COLUMNS]
    return document(
        "similarity.html",
        f"sparsary similarity \u00b7 {' and '.join(names[:3])}{' and others' if len(names) > 3 else ''}",
        ("table.css", "similarity.css"),
        ("page.js", "table.js", "sorted.js"),
        command="similarity",
        heading=f"Latents of {len(names):,} dictionaries",
        shape=f"{len(rows):,} pair{'s' if len(rows) > 1 else ''} \u00b7 cosines of decoder directions"
        + (f" \u00b7 stitching on {found['tokens']:,} tokens" if stitched and found["tokens"] else ""),
        facts={},
        checkpoints=[(name, report_of(name)) for name in found["checkpoints"]],
        matrices=_matrices(rows, names) if len(rows) >= len(names) else [],
        names=names,
        plots=plots,
        left_out=len([row for row in rows if row.get("matched_counts")]) - len(drawn),
        columns=columns,
        rows=[{"a": row["a"], "b": row["b"], "cells": [_cell(row, column.key) for column in columns]} for row in rows],
        reasons=_reasons(rows),
    )


def _matrices(rows: list[Row], names: list[str]) -> list[Row]:
    """Return the matrices: matched cosines, which are symmetric, and shares of novel latents, of one in the other."""
    cosines: dict[tuple[str, str], Row] = {}
    novel: dict[tuple[str, str], Row] = {}
    for row in rows:
        cosines[row["a"], row["b"]] = cosines[row["b"], row["a"]] = row
        if row["stitched"] is not None:
            both = row["a"], row["b"]
            novel[both if row["stitched"] == " into ".join(both) else both[::-1]] = row
    found = [_matrix("Matched cosine", names, cosines, "matched_cosine", "random_cosine", "floor")]
    if novel:
        found.append(_matrix("Novel latents of the row's dictionary, stitched into the column's", names, novel, "novel_share"))
    return found


def _matrix(title: str, names: list[str], known: dict[tuple[str, str], Row], key: str, floor: str = "", word: str = "") -> Row:
    rows = []
    for name in names:
        cells = []
        for other in names:
            row = known.get((name, other))
            value = None if row is None else finite(row[key])
            below = None if row is None or not floor else finite(row[floor])
            cells.append(
                {
                    "text": "" if value is None else show(value, digits=3),
                    "shade": 0 if value is None else round(5 + 70 * max(value, 0.0)),
                    "title": f"{name}, {other}",
                    "notes": [] if below is None else [f"{word} {show(below, digits=2)}"],
                }
            )
        rows.append({"name": name, "cells": cells})
    return {"title": title, "rows": rows}


def _cell(row: Row, key: str) -> Cell:
    value = finite(row[key])
    if value is not None:
        return Cell(show(row[key], digits=3), value)
    reason = next((text for name, text in row["reasons"].items() if key in MISSING.get(name, ())), "")
    return Cell("\u2013", None, reason=reason)


def _reasons(rows: list[Row]) -> list[tuple[str, int]]:
    """Return what was not measured and why, with the number of pairs."""
    told: dict[str, int] = {}
    for row in rows:
        for name, reason in row["reasons"].items():
            words = f"{'stitching' if name == 'novel_share' else 'matched cosines'}: {reason}"
            told[words] = told.get(words, 0) + 1
    return list(told.items())


def _histogram(row: Row, shown: int) -> PlotCard:
    several = f"{row['a']}, {row['b']}" if shown > 1 else "Matched cosines"
    return plot_card(
        several,
        f"Bars: latents matched one to one, mean {show(row['matched_cosine'], digits=3)}. "
        f"Line: random directions, mean {show(row['random_cosine'], digits=3)}.",
        lambda ax: _counts(ax, row),
    )


def _counts(ax: Axes, row: Row) -> str | None:
    counts, floor = np.array(row["matched_counts"]), row.get("random_counts")
    edges = np.linspace(-1, 1, len(counts) + 1)
    filled = np.flatnonzero(counts + (0 if floor is None else np.array(floor)))
    low = min(float(edges[filled[0]]), 0.0) if len(filled) else 0.0
    ax.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=ACCENT)
    if floor is not None:
        ax.stairs(floor, edges, color=WARN, linewidth=1.6, label="random directions")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1))
    ax.set(xlabel="cosine of matched directions", ylabel="latents", xlim=(low, 1.0))
    some = ", ".join(f"{count} from {edge:.3g}" for edge, count in zip(edges, counts.tolist(), strict=False) if count)
    return f"Histogram of the cosines of matched latents of {row['a']} and {row['b']}: {some}."


def _stitching(rows: list[Row]) -> PlotCard:
    inches = (350 / 72, max(255, 60 + 26 * len(rows)) / 72)
    note = "Active latents of the larger one, added one at a time to the smaller one's reconstruction. Novel: the error falls."
    return plot_card("Stitching", note, lambda ax: _shares(ax, rows), inches)


def _shares(ax: Axes, rows: list[Row]) -> str:
    for place, row in enumerate(reversed(rows)):
        novel, known = row["novel_share"], row["reconstruction_share"]
        ax.barh(place, novel, color=ACCENT, label="novel" if not place else None)
        ax.barh(place, known, left=novel, color=SOFT, edgecolor=MUTED, linewidth=0.6, label="known" if not place else None)
    ax.set_yticks(range(len(rows)), [row["stitched"].replace(" into ", "\ninto ") for row in reversed(rows)])
    ax.set(xlabel="share of active latents", xlim=(0, 1))
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return "Stitching: " + ", ".join(f"{row['stitched']}: {show(row['novel_share'], digits=3)} novel" for row in rows) + "."
