"""Fronts of sweeps over sparsity budgets: figures along l0 with intervals, and the areas between two fronts.

The area between two fronts is the mean, over the range of log l0 that both cover, of the difference of their logs: the mean log
ratio of the figure at equal l0. Each seed's front is interpolated linearly between its own runs in log l0 and the log of the
figure, and nothing is extrapolated, so that seeds give independent areas whose interval and test are those of a difference.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..pages.numbers import finite
from ..pages.tables import Column
from .groups import RunGroup, sweep_name, swept, with_intervals
from .statistics import RELATIVE_MARGIN, decide, difference

# Positive figures of which less is better.
FRONT_FIGURES = ("fvu", "ce_increase")
MARGIN = math.log1p(RELATIVE_MARGIN)


def fronts(groups: Sequence[RunGroup], columns: Sequence[Column], covariance: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return every sweep of at least two budgets: its groups by l0, with each figure's mean and interval.

    Args:
        groups: Not interpolated.
        columns: The figures to report.
        covariance: Of the groups' means over documents, in their order, if known.
    """
    keys = ["l0_mean", *(column.key for column in columns if column.key in FRONT_FIGURES)]
    found: list[dict[str, Any]] = []
    place = {group.name: index for index, group in enumerate(groups)}
    for members in swept(groups):
        points = []
        for group in members:
            known = {key: values for key in keys if (values := group.values(key))}
            if "l0_mean" in known:
                figures = {key: {"mean": float(np.mean(values)), "values": values} for key, values in known.items()}
                points.append((group.name, with_intervals(figures, covariance, place[group.name])))
        points.sort(key=lambda point: point[1]["l0_mean"]["mean"])
        # Groups at one l0 differ in something else than the budget.
        if len(points) > 1 and points[0][1]["l0_mean"]["mean"] < points[-1][1]["l0_mean"]["mean"]:
            name = sweep_name(members, {front["name"] for front in found})
            rows = [{"name": group} | figures for group, figures in points]
            found.append({"name": name, "members": [group for group, _ in points], "points": rows})
    return found


def areas(groups: Sequence[RunGroup], found: Sequence[Mapping[str, Any]], against: str) -> list[dict[str, Any]]:
    """Return the areas between the fronts and a reference, tested together figure by figure.

    Args:
        groups: Those that ``fronts`` was called with.
        found: Its result.
        against: A sweep or a member of one; if it is neither, the first sweep is the reference.
    """
    if len(found) < 2:
        return []
    by_name = {group.name: group for group in groups}
    reference = next((front for front in found if against == front["name"] or against in front["members"]), found[0])
    rows: list[dict[str, Any]] = []
    for figure in FRONT_FIGURES:
        tested = []
        for front in found:
            if front is not reference:
                ours, theirs = (_curves([by_name[name] for name in each["members"]], figure) for each in (front, reference))
                row = _area(ours, theirs, figure)
                if row is not None:
                    tested.append({"front": front["name"], "against": reference["name"]} | row)
        rows += decide(tested, [True] * len(tested), [False] * len(tested))
    return rows


def _curves(members: Sequence[RunGroup], figure: str) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """Return each seed's front: increasing log l0, and the log of the figure there."""
    by_seed: dict[Any, dict[float, float]] = {}
    for member in members:
        for place, point in enumerate(member.points):
            x, y = finite(point.report.get("l0_mean")), finite(point.report.get(figure))
            if x and y and x > 0 and y > 0:
                by_seed.setdefault(place if point.seed is None else point.seed, {})[math.log(x)] = math.log(y)
    pairs = {seed: sorted(values.items()) for seed, values in by_seed.items() if len(values) > 1}
    return {seed: (np.array([x for x, _ in known]), np.array([y for _, y in known])) for seed, known in pairs.items()}


def _area(
    curves: Mapping[Any, tuple[np.ndarray, np.ndarray]], reference: Mapping[Any, tuple[np.ndarray, np.ndarray]], figure: str
) -> dict[str, Any] | None:
    """Return the mean log ratio over the common range of l0, and its interval over seeds; ``None`` without a common range."""
    every = [*curves.values(), *reference.values()]
    if not curves or not reference:
        return None
    low, high = max(x[0] for x, _ in every), min(x[-1] for x, _ in every)
    if low >= high:
        return None
    paired = list(curves) == list(reference)
    knots = np.unique(np.concatenate([[low, high], *(x[(x > low) & (x < high)] for x, _ in every)]))
    means, others = ([_mean_over(knots, *curve) for curve in each.values()] for each in (curves, reference))
    row = difference(figure, means, others, None, paired, margin=MARGIN)
    ends = {key: None if row[key] is None else math.exp(row[key]) for key in ("low", "high")}
    return row | {
        "l0_low": math.exp(low),
        "l0_high": math.exp(high),
        "ratio": math.exp(row["difference"]),
        "ratio_low": ends["low"],
        "ratio_high": ends["high"],
    }


def _mean_over(knots: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean of a piecewise linear curve over the range of the knots, which include its own."""
    return float(np.trapezoid(np.interp(knots, x, y), knots) / (knots[-1] - knots[0]))


def areas_summary(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Return the areas as a table for a terminal: a header, then one row for each."""
    rows = [["front", "figure", "ratio at equal l0", "95 % interval", "l0", "verdict"]]
    for row in comparison.get("areas", ()):
        interval = "-" if row["ratio_low"] is None else f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        verdict = "undecided: one seed" if row["seed_sd"] is None else row["verdict"]
        rows.append(
            [
                f"{row['front']} / {row['against']}",
                row["figure"],
                f"{row['ratio']:.3f}",
                interval,
                f"{row['l0_low']:.3g} to {row['l0_high']:.3g}",
                verdict,
            ]
        )
    return rows
