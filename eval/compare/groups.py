"""Groups of runs that differ only in the seed: l0 targets, interpolation to a common l0, and uncertainty.

A point of a group is one seed's report, or a mixture of two reports of a sweep over budgets: figures are interpolated to a
common l0, linearly in log l0 and, where both values are positive, in the log of the figure. Nothing is extrapolated.
"""

import json
import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ...sae.suggestions import require_choice
from ..bootstrap import resamples
from ..metrics.document_sums import DOCUMENTS, STATISTICS, read_sums
from ..pages.numbers import finite
from ..pages.tables import Column
from .statistics import LATENT_SHARES, decide, difference, sd_of, uncertainty

# A group whose l0 deviates from the target by a larger share is marked, and its differences are not tested.
L0_TOLERANCE = 0.02
# Encoder arguments that set a budget: recipes that differ only in these form a sweep.
BUDGETS = ("k", "target_l0", "sparsity")


@dataclass(frozen=True)
class Point:
    """One seed of a group: its run directories with interpolation weights, and the resulting report."""

    parts: tuple[tuple[Path, float], ...]
    report: dict[str, Any]
    seed: Any = None


@dataclass(frozen=True)
class RunGroup:
    """The runs of one recipe, one point per seed. ``between`` names the groups it was interpolated from."""

    name: str
    points: tuple[Point, ...]
    between: tuple[str, ...] = field(default=())

    def values(self, key: str) -> list[float]:
        """Return the figure's defined values."""
        found = (finite(point.report.get(key)) for point in self.points)
        return [value for value in found if value is not None]


def encoder_spec_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's name and arguments, parsed from the report."""
    try:
        return dict(json.loads(report.get("encoder") or "{}"))
    except (ValueError, TypeError):
        return {"name": report.get("encoder")}


def target_l0(report: Mapping[str, Any]) -> float | None:
    """Return the latents per token that the encoder was given as a budget or target."""
    spec = encoder_spec_of(report)
    return finite(spec.get("target_l0") or spec.get("k"))


def common_l0(groups: Sequence[RunGroup], against: str, matched: float | None) -> float | None:
    """Return the l0 at which groups are compared: the requested one, else the reference's target, else its measured l0."""
    if matched is not None:
        return matched
    reference = next(group for group in groups if group.name == against)
    target = target_l0(reference.points[0].report)
    measured = reference.values("l0_mean")
    return target if target is not None else (statistics.fmean(measured) if measured else None)


def l0_deviation(group: RunGroup, target: float | None) -> float | None:
    """Return the relative deviation of the mean l0 from the target, or ``None`` if either is unknown."""
    measured = group.values("l0_mean")
    return statistics.fmean(measured) / target - 1 if measured and target else None


def off_target(group: RunGroup, target: float | None) -> bool:
    """Return True if the mean l0 deviates from the target by more than the tolerance."""
    deviation = l0_deviation(group, target)
    return deviation is not None and abs(deviation) > L0_TOLERANCE


def matched(groups: Sequence[RunGroup], l0: float, columns: Sequence[Column]) -> list[RunGroup]:
    """Replace every sweep by one group interpolated to ``l0``; other groups stay as they are.

    A sweep consists of groups that differ only in their encoders' budgets. Each seed is interpolated separately between its two
    neighbors in l0. Seeds without a neighbor on either side are dropped; a sweep without any remaining seed is left as it is.
    """
    found: list[RunGroup] = []
    for members in swept(groups):
        points = [point for point in _seeds_at(members, l0, columns) if point is not None] if len(members) > 1 else []
        if points:
            taken = {group.name for group in (*groups, *found)} - {member.name for member in members}
            used = {path for point in points for path, _ in point.parts}
            between = [m.name for m in members if used & {path for point in m.points for path, _ in point.parts}]
            found.append(RunGroup(sweep_name(members, taken), tuple(points), tuple(between)))
        else:
            found += members
    return found


def swept(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """Return the groups, those that differ only in their encoders' budgets together."""
    sweeps: dict[str, list[RunGroup]] = {}
    for group in groups:
        report = group.points[0].report
        spec = {key: value for key, value in encoder_spec_of(report).items() if key not in BUDGETS}
        about = [spec, *(report.get(key) for key in ("kind", "n_latents", "training_tokens", "selection", "hook"))]
        sweeps.setdefault(json.dumps(about, sort_keys=True, default=str), []).append(group)
    return list(sweeps.values())


def sweep_name(members: Sequence[RunGroup], taken: Container[str]) -> str:
    """Return the name of the encoder, or those of all members if it is taken."""
    name = str(encoder_spec_of(members[0].points[0].report).get("name") or members[0].name)
    return name if name not in taken else "+".join(member.name for member in members)


def _seeds_at(members: Sequence[RunGroup], l0: float, columns: Sequence[Column]) -> list[Point | None]:
    """Return one interpolated point for every seed (or for every position, if seeds are unknown)."""
    by_seed: dict[Any, list[Point]] = {}
    for member in members:
        for place, point in enumerate(member.points):
            by_seed.setdefault(place if point.seed is None else point.seed, []).append(point)
    return [_at(points, l0, columns) for points in by_seed.values()]


def _at(points: Sequence[Point], l0: float, columns: Sequence[Column]) -> Point | None:
    known = sorted(((x, point) for point in points if (x := finite(point.report.get("l0_mean")))), key=lambda pair: pair[0])
    below = [pair for pair in known if pair[0] <= l0]
    above = [pair for pair in known if pair[0] >= l0]
    if not below or not above:
        return None
    (low, first), (high, second) = below[-1], above[0]
    share = 0.0 if high == low else math.log(l0 / low) / math.log(high / low)
    parts = ((first.parts[0][0], 1 - share), (second.parts[0][0], share))
    report = dict(first.report)
    for key in (column.key for column in columns):
        values = [finite(point.report.get(key)) for point in (first, second)]
        known_values = [value for value in values if value is not None]
        if key in report:
            whole = len(known_values) == len(parts)
            report[key] = float(mixture(key, np.array(known_values)[:, None], [w for _, w in parts])[0]) if whole else None
    return Point(parts if high != low else parts[:1], report, first.seed)


def mixture(
    key: str, values: Float[np.ndarray, "parts resamples"], weights: Sequence[float]
) -> Float[np.ndarray, " resamples"]:
    """Interpolate a figure between parts (rows), in log space where all are positive, except for shares near 1."""
    w = np.asarray(weights)[:, None]
    if bool((values > 0).all()) and not key.startswith(("ce_recovered", "top1")):
        return np.exp((w * np.log(values)).sum(0))
    return (w * values).sum(0)


def document_covariance(groups: Sequence[RunGroup], keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the covariance of the groups' means over resampled documents, by figure; ``None`` if no sums were saved.

    Each resample draws the same documents for all groups, so the variance of a difference follows from the matrix. Rows and
    columns are in group order; those of a group whose sums are missing or cover other documents are ``None``.
    """
    tables: dict[Path, dict[str, np.ndarray]] = {}
    for path in dict.fromkeys(path for group in groups for point in group.points for path, _ in point.parts):
        sums = read_sums(path)
        if sums is not None:
            tables[path] = sums
    if not tables:
        return None
    documents = next(iter(tables.values()))[DOCUMENTS]
    tables = {path: sums for path, sums in tables.items() if np.array_equal(sums[DOCUMENTS], documents)}
    columns = [(path, name) for path, sums in tables.items() for name in sums if name != DOCUMENTS]
    table = np.stack([tables[path][name] for path, name in columns], axis=1)
    drawn = np.stack([weights @ table for weights in resamples(len(documents))])
    totals: dict[Path, dict[str, np.ndarray]] = {path: {} for path in tables}
    for place, (path, name) in enumerate(columns):
        totals[path][name] = drawn[:, place]
    found = {key: _covariance([_resampled(group, key, totals) for group in groups]) for key in keys if key in STATISTICS}
    return {"documents": len(documents), "figures": {key: value for key, value in found.items() if value is not None}}


def _resampled(group: RunGroup, key: str, totals: Mapping[Path, Mapping[str, np.ndarray]]) -> np.ndarray | None:
    """Return the group's mean on every resample of the documents."""
    means = []
    for point in group.points:
        if finite(point.report.get(key)) is None:
            continue
        parts = []
        for path, _ in point.parts:
            try:
                with np.errstate(divide="ignore", invalid="ignore"):
                    parts.append(STATISTICS[key](totals[path]))
            except KeyError:
                return None
        means.append(mixture(key, np.stack(parts), [weight for _, weight in point.parts]))
    values = np.mean(means, axis=0) if means else None
    return values if values is not None and bool(np.isfinite(values).all()) else None


def _covariance(rows: Sequence[np.ndarray | None]) -> list[list[float | None]] | None:
    known = [place for place, row in enumerate(rows) if row is not None]
    if not known:
        return None
    found = np.atleast_2d(np.cov(np.stack([row for row in rows if row is not None])))
    whole: list[list[float | None]] = [[None] * len(rows) for _ in rows]
    for i, a in enumerate(known):
        for j, b in enumerate(known):
            whole[a][b] = float(found[i, j])
    return whole


def _variance(covariance: Mapping[str, Any] | None, key: str, a: int, b: int | None = None) -> tuple[float, int] | None:
    """Return the variance over documents of a group's mean, or of the difference of two, and the number of documents."""
    rows = None if covariance is None else covariance["figures"].get(key)
    if covariance is None or rows is None or rows[a][a] is None or (b is not None and rows[b][b] is None):
        return None
    value = rows[a][a] if b is None else rows[a][a] + rows[b][b] - 2 * rows[a][b]
    return max(0.0, value), covariance["documents"]


def with_intervals(figures: dict[str, Any], covariance: Mapping[str, Any] | None, place: int) -> dict[str, Any]:
    """Add to each figure its standard deviation over seeds, and an interval over seeds and documents."""
    found = {}
    for key, entry in figures.items():
        values = [value for value in entry["values"] if value is not None]
        about = uncertainty([(sd_of(values), len(values))], _variance(covariance, key, place)) if values else None
        ends = (None, None) if about is None else (entry["mean"] - about.half_width, entry["mean"] + about.half_width)
        sd = None if about is None else about.seed_sd
        found[key] = entry | {
            "seed_sd": sd,
            "low": ends[0],
            "high": ends[1],
            "interval_over": None if about is None else about.over,
        }
    return found


def family_differences(
    comparison: Mapping[str, Any],
    columns: Sequence[Column],
    claims: Sequence[Mapping[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Return the differences between families of a ``comparison.json``, with verdicts.

    Args:
        comparison: The output of ``compare``; older files have no covariance over documents, so intervals cover seeds only.
        columns: Figures, and whether lower or higher is better.
        claims: Mappings with ``family``, ``figure`` and optionally ``against``, corrected for multiple testing together. By
            default every family against the comparison's reference, corrected figure by figure.

    Returns:
        One mapping for each: ``family``, ``against``, ``figure``, ``difference``, ``low``, ``high``, ``interval_over``,
        ``seed_sd``, ``detectable``, ``margin``, ``p``, ``p_holm``, ``p_equivalent``, ``p_equivalent_holm``, ``verdict``,
        ``negligible``, and any other keys of the claim.

    Raises:
        ValueError: If a claim names a family or figure that the comparison lacks.
    """
    families = {family["name"]: (place, family) for place, family in enumerate(comparison["families"])}
    better = {column.key: column.better for column in columns if column.better is not None}
    rivals = [name for name, (_, family) in families.items() if family["selection"] == "per token"]
    reference = comparison.get("against")
    asked: list[list[dict[str, Any]]] = [[dict(claim) for claim in claims]] if claims is not None else []
    if claims is None:
        asked = [[{"family": name, "figure": key} for name in rivals if name != reference] for key in better]
    found = []
    for together in asked:
        rows = [_asked(claim, families, reference, better, comparison, claims is not None) for claim in together]
        known = [row for row in rows if row is not None]
        lower = [better[row["figure"]] is min for row in known]
        off = [any(families[row[side]][1].get("off_target", False) for side in ("family", "against")) for row in known]
        found += decide(known, lower, off)
    return found


def _asked(
    claim: dict[str, Any],
    families: Mapping[str, tuple[int, dict[str, Any]]],
    reference: str | None,
    better: Mapping[str, Any],
    comparison: Mapping[str, Any],
    strict: bool,
) -> dict[str, Any] | None:
    """Return the difference that a claim is about, or ``None`` if a figure was not measured and ``strict`` is false."""
    key, against = claim["figure"], claim.get("against", reference)
    for name in (claim["family"], against):
        require_choice("claim: family", name, list(families))
    require_choice("claim: figure", key, list(better))
    (place, family), (other, rival) = families[claim["family"]], families[str(against)]
    entries = [each["figures"].get(key) for each in (family, rival)]
    values = [[value for value in entry["values"] if value is not None] if entry else [] for entry in entries]
    if not all(values):
        if strict:
            raise ValueError(
                f"claim: {key}: expected this figure for both {claim['family']} and {against}, got it for one at most."
            )
        return None
    seeds = [each.get("seeds") for each in (family, rival)]
    whole = all(len(v) == len(entry["values"]) for v, entry in zip(values, entries, strict=True))
    paired = whole and len(values[0]) == len(values[1]) and (seeds[0] == seeds[1])
    documents = _variance(comparison.get("document_covariance"), key, place, other)
    step = 1 / family["n_latents"] if key in LATENT_SHARES and family.get("n_latents") else 0.0
    return claim | {"against": against} | difference(key, values[0], values[1], documents, paired, step)


def reseed_noise(families: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Return the standard deviation over seeds, pooled over families with several: the effect of retraining one recipe.

    ``None`` if every family has a single seed: reseeding noise is then unknown.
    """
    found: dict[str, Any] = {}
    for key in keys:
        groups = [[v for v in f["figures"][key]["values"] if v is not None] for f in families if key in f["figures"]]
        several = [values for values in groups if len(values) > 1]
        df = sum(len(values) - 1 for values in several)
        total = sum(sd_of(values) ** 2 * (len(values) - 1) for values in several)
        found[key] = {"seed_sd": math.sqrt(total / df), "df": df} if df else None
    return found
