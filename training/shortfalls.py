"""What was asked for and what there was: told in the plan, in the log, and in every report of a dictionary.

Every quantity that a run or an evaluation may fall short of goes through ``Shortfall``: steps of a schedule, tokens of a text,
prompt pairs. Shortfalls of a training are kept in its checkpoint's provenance, where evaluations find them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Shortfalls in a checkpoint's provenance and in reports.
ENTRY = "shortfalls"


@dataclass(frozen=True)
class Shortfall:
    """A quantity of which there was less than was asked for.

    Args:
        key: The recipe's key, or the option, that asked.
        asked: The quantity asked for, in ``unit``.
        had: The quantity that there was.
        unit: Plural noun: ``tokens``, ``steps``.
        consequence: What follows from it, and perhaps how to mend it; without a full stop.
        serious: It casts doubt on figures however much was missing.

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
        """Whether figures that rest on it are in doubt: less than half was had."""
        return self.serious or 2 * self.had < self.asked

    def __str__(self) -> str:
        return f"{self.key}: {self.had:,} of {self.asked:,} {self.unit} asked for: {self.consequence}"

    def entry(self) -> dict[str, Any]:
        """Return the shortfall as JSON."""
        return asdict(self)


def shortfall(key: str, asked: int, had: int, unit: str, consequence: str, serious: bool = False) -> list[Shortfall]:
    """Return one shortfall if there was less than asked for, else none.

    >>> shortfall("pairs", 100, 100, "pairs", "intervals are wide")
    []
    """
    return [Shortfall(key, asked, had, unit, consequence, serious)] if had < asked else []


def shortfalls_together(*parts: Iterable[Shortfall]) -> tuple[Shortfall, ...]:
    """Return the shortfalls of several parts; of one key the later stays, which was measured where the earlier was planned."""
    return tuple({found.key: found for part in parts for found in part}.values())


def recorded(provenance: Mapping[str, Any]) -> tuple[Shortfall, ...]:
    """Return the shortfalls of a checkpoint's training; of other libraries' checkpoints none are known."""
    return tuple(Shortfall(**entry) for entry in provenance.get(ENTRY) or ())
