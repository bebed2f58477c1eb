"""Differences between groups of runs: confidence intervals, tests, equivalence tests and detectable differences.

A group is one recipe trained with several seeds, all scored on the same documents. The variance of a mean has two parts: that
of the seeds, ``s^2 / n``, and that of the documents, estimated by resampling them. Degrees of freedom of their sum follow
Satterthwaite, and intervals and tests use Student's t. A bootstrap over three seeds would give intervals far too narrow, as
there are only ten distinct resamples. Where seeds are paired (equal seeds fix the initial weights and the order of the tokens),
the seeds' part is the variance of the paired differences.

Equivalence is tested separately, with two one-sided tests against a margin (Schuirmann 1987). A difference that neither test
resolves is undecided. Holm's correction (1979) runs over the tests of one figure, or over a list of claims.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from ..bootstrap import LEVEL

POWER = 0.8
# Differences below this share of the reference are negligible.
RELATIVE_MARGIN = 0.02
# An absolute margin, because these shares of latents may be 0.
LATENT_SHARE_MARGIN = 0.01
LATENT_SHARES = ("dead_fraction", "dead_training_fraction", "dense_fraction")
# Perfect at 1: the margin is relative to the distance from 1.
PERFECT_AT_ONE = ("ce_recovered_zero", "ce_recovered_mean", "ce_recovered_resample", "top1_agreement")
SETTINGS = {
    "level": LEVEL,
    "power": POWER,
    "relative_margin": RELATIVE_MARGIN,
    "latent_share_margin": LATENT_SHARE_MARGIN,
    "correction": "Holm",
}
BETTER, WORSE, EQUIVALENT, UNDECIDED, OFF_TARGET = "better", "worse", "equivalent", "undecided", "not at equal l0"


@dataclass(frozen=True)
class Uncertainty:
    """The standard error of a mean or difference, its degrees of freedom, and the sources of variance it includes.

    ``seed_sd`` is the standard deviation over seeds, or ``None`` for a single seed; the error then covers documents only.
    """

    error: float
    df: float
    over: str
    seed_sd: float | None

    @property
    def half_width(self) -> float:
        """Half the width of the interval at ``LEVEL``."""
        return float(student.ppf((1 + LEVEL) / 2, self.df)) * self.error

    @property
    def detectable(self) -> float:
        """The smallest true difference that a test at 1 - ``LEVEL`` detects with probability ``POWER``."""
        return self.half_width + float(student.ppf(POWER, self.df)) * self.error


def uncertainty(
    seeds: Sequence[tuple[float, int]], documents: tuple[float, int] | None, paired_sd: float | None = None
) -> Uncertainty | None:
    """Combine the variances of seeds and documents; return ``None`` if neither is known.

    Args:
        seeds: Standard deviation over seeds and number of seeds, for each mean involved.
        documents: Variance over resampled documents, and number of documents.
        paired_sd: The standard deviation to report in place of the combined one.
    """
    parts = [(sd * sd / n, n - 1) for sd, n in seeds if n > 1]
    complete = bool(seeds) and all(n > 1 for _, n in seeds)
    names = ["seeds"] if complete else []
    parts = parts if complete else []
    if documents is not None and documents[1] > 1:
        parts.append((documents[0], documents[1] - 1))
        names.append("documents")
    if not parts:
        return None
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / df for variance, df in parts)
    df = total**2 / spread if spread > 0 else float(sum(df for _, df in parts))
    sd = paired_sd if paired_sd is not None else (math.sqrt(sum(sd * sd for sd, _ in seeds)) if complete else None)
    return Uncertainty(math.sqrt(total), df, " and ".join(names), sd)


def sd_of(values: Sequence[float]) -> float:
    """Return the sample standard deviation (n - 1), or 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def margin_of(key: str, reference: float) -> float:
    """Return the smallest difference of a figure that counts as relevant."""
    if key in LATENT_SHARES:
        return LATENT_SHARE_MARGIN
    return RELATIVE_MARGIN * abs(1 - reference if key in PERFECT_AT_ONE else reference)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors))
    return [float(value) for value in corrected]


def difference(
    key: str,
    values: Sequence[float],
    reference: Sequence[float],
    documents: tuple[float, int] | None,
    paired: bool,
    resolution: float = 0.0,
    margin: float | None = None,
) -> dict[str, Any]:
    """Return the difference between two groups' means of a figure, with its interval and uncorrected p-values.

    Args:
        key: The figure.
        values: One per seed.
        reference: The other group's values.
        documents: Variance of the difference over resampled documents, and number of documents; ``None`` if unknown.
        paired: True if both groups have the same seeds in the same order.
        resolution: Step size of the figure's values. Seeds may agree merely because of rounding, so their standard deviation is
            taken to be at least that of the rounding error.
        margin: The smallest difference that counts as relevant; that of ``margin_of`` if not given.
    """
    least = resolution / math.sqrt(12)
    mean = statistics.fmean(values) - statistics.fmean(reference)
    margin = margin_of(key, statistics.fmean(reference)) if margin is None else margin
    if paired:
        sd = max(least, sd_of([a - b for a, b in zip(values, reference, strict=True)]))
        found = uncertainty([(sd, len(values))], documents)
    else:
        found = uncertainty([(max(least, sd_of(group)), len(group)) for group in (values, reference)], documents)
    row: dict[str, Any] = {"figure": key, "difference": mean, "margin": margin, "paired": paired}
    if found is None:
        return row | dict.fromkeys(("low", "high", "interval_over", "seed_sd", "detectable", "p", "p_equivalent"))
    return row | {
        "low": mean - found.half_width,
        "high": mean + found.half_width,
        "interval_over": found.over,
        "seed_sd": found.seed_sd,
        "detectable": found.detectable,
        "p": 2 * _beyond(abs(mean), found),
        "p_equivalent": max(_beyond(margin - mean, found), _beyond(margin + mean, found)),
    }


def _beyond(distance: float, found: Uncertainty) -> float:
    """Return the probability that Student's t exceeds a distance; without any error, the distance alone decides."""
    if found.error == 0:
        return 0.0 if distance > 0 else 0.5
    return float(student.sf(distance / found.error, found.df))


def decide(rows: Sequence[dict[str, Any]], lower_is_better: Sequence[bool], off_target: Sequence[bool]) -> list[dict[str, Any]]:
    """Add corrected p-values and a verdict to differences that are tested together.

    Differences with a single seed (documents do not show what another seed would give) or away from the common l0 are neither
    tested nor counted in the correction. ``negligible`` marks a significant difference smaller than the margin.
    """
    tested = [row for row, off in zip(rows, off_target, strict=True) if row["seed_sd"] is not None and not off]
    corrected = dict(zip(map(id, tested), holm([row["p"] for row in tested]), strict=True))
    same = dict(zip(map(id, tested), holm([row["p_equivalent"] for row in tested]), strict=True))
    found = []
    for row, lower, off in zip(rows, lower_is_better, off_target, strict=True):
        p, p_same = corrected.get(id(row)), same.get(id(row))
        different = p is not None and p <= 1 - LEVEL
        equivalent = p_same is not None and p_same <= 1 - LEVEL
        verdict = UNDECIDED
        if off:
            verdict = OFF_TARGET
        elif different:
            verdict = BETTER if (row["difference"] < 0) == lower else WORSE
        elif equivalent:
            verdict = EQUIVALENT
        negligible = verdict in (BETTER, WORSE) and equivalent
        found.append(row | {"p_holm": p, "p_equivalent_holm": p_same, "verdict": verdict, "negligible": negligible})
    return found
