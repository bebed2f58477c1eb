"""Colours, markers and tables that the comparison pages share."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.markers import MarkerStyle

from .plots import PALETTE, Palette


class Column(NamedTuple):
    """A figure of the table; ``better`` picks its best value and is ``None`` where neither end is better."""

    label: str
    key: str
    better: Callable[[Iterable[float]], float] | None


# Where the report's explanation leans on its neighbours, or there is none.
NOTES = {
    "ce_recovered_mean": "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean), ablated to the mean activation. 1 is perfect, "
    "0 no better than the mean.",
    "tokens_per_second": "Training speed, the median over the run's log lines. Whatever else ran on the machine slowed it.",
}

# Eleven colours and ten markers: 110 families before a pair comes again.
FAMILY_COLORS: Palette = {
    f"family-{index}": pair
    for index, pair in enumerate(
        (
            ("#2a63c9", "#78aaf9"),
            ("#d9730d", "#f5a552"),
            ("#15803d", "#58c27d"),
            ("#b4232c", "#f08a86"),
            ("#7c4dc9", "#b698f2"),
            ("#0e8a9a", "#4fc6d6"),
            ("#8a5a2c", "#cda070"),
            ("#c8408c", "#f18cc2"),
            ("#74801a", "#bcc658"),
            ("#4b5563", "#b3bcc9"),
            ("#b89a00", "#ecd24a"),
        )
    )
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "p")


def look(index: int) -> tuple[str, str]:
    """Colour and marker of a family."""
    colors = list(FAMILY_COLORS.values())
    return colors[index % len(colors)][0], MARKERS[index % len(MARKERS)]


def swatch(index: int, hollow: bool) -> str:
    """The family's marker as in the plots, for the table."""
    marker = MarkerStyle(look(index)[1])
    (outline,) = marker.get_path().transformed(marker.get_transform()).to_polygons()
    points = " ".join(f"{x:.2f},{-y:.2f}" for x, y in np.asarray(outline))
    color = f"var(--family-{index % len(FAMILY_COLORS)})"
    fill = "none" if hollow else color
    style = f'fill="{fill}" stroke="{color}" stroke-width="0.12"'
    return f'<svg class="swatch" aria-hidden="true" viewBox="-0.8 -0.8 1.6 1.6"><polygon points="{points}" {style}/></svg>'


def seed_spread(values: Iterable[float]) -> float:
    low, high = min(values), max(values)
    return high / low if low > 0 else 0


COLORS: Palette = PALETTE | FAMILY_COLORS
