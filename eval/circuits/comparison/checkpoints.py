"""A task's circuit in two checkpoints of a model: units gained, lost and kept, and what the gained ones do.

Scores change for two reasons: a unit has learned something, or what it reads or what reads it has. ``from_tuned`` tells them
apart: the base model's metric with one unit's output taken from the tuned model's run on the same prompt, minus its own metric.
It is 0 for a unit whose weights and inputs are equal in both models, however much its score has changed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ....training.activations.model import LanguageModel, tokenizer_content
from ....training.activations.sites import find_block, n_layers
from ..compared_units import n_heads
from ..methods.exact import patched_drops
from ..scoring.random_circuits import random_circuits
from ..tasks.pairs import BATCH, PromptPairs
from ..units.ablation import Filler, ablation_values
from ..units.space import Space, State
from .overlaps import figure
from .scored_task import Measured, ScoredTask, half_distance, mean, ratio

# Units outside both circuits that are looked at one by one: those whose score changed most.
LOOKED_AT = 200
GAINED, LOST, KEPT, NEITHER = "gained", "lost", "kept", "in neither"

Row = dict[str, Any]
PerPair = Float[np.ndarray, " pairs"]


def require_same_architecture(base: LanguageModel, tuned: LanguageModel) -> None:
    """Raise ``ValueError`` unless both models have the same layers, heads, widths and tokenizer.

    Raises:
        ValueError: If the models differ, so that their units do not correspond.
    """
    kinds: dict[str, Callable[[LanguageModel], Any]] = {
        "layers": lambda model: n_layers(model.module),
        "heads per layer": n_heads,
        "width": lambda model: _width(model),
        "tokenizer": lambda model: None if model.tokenizer is None else tokenizer_content(model.tokenizer),
    }
    for what, of in kinds.items():
        one, other = of(base), of(tuned)
        if one != other:
            shown = "another" if what == "tokenizer" else f"{one} and {other}"
            raise ValueError(
                f"--model: expected two checkpoints of one model, with equal {what}, got {shown} ({base.id} and {tuned.id}): "
                "their units do not correspond. Compare a model with one that was trained from it."
            )


def _width(model: LanguageModel) -> int:
    hook = f"{find_block(model.module, 0).path}:out"
    return model.widths((hook,))[hook]


def changed_units(base: ScoredTask, tuned: ScoredTask, n_random: int, ablation: str = "resample", seed: int = 0) -> Row:
    """Return the units gained, lost and kept from ``base`` to ``tuned``, and the effects of the gained ones together.

    The circuits are those of faithfulness 0.8; a model without one has an empty circuit, and ``doubts`` says why.
    """
    circuits = [_own_circuit(task) for task in (base, tuned)]
    gains = np.abs(tuned.values) - np.abs(base.values)
    looked = torch.zeros(base.space.size, dtype=torch.bool)
    looked[torch.from_numpy(-np.abs(gains)).argsort(stable=True)[:LOOKED_AT]] = True
    looked |= circuits[0] | circuits[1]
    effects = _from_tuned(base, tuned, looked)
    gained = circuits[1] & ~circuits[0]
    row: Row = {"base": base.name, "tuned": tuned.name, "task": base.task}
    row |= {f"size_{side}": int(kept.sum()) for side, kept in zip(("base", "tuned"), circuits, strict=True)}
    row["ceiling_from_tuned"] = half_distance(effects, seed)
    row["ceiling_gain"] = max(half_distance(task.per_pair, seed) for task in (base, tuned))
    row["units"] = _unit_rows(base, tuned, circuits, looked, effects, row)
    row["doubts"] = [
        f"{task.name}: {_why_empty(task)}" for task, kept in zip((base, tuned), circuits, strict=True) if not kept.any()
    ]
    if gained.any():
        masks = random_circuits(gained, base.space.groups, n_random, seed)
        row["ablated"] = _ablated(tuned, gained, masks, ablation, seed)
        row["put"] = _put(base, tuned, gained, masks)
    return row


def _own_circuit(task: ScoredTask) -> Bool[Tensor, " units"]:
    return torch.zeros(task.space.size, dtype=torch.bool) if task.size is None else task.circuit(task.size)


def _why_empty(task: ScoredTask) -> str:
    return task.refused or "no circuit has faithfulness 0.8"


def _unit_rows(
    base: ScoredTask,
    tuned: ScoredTask,
    circuits: list[Bool[Tensor, " units"]],
    looked: Bool[Tensor, " units"],
    effects: Float[np.ndarray, "pairs units"],
    ceilings: Row,
) -> list[Row]:
    """Return a row for every unit in a circuit or with a changed score, those of largest ``from_tuned`` first."""
    units = looked.nonzero().flatten().tolist()
    names, groups = base.space.names(), base.space.group_of(units)
    drawn = [np.abs(task.resampled_scores()[:, units]) for task in (base, tuned)]
    ends = np.quantile(drawn[1] - drawn[0], [0.025, 0.975], axis=0)
    rows = []
    for at, (unit, group) in enumerate(zip(units, groups, strict=True)):
        before, after = (bool(kept[unit]) for kept in circuits)
        scores = [float(task.values[unit]) for task in (base, tuned)]
        gain = Measured(abs(scores[1]) - abs(scores[0]), *(float(end[at]) for end in ends))
        put = mean(effects[:, unit])
        row = {"unit": names[unit], "group": group, "status": _status(before, after)}
        row |= {"score_base": scores[0], "score_tuned": scores[1]} | figure("gain", gain) | figure("from_tuned", put)
        row["gain_beyond_ceiling"] = abs(gain.value) > ceilings["ceiling_gain"]
        row["from_tuned_beyond_ceiling"] = abs(put.value) > ceilings["ceiling_from_tuned"]
        rows.append(row)
    return sorted(rows, key=lambda row: (-abs(row["from_tuned"]), -abs(row["gain"])))


def _status(before: bool, after: bool) -> str:
    return {(False, True): GAINED, (True, False): LOST, (True, True): KEPT, (False, False): NEITHER}[before, after]


def _from_tuned(base: ScoredTask, tuned: ScoredTask, units: Bool[Tensor, " units"]) -> Float[np.ndarray, "pairs units"]:
    """Return the change of the base model's metric with each unit's output taken from the tuned model."""
    found = []
    with torch.no_grad():
        for some in base.judged_on.batches(BATCH):
            logits, own = base.space.see(some.clean)
            _, other = tuned.space.see(some.clean)
            differs = (base.space.distance(own, other) > 0).cpu() & units
            found.append(-patched_drops(base.space, some, some.clean, some.measure(logits), other, differs))
    return torch.cat(found).double().cpu().numpy()


def _ablated(
    tuned: ScoredTask, gained: Bool[Tensor, " units"], masks: list[Bool[Tensor, " units"]], ablation: str, seed: int
) -> Row:
    """Return the share of the tuned model's metric that is lost without the gained units, and its accuracy."""
    trials = tuned.trials
    fill = ablation_values(tuned.space, ablation, tuned.chosen_on, seed)
    lost = [ratio(trials.full - trials.metric(~mask), trials.full - trials.empty) for mask in (gained, *masks)]
    before, after = (accuracy(tuned.space, tuned.judged_on, kept, fill) for kept in (torch.ones_like(gained), ~gained))
    return figure("lost", lost[0]) | _floor([each.value for each in lost[1:]]) | _accuracies(before, after)


def _put(base: ScoredTask, tuned: ScoredTask, gained: Bool[Tensor, " units"], masks: list[Bool[Tensor, " units"]]) -> Row:
    """Return the share of the difference of the models' metrics that the gained units' outputs make in the base model."""

    def fill(some: PromptPairs) -> State:
        return tuned.space.see(some.clean)[1]

    def share(mask: Bool[Tensor, " units"]) -> Measured:
        return ratio(
            run_metric(base.space, base.judged_on, ~mask, fill) - base.trials.full, tuned.trials.full - base.trials.full
        )

    closed = [share(mask) for mask in (gained, *masks)]
    every = share(torch.ones_like(gained))
    before, after = (accuracy(base.space, base.judged_on, kept, fill) for kept in (torch.ones_like(gained), ~gained))
    found = figure("closed", closed[0]) | _floor([each.value for each in closed[1:]]) | _accuracies(before, after)
    return found | {"closed_by_all": figure("value", every)["value"]}


def _floor(values: list[float]) -> Row:
    known = [value for value in values if np.isfinite(value)]
    return {"floor": float(np.mean(known)) if known else None, "floor_best": max(known, default=None)}


def _accuracies(before: PerPair, after: PerPair) -> Row:
    return figure("accuracy_before", mean(before)) | figure("accuracy_after", mean(after))


@torch.no_grad()
def run_metric(space: Space, pairs: PromptPairs, kept: Tensor, fill: Filler) -> PerPair:
    """Return the metric of every pair with the units that are not kept taken from ``fill``."""
    return _each(space, pairs, kept, fill, PromptPairs.measure)


@torch.no_grad()
def accuracy(space: Space, pairs: PromptPairs, kept: Tensor, fill: Filler) -> PerPair:
    """Return the share of every pair's questions that are answered right, with units taken from ``fill``."""
    return _each(space, pairs, kept, fill, PromptPairs.right)


def _each(space: Space, pairs: PromptPairs, kept: Tensor, fill: Filler, of: Callable[[PromptPairs, Tensor], Tensor]) -> PerPair:
    found, at = [], 0
    for some in pairs.batches(BATCH):
        rows = kept[at : at + len(some)] if kept.ndim == 2 else kept
        found.append(of(some, space.run(some.clean, rows, fill(some))))
        at += len(some)
    return torch.cat(found).double().cpu().numpy()
