"""A task's circuit in two checkpoints of a model: units gained, lost and kept, and what the gained ones do.

Scores change for two reasons: a unit has learned something, or what it reads or what reads it has. Exchanging the weights of
one unit tells them apart: ``into_base`` is the change of the base model's metric if one unit has the tuned model's weights,
``into_tuned`` the drop of the tuned model's metric if it has the base model's. Both are 0 for a unit whose weights are equal in
both models, however much its score has changed. A unit that only other changed units read shows in the second, one that writes
to the output by itself in both; ``exchanged`` is the one of larger magnitude, pair by pair.

Weights are exchanged by way of outputs: a unit writes what it writes in a run of the other model whose modules all read what
they read in this one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....training.activations.model import LanguageModel
from ....training.activations.sites import find_block, n_layers
from ....training.tokens import tokenizer_content
from ..compared_units import n_heads
from ..methods.exact import patched_drops
from ..scoring.random_circuits import random_circuits
from ..tasks.pairs import BATCH, PromptPairs
from ..units.ablation import Filler, ablation_values
from ..units.space import Space, State
from .overlaps import figure
from .scored_task import PairFigure, ScoredTask, half_distance, mean, mean_ratio

# Units whose weights are exchanged one by one: those whose score changed most.
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
    put, taken = _exchanged(base, tuned, looked), _exchanged(tuned, base, looked)
    effects = {"into_base": -put, "into_tuned": taken, "exchanged": np.where(np.abs(put) > np.abs(taken), -put, taken)}
    gained = circuits[1] & ~circuits[0]
    row: Row = {"base": base.name, "tuned": tuned.name, "task": base.task}
    row |= {f"size_{side}": int(kept.sum()) for side, kept in zip(("base", "tuned"), circuits, strict=True)}
    row |= {
        GAINED: int(gained.sum()),
        LOST: int((circuits[0] & ~circuits[1]).sum()),
        KEPT: int((circuits[0] & circuits[1]).sum()),
    }
    row["ceiling_exchanged"] = half_distance(effects["exchanged"], seed)
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
    effects: dict[str, Float[np.ndarray, "pairs units"]],
    ceilings: Row,
) -> list[Row]:
    """Return a row for every unit that was looked at, those of largest ``exchanged`` first."""
    units = looked.nonzero().flatten().tolist()
    names, groups = base.space.names(), base.space.group_of(units)
    drawn = [np.abs(task.resampled_scores()[:, units]) for task in (base, tuned)]
    ends = np.quantile(drawn[1] - drawn[0], [0.025, 0.975], axis=0)
    rows = []
    for at, (unit, group) in enumerate(zip(units, groups, strict=True)):
        before, after = (bool(kept[unit]) for kept in circuits)
        scores = [float(task.values[unit]) for task in (base, tuned)]
        gain = PairFigure(abs(scores[1]) - abs(scores[0]), *(float(end[at]) for end in ends))
        moved = {key: mean(values[:, unit]) for key, values in effects.items()}
        row = {"unit": names[unit], "group": group, "status": _status(before, after)}
        row |= {"score_base": scores[0], "score_tuned": scores[1]} | figure("gain", gain)
        for key, measured in moved.items():
            row |= figure(key, measured)
        row["gain_beyond_ceiling"] = abs(gain.value) > ceilings["ceiling_gain"]
        row["exchanged_beyond_ceiling"] = abs(moved["exchanged"].value) > ceilings["ceiling_exchanged"]
        rows.append(row)
    return sorted(rows, key=lambda row: (-abs(row["exchanged"]), -abs(row["gain"])))


def _status(before: bool, after: bool) -> str:
    return {(False, True): GAINED, (True, False): LOST, (True, True): KEPT, (False, False): NEITHER}[before, after]


@torch.no_grad()
def _exchanged(run: ScoredTask, donor: ScoredTask, units: Bool[Tensor, " units"]) -> Float[np.ndarray, "pairs units"]:
    """Return the drop of one model's metric with the weights of each unit taken from the other model."""
    found = []
    for some in run.judged_on.batches(BATCH):
        logits, own = run.space.see(some.clean)
        other = _same_inputs(donor.space, run.space.model, some.clean)
        differs = (run.space.distance(own, other) > 0).cpu() & units
        found.append(patched_drops(run.space, some, some.clean, some.measure(logits), other, differs))
    return torch.cat(found).double().cpu().numpy()


def _same_inputs(space: Space, model: LanguageModel, token_ids: Int[Tensor, "pairs positions"]) -> State:
    """Return unit activations of a run in which blocks, attentions and MLPs read what they read in another model's run."""
    reads = _input_hooks(space.model)
    given, seen = model.activations(token_ids.to(model.device), reads), {}

    def held(hook: str) -> Callable[[Tensor], Tensor]:
        def reader(x: Tensor) -> Tensor:
            x = given[hook].to(x) if hook in given else x
            seen[hook] = x.clone()
            return x

        return reader

    with space.model.hooked({hook: held(hook) for hook in dict.fromkeys([*reads, *space.hooks])}):
        space.passes.run(token_ids)
    return space.state({hook: seen[hook] for hook in space.hooks})


def _input_hooks(model: LanguageModel) -> tuple[str, ...]:
    found = []
    for layer in range(n_layers(model.module)):
        block = find_block(model.module, layer)
        inner = [f"{path}:in" for path in (block.attention, block.mlp and block.mlp[0]) if path is not None]
        found += [f"{block.path}:in", *inner]
    return tuple(dict.fromkeys(found))


def _ablated(
    tuned: ScoredTask, gained: Bool[Tensor, " units"], masks: list[Bool[Tensor, " units"]], ablation: str, seed: int
) -> Row:
    """Return the share of the tuned model's metric that is lost without the gained units, and its accuracy."""
    trials = tuned.trials
    fill = ablation_values(tuned.space, ablation, tuned.chosen_on, seed)
    lost = [mean_ratio(trials.full - trials.metric(~mask), trials.full - trials.empty) for mask in (gained, *masks)]
    before, after = (accuracy_with(tuned.space, tuned.judged_on, kept, fill) for kept in (torch.ones_like(gained), ~gained))
    return figure("lost", lost[0]) | _floor([each.value for each in lost[1:]]) | _accuracies(before, after)


def _put(base: ScoredTask, tuned: ScoredTask, gained: Bool[Tensor, " units"], masks: list[Bool[Tensor, " units"]]) -> Row:
    """Return the share of the difference of the models' metrics that the gained units' outputs make in the base model."""

    def fill(some: PromptPairs) -> State:
        return tuned.space.see(some.clean)[1]

    def share(mask: Bool[Tensor, " units"]) -> PairFigure:
        return mean_ratio(
            run_metric(base.space, base.judged_on, ~mask, fill) - base.trials.full, tuned.trials.full - base.trials.full
        )

    closed = [share(mask) for mask in (gained, *masks)]
    every = share(torch.ones_like(gained))
    before, after = (accuracy_with(base.space, base.judged_on, kept, fill) for kept in (torch.ones_like(gained), ~gained))
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
def accuracy_with(space: Space, pairs: PromptPairs, kept: Tensor, fill: Filler) -> PerPair:
    """Return the share of every pair's questions that are answered right, with units taken from ``fill``."""
    return _each(space, pairs, kept, fill, PromptPairs.right)


def _each(space: Space, pairs: PromptPairs, kept: Tensor, fill: Filler, of: Callable[[PromptPairs, Tensor], Tensor]) -> PerPair:
    found, at = [], 0
    for some in pairs.batches(BATCH):
        rows = kept[at : at + len(some)] if kept.ndim == 2 else kept
        found.append(of(some, space.run(some.clean, rows, fill(some))))
        at += len(some)
    return torch.cat(found).double().cpu().numpy()
