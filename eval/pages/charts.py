"""Colors and markers of families, shared by plots and tables."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.markers import MarkerStyle

from .plots import PALETTE, Palette

# Eleven colors and ten markers give 110 distinct pairs.
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
COLORS: Palette = PALETTE | FAMILY_COLORS
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "p")


class Swatch(NamedTuple):
    """A family's marker for the table: polygon corners within -0.8 to 0.8, and its color."""

    points: str
    color: str
    hollow: bool


def look(index: int) -> tuple[str, str]:
    """Return the color and marker of a family."""
    colors = list(FAMILY_COLORS.values())
    return colors[index % len(colors)][0], MARKERS[index % len(MARKERS)]


def swatch(index: int, hollow: bool = False) -> Swatch:
    """Return the family's plot marker as a polygon."""
    marker = MarkerStyle(look(index)[1])
    (outline,) = marker.get_path().transformed(marker.get_transform()).to_polygons()
    return Swatch(" ".join(f"{x:.2f},{-y:.2f}" for x, y in np.asarray(outline)), family_color(index), hollow)


def family_color(index: int) -> str:
    """Return the CSS variable of the family's color."""
    return f"var(--family-{index % len(FAMILY_COLORS)})"


def seed_spread(values: Iterable[float]) -> float:
    """Return the ratio of the largest to the smallest value; 0 if any is not positive."""
    low, high = min(values), max(values)
    return high / low if low > 0 else 0
