"""Random circuits with as many units per group (hook) as a given one: the floor of faithfulness."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .faithfulness import Trials, circuit_members


class FloorCurve(NamedTuple):
    """Faithfulness of random circuits by size: their mean, and that of the best of each size."""

    mean: Float[np.ndarray, " sizes"]
    best: Float[np.ndarray, " sizes"]


def random_circuit(
    kept: Bool[Tensor, " units"],
    groups: Mapping[str, slice],
    generator: torch.Generator,
    among: Bool[Tensor, " units"] | None = None,
) -> Bool[Tensor, " units"]:
    """Return a random mask with the same number of units in every group, drawn from ``among`` (default: all units)."""
    found = torch.zeros_like(kept)
    for group in groups.values():
        count = int(kept[group].sum())
        members = torch.arange(group.start, group.stop)
        candidates = members if among is None else members[among[group]]
        assert len(candidates) >= count
        found[candidates[torch.randperm(len(candidates), generator=generator)[:count]]] = True
    return found


def random_circuits(
    kept: Bool[Tensor, " units"],
    groups: Mapping[str, slice],
    n: int,
    seed: int,
    among: Bool[Tensor, " units"] | None = None,
) -> list[Bool[Tensor, " units"]]:
    """Return ``n`` masks of ``random_circuit``."""
    generator = torch.Generator().manual_seed(seed)
    return [random_circuit(kept, groups, generator, among) for _ in range(n)]


def floor_curve(trials: Trials, order: Int[Tensor, " units"], sizes: Sequence[int], n: int, seed: int = 0) -> FloorCurve:
    """Evaluate, for every size, ``n`` random circuits with as many units per group as the first units of ``order``."""
    means, bests = [], []
    full, empty = trials.full.mean(), trials.empty.mean()
    for size in sizes:
        masks = random_circuits(circuit_members(order, size), trials.space.groups, n, seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = (np.stack([trials.metric(mask).mean() for mask in masks]) - empty) / (full - empty)
        means.append(values.mean())
        bests.append(values.max())
    return FloorCurve(np.array(means), np.array(bests))
