"""Families, the JSON form of run groups in a comparison: means, ranges and intervals of their figures, and the best ones."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...sae.suggestions import require_choice
from ..pages.differences import verdict_words
from ..pages.numbers import finite, show
from ..pages.recipes import PER_TOKEN, is_oracle
from ..pages.tables import Column
from ..result import Report
from .fronts import areas, fronts
from .groups import (
    L0_TOLERANCE,
    RunGroup,
    common_l0,
    document_covariance,
    family_differences,
    l0_deviation,
    matched,
    off_target,
    reseed_noise,
    target_l0,
    with_intervals,
)
from .statistics import SETTINGS

# Report entries that all seeds of a family share.
FAMILY_ENTRIES = ("kind", "encoder", "n_latents", "training_tokens", "dead_training_window_tokens")
# Training speed depends on the machine as much as on the recipe, so it is not tested.
UNTESTED = ("tokens_per_second",)
# Figures whose differences fit on a terminal; the page and comparison.json have all.
TOLD = ("fvu", "ce_increase", "dead_fraction", "dead_training_fraction")


def compared(
    groups: Sequence[RunGroup], columns: Sequence[Column], against: str | None = None, match_l0: float | None = None
) -> dict[str, Any]:
    """Compare groups of runs: return families, their differences from a reference family, and the statistics behind them.

    Args:
        groups: One for each recipe.
        columns: Figures, and whether lower or higher is better.
        against: The reference family; by default the first one in per-token inference mode.
        match_l0: Interpolate sweeps over budgets to this l0.

    Raises:
        ValueError: If there is no family of that name, or no sweep that has an l0 on either side of ``match_l0``.
    """
    before = groups
    if match_l0 is not None:
        groups = matched(groups, match_l0, columns)
        if not any(group.between for group in groups):
            raise ValueError(
                f"--match-l0: expected a sweep, recipes that differ in the encoder's budget only, with an l0 below and one "
                f"above {match_l0:g}, got {', '.join(_at_l0(group) for group in before)}. Give more budgets, or another l0."
            )
    keys = [column.key for column in columns]
    summaries = [summarize(group.name, [point.report for point in group.points], columns) for group in groups]
    if against is None:
        against = str(next((summary for summary in summaries if not is_oracle(summary)), summaries[0])["name"])
    require_choice("--against", against, [summary["name"] for summary in summaries])
    target = common_l0(groups, against, match_l0)
    covariance = document_covariance(groups, keys)
    swept = fronts(before, columns, covariance if groups is before else document_covariance(before, keys))
    families = [
        summary
        | {
            "figures": with_intervals(summary["figures"], covariance, place),
            "seeds": [point.seed for point in group.points],
            "target_l0": target_l0(group.points[0].report),
            "l0_deviation": l0_deviation(group, target),
            "off_target": off_target(group, target),
            "between": list(group.between),
        }
        for place, (group, summary) in enumerate(zip(groups, summaries, strict=True))
    ]
    found: dict[str, Any] = {
        "against": against,
        "target_l0": target,
        "match_l0": match_l0,
        "statistics": SETTINGS | {"l0_tolerance": L0_TOLERANCE},
        "families": families,
        "document_covariance": covariance,
        "reseed_noise": reseed_noise(families, keys),
        "best": best(families, columns),
        "fronts": swept,
        "areas": areas(before, swept, against),
    }
    return found | {"differences": family_differences(found, [column for column in columns if column.key not in UNTESTED])}


def _at_l0(group: RunGroup) -> str:
    measured = group.values("l0_mean")
    return f"{group.name} ({statistics.fmean(measured):.4g})" if measured else f"{group.name} (no l0)"


def summarize(name: str, reports: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> dict[str, Any]:
    """Return one family: its common entries, and the mean, minimum, maximum and values of every figure.

    Undefined values (``None`` or NaN) stay ``None`` among the values and are left out of the mean. A figure that no report has
    is absent.
    """
    figures = {}
    for key in (column.key for column in columns):
        values = [finite(report.get(key)) for report in reports]
        known = [value for value in values if value is not None]
        if any(key in report for report in reports):
            mean = statistics.fmean(known) if known else None
            figures[key] = {"mean": mean, "min": min(known, default=None), "max": max(known, default=None), "values": values}
    selections = sorted({report.get("selection", PER_TOKEN) for report in reports} - {PER_TOKEN})
    return {
        "name": name,
        **{key: reports[0].get(key) for key in FAMILY_ENTRIES},
        "selection": ", ".join(selections) or PER_TOKEN,
        "figures": figures,
    }


def best(families: Sequence[dict[str, Any]], columns: Sequence[Column]) -> dict[str, list[str]]:
    """Return, for each figure with a preferred direction, the names of the families with the best mean, including ties.

    Only families in per-token inference mode, at the common l0, and defined for every seed are ranked. If all means are equal,
    none is best.
    """
    winners: dict[str, list[str]] = {}
    for column in columns:
        entries = {
            family["name"]: family["figures"][column.key]
            for family in families
            if column.key in family["figures"] and not is_oracle(family) and not family["off_target"]
        }
        means = {name: entry["mean"] for name, entry in entries.items() if None not in entry["values"]}
        if column.better is not None and len(set(means.values())) > 1:
            top = column.better(means.values())
            winners[column.key] = [name for name, mean in means.items() if mean == top]
    return winners


def differences_summary(comparison: Report) -> list[list[str]]:
    """Return the table of differences for a terminal: a header, then one row per family and main figure."""
    rows = [["less", "figure", "difference", "95 % interval", "over", "seed sd", "detectable", "verdict"]]
    for found in comparison.get("differences", ()):
        if found["figure"] not in TOLD:
            continue
        number = {key: show(found[key], "-", digits=3) for key in ("difference", "low", "high", "seed_sd", "detectable")}
        rows.append(
            [
                f"{found['family']} - {found['against']}",
                found["figure"],
                number["difference"],
                "-" if found["low"] is None else f"{number['low']} to {number['high']}",
                found["interval_over"] or "-",
                number["seed_sd"],
                number["detectable"],
                verdict_words(found),
            ]
        )
    return rows
