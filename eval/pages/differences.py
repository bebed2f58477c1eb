"""Differences between families and a reference family, as table data, with the wording of their verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .numbers import show, show_interval
from .tables import Column


class DifferenceCell(NamedTuple):
    """A difference, its verdict, and small notes below it; ``kind`` selects the style."""

    text: str
    verdict: str
    kind: str
    notes: tuple[str, ...]


class DifferenceTable(NamedTuple):
    """Differences to a reference family: one column per figure, one row per other family; ``None`` for missing ones."""

    against: str
    columns: list[str]
    rows: list[tuple[str, list[DifferenceCell | None]]]
    legend: str


def verdict_words(found: Mapping[str, Any]) -> str:
    """Return the displayed verdict of a difference."""
    if found["verdict"] == "undecided" and found["seed_sd"] is None:
        return "undecided: one seed"
    return f"{found['verdict']}, below the margin" if found["negligible"] else found["verdict"]


def difference_table(comparison: Mapping[str, Any], columns: Sequence[Column]) -> DifferenceTable | None:
    """Lay out the differences of a comparison; ``None`` if it holds none, as in files of older versions."""
    found = comparison.get("differences") or []
    if not found:
        return None
    cells = {(row["family"], row["figure"]): _cell(row) for row in found}
    keys = [column for column in columns if any(column.key == row["figure"] for row in found)]
    names = list(dict.fromkeys(row["family"] for row in found))
    rows = [(name, [cells.get((name, column.key)) for column in keys]) for name in names]
    return DifferenceTable(comparison["against"], [column.label for column in keys], rows, _legend(comparison["statistics"]))


def off_target_words(family: Mapping[str, Any]) -> str:
    """Return the label of a family whose l0 deviates from the common one, else an empty string."""
    return f"l0 off by {family['l0_deviation']:+.1%}" if family.get("off_target") else ""


def _cell(row: Mapping[str, Any]) -> DifferenceCell:
    sign = "+" if row["difference"] > 0 else ""
    notes = []
    if row["low"] is not None:
        notes.append(show_interval(row["low"], row["high"]))
        notes.append(f"detects \u2265 {show(row['detectable'], digits=2)}")
    if row["seed_sd"] is not None:
        notes.append(f"seed sd {show(row['seed_sd'], digits=2)}")
    kind = row["verdict"] if row["verdict"] in ("better", "worse", "equivalent") else "open"
    return DifferenceCell(sign + show(row["difference"], digits=3), verdict_words(row), kind, tuple(notes))


def _legend(settings: Mapping[str, Any]) -> str:
    margin = f"{settings['relative_margin']:.0%} of the reference's figure (of its distance from 1 if 1 is best)"
    return (
        f"Small: {settings['level']:.0%} interval over seeds (and documents, if sums per document are available); the true "
        f"difference that a test detects with a probability of {settings['power']:.0%}; the standard deviation over seeds. "
        f"better, worse: significant after {settings['correction']}'s correction over the column. equivalent: below the "
        f"margin, {margin} or {settings['latent_share_margin']:g} of the latents, by two one-sided tests. undecided: neither. "
        f"not at equal l0: one of the two deviates from the common l0 by more than {settings['l0_tolerance']:.0%}."
    )
