"""Overlaps of every two circuits, with ceiling, floor, and tests; and every circuit run on every task."""

from collections.abc import Sequence
from itertools import combinations
from statistics import median_low
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ....sae.files import json_number
from ...bootstrap import percentiles
from ...compare.statistics import holm
from ..scoring.faithfulness import jaccard
from ..scoring.overlap import (
    chance_p,
    jaccard_of_counts,
    rank_correlation,
    share_of_smaller,
    shared_by_chance,
    swap_p,
)
from ..scoring.random_circuits import random_circuits
from .scored_task import PairFigure, ScoredTask

EQUAL, FAITHFUL = "equal size", "faithfulness 0.8"
# Share of all units in a circuit if none reaches faithfulness 0.8.
FALLBACK_SHARE = 0.1
LISTED = 200

Row = dict[str, Any]
Masks = np.ndarray


def equal_size(tasks: Sequence[ScoredTask]) -> int:
    """Return the size at which all circuits are compared: the median of those with faithfulness 0.8."""
    known = [task.size for task in tasks if task.size is not None]
    return median_low(known) if known else max(1, round(FALLBACK_SHARE * tasks[0].space.size))


def overlap_rows(tasks: Sequence[ScoredTask], seed: int = 0) -> list[Row]:
    """Return a row for every two tasks and both ways of choosing the sizes; p-values are corrected for the number of rows."""
    size, rows = equal_size(tasks), []
    for a, b in combinations(tasks, 2):
        correlation = _correlation(a, b)
        for at, sizes in ((EQUAL, (size, size)), (FAITHFUL, (a.size, b.size))):
            about = {"a": a.name, "b": b.name, "at": at}
            if sizes[0] is None or sizes[1] is None:
                missing = [task.name for task in (a, b) if task.size is None]
                rows.append(about | {"refused": f"no circuit of {' and '.join(missing)} has faithfulness 0.8"})
            else:
                rows.append(about | _overlap(a, b, sizes[0], sizes[1], seed) | correlation)
    for at in (EQUAL, FAITHFUL):
        tested = [row for row in rows if row["at"] == at and "refused" not in row]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = p
    return rows


def _overlap(a: ScoredTask, b: ScoredTask, size_a: int, size_b: int, seed: int) -> Row:
    sized = ((a, size_a), (b, size_b))
    first, second = (task.circuit(size) for task, size in sized)
    shared = first & second
    counts = [int(mask.sum()) for mask in (first, second, shared)]
    drawn = [task.resampled(size) for task, size in sized]
    halves = [task.halves(size, seed) for task, size in sized]
    ceilings = [_jaccards(*both) for both in halves]
    across = np.mean([_jaccards(one, other) for one in halves[0] for other in halves[1]])
    by_chance = shared_by_chance(a.space.groups, first, second, a.scored, b.scored, seed)
    floor = jaccard_of_counts(by_chance, *(np.full_like(by_chance, count) for count in counts[:2]))
    row = {"size_a": counts[0], "size_b": counts[1], "shared": counts[2], "jaccard": jaccard(first, second)}
    row |= _between("jaccard", _jaccards(*drawn))
    row |= {"share_of_smaller": share_of_smaller(first, second)}
    row |= _between("share_of_smaller", _shares(*drawn))
    row |= {
        "jaccard_halves": float(across),
        "ceiling": float(np.mean(ceilings)),
        "ceiling_a": float(ceilings[0].mean()),
        "ceiling_b": float(ceilings[1].mean()),
        "floor": float(floor.mean()),
        "floor_high": float(np.quantile(floor, 0.975)),
        "p": chance_p(counts[2], by_chance),
    }
    return {key: _number(value) for key, value in row.items()} | _shared_part(a, b, shared)


def _shared_part(a: ScoredTask, b: ScoredTask, shared: Bool[Tensor, " units"]) -> Row:
    """Return the faithfulness of the intersection on both tasks."""
    row: Row = {}
    for side, task in (("a", a), ("b", b)):
        row |= figure(f"shared_on_{side}", None if task.refused else task.faithfulness(shared))
    return row


def _correlation(a: ScoredTask, b: ScoredTask) -> Row:
    """Return Spearman's correlation of absolute scores, of units that any of both tasks gives a score."""
    either = (a.scored | b.scored).numpy()
    if either.sum() < 3:
        return figure("spearman", None)
    found = rank_correlation(*(np.abs(task.values[either]) for task in (a, b)))
    low, high = percentiles(rank_correlation(*(np.abs(task.resampled_scores()[:, either]) for task in (a, b))))
    return figure("spearman", PairFigure(float(found), float(low), float(high)))


def cross_rows(tasks: Sequence[ScoredTask], n_random: int, seed: int = 0) -> list[Row]:
    """Return the faithfulness of every circuit on every task, with that of random circuits of equal counts per group."""
    size, rows = equal_size(tasks), []
    for owner in tasks:
        for at, own in ((EQUAL, size), (FAITHFUL, owner.size)):
            if own is None:
                continue
            kept = owner.circuit(own)
            masks = random_circuits(kept, owner.space.groups, n_random, seed, owner.scored)
            for task in tasks:
                row = {"circuit": owner.name, "task": task.name, "at": at, "size": int(kept.sum())}
                if task.refused:
                    rows.append(row | {"refused": task.refused})
                    continue
                floor = np.array([task.faithfulness_of(mask) for mask in masks])
                row |= figure("faithfulness", task.faithfulness(kept))
                rows.append(row | {"floor": _number(floor.mean()), "floor_best": _number(floor.max())})
    return rows


def difference_rows(tasks: Sequence[ScoredTask]) -> list[Row]:
    """Return, for every task and every two others, by how much more it overlaps with one, at equal sizes.

    p-values are corrected for the number of rows.
    """
    size, rows = equal_size(tasks), []
    for a in tasks:
        others = [task for task in tasks if task is not a]
        for b, c in combinations(others, 2):
            masks = [task.circuit(size) for task in (a, b, c)]
            drawn = [task.resampled(size) for task in (a, b, c)]
            row = {"a": a.name, "b": b.name, "c": c.name}
            row |= {"difference": jaccard(masks[0], masks[1]) - jaccard(masks[0], masks[2])}
            row |= _between("difference", _jaccards(drawn[0], drawn[1]) - _jaccards(drawn[0], drawn[2]))
            rows.append(row | {"p": swap_p(*masks)})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def shared_rows(tasks: Sequence[ScoredTask]) -> list[Row]:
    """Return the units in two or more circuits of equal size, those of most circuits and largest scores first."""
    size = equal_size(tasks)
    masks = torch.stack([task.circuit(size) for task in tasks])
    units = (masks.sum(0) > 1).nonzero().flatten().tolist()
    names, groups = tasks[0].space.names(), tasks[0].space.group_of(units)
    rows = [
        {
            "unit": names[unit],
            "group": group,
            "circuits": [task.name for task, mask in zip(tasks, masks, strict=True) if mask[unit]],
            "scores": {task.name: _number(task.values[unit]) for task in tasks},
        }
        for unit, group in zip(units, groups, strict=True)
    ]
    return sorted(rows, key=lambda row: (-len(row["circuits"]), -sum(abs(score) for score in row["scores"].values())))[:LISTED]


def figure(key: str, measured: PairFigure | None) -> Row:
    """Return the entries of a figure and its interval, None if it was not measured or is not finite."""
    values = (None,) * 3 if measured is None else (measured.value, measured.low, measured.high)
    return dict(zip((key, f"{key}_low", f"{key}_high"), (_number(value) for value in values), strict=True))


def _jaccards(a: Masks, b: Masks) -> np.ndarray:
    """Return the Jaccard index of every two rows."""
    return jaccard_of_counts((a & b).sum(-1), a.sum(-1), b.sum(-1))


def _shares(a: Masks, b: Masks) -> np.ndarray:
    smaller = np.minimum(a.sum(-1), b.sum(-1))
    return np.where(smaller > 0, (a & b).sum(-1) / np.maximum(smaller, 1), 1.0)


def _between(key: str, drawn: np.ndarray) -> Row:
    low, high = percentiles(drawn)
    return {f"{key}_low": float(low), f"{key}_high": float(high)}


def _number(value: Any) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    number = json_number(float(value))
    return None if number is None else round(number, 6)
