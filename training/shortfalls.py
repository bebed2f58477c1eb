"""Shortfalls: quantities of which less was available than requested, shown in plans, logs and reports.

Everything that a run or an evaluation may fall short of uses ``Shortfall``: steps of a schedule, tokens of a text, prompt
pairs. Shortfalls of training are kept in the checkpoint's provenance, where evaluations find them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Key of the shortfalls in provenances and reports.
ENTRY = "shortfalls"


@dataclass(frozen=True)
class Shortfall:
    """A quantity of which less was available than requested.

    Args:
        key: Recipe key or command-line option that requested it.
        asked: Requested quantity, in ``unit``.
        had: Available quantity.
        unit: Plural noun: ``tokens``, ``steps``.
        consequence: Effect on the results and, optionally, a remedy; without a final period.
        serious: Results are doubtful however small the shortfall.

    >>> str(Shortfall("lr_warmup_steps", 1000, 8, "steps", "lr reaches 8e-06"))
    'lr_warmup_steps: 8 of 1,000 steps asked for: lr reaches 8e-06'
    """

    key: str
    asked: int
    had: int
    unit: str
    consequence: str
    serious: bool = False

    @property
    def doubtful(self) -> bool:
        """True if results that depend on it are doubtful: less than half was available, or it is ``serious``."""
        return self.serious or 2 * self.had < self.asked

    def __str__(self) -> str:
        return f"{self.key}: {self.had:,} of {self.asked:,} {self.unit} asked for: {self.consequence}"

    def entry(self) -> dict[str, Any]:
        """Return the shortfall as a JSON-compatible dict."""
        return asdict(self)


def shortfall(key: str, asked: int, had: int, unit: str, consequence: str, serious: bool = False) -> list[Shortfall]:
    """Return a list of one shortfall if less was available than requested, else an empty list.

    >>> shortfall("pairs", 100, 100, "pairs", "intervals are wide")
    []
    """
    return [Shortfall(key, asked, had, unit, consequence, serious)] if had < asked else []


def shortfalls_together(*parts: Iterable[Shortfall]) -> tuple[Shortfall, ...]:
    """Merge shortfalls. For equal keys the last is kept: it was measured, while earlier ones were planned."""
    return tuple({found.key: found for part in parts for found in part}.values())


def recorded(provenance: Mapping[str, Any]) -> tuple[Shortfall, ...]:
    """Return the training shortfalls in a checkpoint's provenance; third-party checkpoints have none."""
    return tuple(Shortfall(**entry) for entry in provenance.get(ENTRY) or ())
