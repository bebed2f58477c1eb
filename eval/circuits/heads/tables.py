"""Rows of ``circuits.json`` about heads: direct effects and attention with intervals over pairs, and ranks."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ....training.activations.model import LanguageModel
from ...bootstrap import percentiles, resamples
from ..tasks.pairs import PromptPairs
from .direct_effects import DirectEffects, attends, direct_effects
from .low_rank import Head, each_part

# Heads of the rank test: those of largest direct effect that make up this share of the positive ones, but so many at most.
SHARE, MOST = 0.8, 8

Row = dict[str, Any]


def head_tables(model: LanguageModel, chosen_on: PromptPairs, judged_on: PromptPairs, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows of direct effects on ``judged_on``, and those of the ranks of the heads with the largest ones.

    Heads and directions of the ranks are chosen on the other pairs. Pairs without labels have no ranks.

    Raises:
        ValueError: As ``direct_effects``.
    """
    found = direct_effects(model, judged_on)
    rows = [{"task": judged_on.task} | row for row in effect_rows(found)]
    if found.attention is None:
        return rows, []
    heads = strongest_heads(direct_effects(model, chosen_on))
    ranks = [
        {
            "task": judged_on.task,
            "heads": [f"a{layer}.h{head}" for layer, head in heads],
            "part": curve.part,
            "options": found.attention.shape[2],
            "rank_needed": curve.needed,
            "accuracy": curve.full,
            "ranks": curve.ranks,
            "accuracy_by_rank": curve.accuracy,
            "accuracy_random": curve.random,
        }
        for curve in each_part(model, heads, chosen_on, judged_on, seed)
    ]
    return rows, ranks


def effect_rows(found: DirectEffects) -> list[Row]:
    """Return a row per node, those of largest direct effect first."""
    columns = {"direct": found.direct}
    rows: list[Row] = [{"node": node} for node in found.nodes]
    _add(rows, columns)
    for row in rows:
        row["direct_share"] = row["direct"] / float(found.logit.mean()) if float(found.logit.mean()) else None
    if found.attention is not None and found.right is not None:
        own = {row["node"]: row for row in rows}
        heads = [own[head] for head in found.heads]
        index = found.right[:, None, None].expand(-1, len(heads), 1)
        right = found.attention.gather(2, index)[:, :, 0]
        _add(heads, {"attention_right": right, "attention_others": found.attention.sum(2) - right})
        for place, row in enumerate(heads):
            row["attends"] = attends(found.attention[:, place], found.right)
    return sorted(rows, key=lambda row: -row["direct"])


def _add(rows: Sequence[Row], columns: dict[str, torch.Tensor]) -> None:
    """Add the mean over pairs of every column, ``(pairs, rows)``, with the ends of its interval."""
    for key, values in columns.items():
        table = values.double().numpy()
        drawn = np.stack([weights @ table / len(table) for weights in resamples(len(table))])
        low, high = percentiles(drawn)
        for place, row in enumerate(rows):
            row |= {key: float(table[:, place].mean()), f"{key}_low": float(low[place]), f"{key}_high": float(high[place])}


def strongest_heads(found: DirectEffects) -> list[Head]:
    """Return the layers and numbers of the heads of largest positive direct effect that make up ``SHARE`` of it."""
    means = {node: float(value) for node, value in zip(found.nodes, found.direct.mean(0), strict=True)}
    heads = sorted((head for head in found.heads if means[head] > 0), key=lambda head: -means[head])
    total, chosen = sum(means[head] for head in heads), []
    for head in heads[:MOST]:
        if sum(means[one] for one in chosen) >= SHARE * total:
            break
        chosen.append(head)
    return [(int(layer), int(number)) for layer, number in (re.findall(r"\d+", head) for head in chosen)]
