"""Metric values that are undefined: the reason is reported in place of a number."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NO_REASON = "not defined on this data"


@dataclass(frozen=True)
class Undefined:
    """A value that the data do not define: ``null`` in the report, with the reason under ``reasons``."""

    reason: str


def settled(entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries as JSON can hold them, and the reason for each one that is ``None``."""
    values, reasons = {}, {}
    for key, value in entries.items():
        values[key] = value
        if isinstance(value, Undefined):
            values[key], reasons[key] = None, value.reason
        elif value is None:
            reasons[key] = NO_REASON
        elif isinstance(value, float) and not math.isfinite(value):
            values[key], reasons[key] = None, f"not a finite number: {value}"
        elif isinstance(value, list):
            values[key] = [None if isinstance(item, float) and not math.isfinite(item) else item for item in value]
    return values, reasons
