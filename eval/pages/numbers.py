"""Number formatting for pages and the terminal."""

import math
from collections.abc import Mapping
from typing import Any

UNMEASURED, UNDEFINED, UNRECORDED = "not measured", "undefined", "not recorded"


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def dead_words(report: Mapping[str, Any]) -> str:
    """Describe dead latents for the terminal: on the evaluated tokens and, if known, in the last training tokens."""
    words = f"dead {report['dead_fraction']:.2%} on {report['dead_window_tokens']:,} tokens"
    share, window = report.get("dead_training_fraction"), report.get("dead_training_window_tokens")
    return words if share is None else f"{words}, {share:.2%} on the training's last {window:,}"


def show(value: Any, none: str = UNDEFINED, digits: int = 4) -> str:
    """Format a scalar, with thousands separators and floats rounded to ``digits`` significant digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    number = finite(value)
    if number is None:
        return none
    if isinstance(value, int):
        return f"{value:,}"
    return f"{number:,.{1 if number % 1 else 0}f}" if abs(number) >= 1000 else f"{number:.{digits}g}"


def show_interval(low: float, high: float, between: str = "\u2013", digits: int = 3) -> str:
    """Format the ends of an interval with enough digits to tell them apart and to show its width.

    Significant digits are added until the distance of the rounded ends is within a quarter of the exact one.
    """
    low, high = float(low), float(high)
    ends = [show(end, digits=digits) for end in (low, high)]
    for more in range(digits + 1, 12):
        width = float(ends[1].replace(",", "")) - float(ends[0].replace(",", ""))
        if abs(width - (high - low)) <= abs(high - low) / 4:
            break
        ends = [show(end, digits=more) for end in (low, high)]
    # Equal numbers of decimals, as many as three digits of the width take: 0.0109 to 0.0130, 0.0008 to 0.0925.
    if not any("e" in end for end in ends):
        decimals = max(len(end.partition(".")[2]) for end in ends)
        if high > low:
            decimals = min(decimals, max(0, 2 - math.floor(math.log10(high - low))))
        ends = [f"{end:,.{decimals}f}" if end else "0" for end in (low, high)]
    return (" to " if low < 0 else between).join(ends).replace("-", "\u2212")
