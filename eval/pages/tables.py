"""Data of tables and key figures for the templates."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .glossary import EXPLANATIONS
from .numbers import UNDEFINED, UNMEASURED, finite, show


class Column(NamedTuple):
    """A column of a table; ``better`` picks its best value and is ``None`` if neither direction is better."""

    label: str
    key: str
    better: Callable[[Iterable[float]], float] | None
    text: str = ""
    title: str = ""


class Cell(NamedTuple):
    """One value of a table: its text, the number it is sorted by (``None`` if missing), and small notes below it.

    ``best`` is the reason why a value is marked as best, ``reason`` the reason why it is missing.
    """

    text: str
    value: float | None
    notes: tuple[str, ...] = ()
    best: str = ""
    reason: str = ""


class FigureTile(NamedTuple):
    """A key figure: entry of the result, label, value, the note below it, its definition, and its 95% interval."""

    key: str
    label: str
    value: str
    note: str
    missing: bool = False
    text: str = ""
    interval: str = ""


class EntryRow(NamedTuple):
    """An entry of a result with its explanation and, if it is null, the reason."""

    key: str
    value: str
    explanation: str
    reason: str = ""


# Texts for columns whose explanation in the report refers to its neighbors or is missing.
NOTES = {
    "ce_recovered_mean": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean), with mean ablation. 1 is perfect, 0 no better "
    "than the mean.",
    "tokens_per_second": "Training speed, median over the run's log lines; affected by other processes on the machine.",
}


def explained(columns: Iterable[Column]) -> list[Column]:
    """Add the report glossary's explanation to each column."""
    texts = {key: text for entries in EXPLANATIONS.values() for key, text in entries.items()} | NOTES
    return [column._replace(text=texts[column.key]) for column in columns]


def figure_cell(entries: Mapping[str, Any], key: str, digits: int = 4) -> Cell:
    """Return the cell of a result's entry, which may be missing or null."""
    value = finite(entries.get(key))
    return Cell(show(value if value is None else entries[key], UNDEFINED if key in entries else UNMEASURED, digits), value)
