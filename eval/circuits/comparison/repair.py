"""Repair of a task by units of another: in one task's runs, units do what they do on prompts of the other.

Every prompt of the repaired task B gets a prompt of task A with the same answer. Units of A's circuit that B's lacks take the
activations they have on that prompt, at the positions that have the same name in both tasks (``subject``, ``end``) and at the
question; the rest of the run follows. Circuits are of equal size, as that of a task which the model does badly may have nearly
all units. As A's prompt holds the answer, units that carry it will say it: prompts of A with the opposite answer show whether
that is all (accuracy then falls), random units with equal counts per hook whether others would do.

Source: Merullo, Eickhoff and Pavlick 2024, arXiv:2310.08744, where heads of one task are made to act as in another.
"""

from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..scoring.random_circuits import random_circuits
from ..tasks.pairs import BATCH, PromptPairs, Question
from ..units.nodes import NodeSpace
from .checkpoints import PerPair
from .overlaps import figure
from .scored_task import ScoredTask, mean

LISTED = 100

Row = dict[str, Any]


def repair(a: ScoredTask, b: ScoredTask, size: int, n_random: int, seed: int = 0) -> Row:
    """Return B's accuracy before and after the units of A that B lacks do what they do on A's prompts, or ``refused``."""
    row: Row = {"a": a.name, "b": b.name}
    if not isinstance(a.space, NodeSpace):
        return row | {"refused": "edges have no activations of their own"}
    moved = a.circuit(size) & ~b.circuit(size)
    if not moved.any():
        return row | {"refused": f"every unit of {a.name} is in the circuit of {b.name}"}
    donors = _Donors(a, b, seed)
    if not donors.rows:
        return row | {"refused": f"no prompt of {a.name} has the answer of an evaluation prompt of {b.name}"}
    names = a.space.names()
    row |= {
        "units": [names[unit] for unit in moved.nonzero().flatten().tolist()][:LISTED],
        "n_units": int(moved.sum()),
        "pairs": len(donors.pairs),
        "pairs_left_out": len(b.judged_on) - len(donors.pairs),
        "positions": donors.positions,
    }
    before = donors.right(torch.zeros_like(moved), opposite=False)
    after = donors.right(moved, opposite=False)
    row |= figure("accuracy_before", mean(before)) | figure("accuracy_after", mean(after))
    row |= figure("change", mean(after - before))
    masks = random_circuits(moved, a.space.groups, n_random, seed, ~b.circuit(size))
    floor = [donors.right(mask, opposite=False).mean() for mask in masks]
    row |= {"floor": float(np.mean(floor)), "floor_best": float(np.max(floor))}
    row |= figure("accuracy_opposite", mean(donors.right(moved, opposite=True)) if donors.has_opposite else None)
    row |= figure("accuracy_all_of_a", mean(donors.right(a.circuit(size), opposite=False)))
    return row | ({"doubt": f"{b.name} has accuracy 1 before: nothing to repair"} if before.min() == 1 else {})


def require_answers_in_common(a: PromptPairs, b: PromptPairs) -> None:
    """Raise ``ValueError`` if no pair of B has a pair of A with the same answer.

    Raises:
        ValueError: If none has, so that nothing could be repaired.
    """
    if all(_partners(a, questions[-1], 0)[0] is None for questions in b.questions):
        raise ValueError(
            f"--repair: expected two tasks with answers in common, got {a.task} and {b.task}: no prompt of {a.task} has the "
            f"answer of a prompt of {b.task} without its foils. Repair a task by one that asks for the same words."
        )


class _Donors:
    """Prompts of task A for B's prompts, with the same and the opposite answer, and runs of B with units taken from them."""

    def __init__(self, a: ScoredTask, b: ScoredTask, seed: int):
        given = _joined(a.chosen_on, a.judged_on)
        found = [_partners(given, questions[-1], seed + index) for index, questions in enumerate(b.judged_on.questions)]
        rows = [index for index, (same, _) in enumerate(found) if same is not None]
        self.rows = rows
        self.pairs = b.judged_on.take(torch.tensor(rows, dtype=torch.long))
        self.has_opposite = all(found[index][1] is not None for index in rows)
        self.given = given
        self.partners = [[found[index][side] for index in rows] for side in (0, 1)]
        self.space, (self.maps, names) = b.space, self._positions()
        self.positions = sorted(names)
        n_positions = self.pairs.clean.shape[1]
        assert isinstance(a.space, NodeSpace)
        assert isinstance(b.space, NodeSpace)
        self.each = NodeSpace(b.space.model, b.space.parts, "each", n_positions)
        self.donor_space = a.space

    def _positions(self) -> tuple[list[list[dict[int, int]]], set[str]]:
        """Return each prompt's positions with their counterparts in A's prompts (same answer, opposite), and their names."""
        names, maps = set(), []
        for partners in self.partners:
            found = []
            for index, partner in enumerate(partners):
                if partner is None:
                    found.append({})
                    continue
                mine, theirs = _roles(self.pairs, index), _roles(self.given, partner)
                names |= mine.keys() & theirs.keys()
                found.append({mine[name]: theirs[name] for name in mine.keys() & theirs.keys()})
            maps.append(found)
        return maps, names

    @torch.no_grad()
    def right(self, moved: Bool[Tensor, " units"], opposite: bool) -> PerPair:
        """Return the accuracy of B's pairs with some units taken from A's prompts."""
        found = []
        for start in range(0, len(self.pairs), BATCH):
            rows = range(start, min(start + BATCH, len(self.pairs)))
            some = self.pairs.take(torch.tensor(list(rows)))
            partners = [self.partners[opposite][row] or 0 for row in rows]
            donors = self.given.take(torch.tensor(partners))
            places, mapped = self._places([self.maps[opposite][row] for row in rows])
            state = [_gathered(tensor, places) for tensor in self.donor_space.see(donors.clean)[1]]
            logits = self.each.run(some.clean, ~self._absent(moved, mapped), state)
            found.append(some.right(logits))
        return torch.cat(found).double().cpu().numpy()

    def _places(self, maps: list[dict[int, int]]) -> tuple[Int[Tensor, "some positions"], Bool[Tensor, "some positions"]]:
        places = torch.zeros(len(maps), self.pairs.clean.shape[1], dtype=torch.long)
        mapped = torch.zeros_like(places, dtype=torch.bool)
        for row, one in enumerate(maps):
            for here, there in one.items():
                places[row, here], mapped[row, here] = there, True
        return places, mapped

    def _absent(
        self, moved: Bool[Tensor, " units"], mapped: Bool[Tensor, "some positions"]
    ) -> Bool[Tensor, "some units_by_position"]:
        """Return the mask of units at positions that are taken from A's prompts; the space numbers position by position."""
        parts = [mapped[:, :, None] & moved[self.donor_space.groups[part.name]] for part in self.each.parts]
        return torch.cat([part.flatten(1) for part in parts], 1)


def _gathered(tensor: Tensor, places: Int[Tensor, "some positions"]) -> Tensor:
    """Return a donor's activations at each prompt's positions."""
    return tensor[torch.arange(len(places))[:, None], places.to(tensor.device)]


def _roles(pairs: PromptPairs, row: int) -> dict[str, int]:
    """Return the named positions of a pair, and that of its last question."""
    named = pairs.roles[row] if pairs.roles else {}
    return {**named, "question": pairs.questions[row][-1].position}


def _partners(given: PromptPairs, asked: Question, seed: int) -> tuple[int | None, int | None]:
    """Return random pairs whose last question has the same answer, and the opposite one, or None."""
    same, opposite = [], []
    right, wrong = set(asked.answers), set(asked.foils)
    for index, questions in enumerate(given.questions):
        answers = set(questions[-1].answers)
        if answers & right and not answers & wrong:
            same.append(index)
        elif answers & wrong and not answers & right:
            opposite.append(index)
    random = Random(seed)
    first, second = (random.choice(one) if one else None for one in (same, opposite))
    return first, second


def _joined(one: PromptPairs, other: PromptPairs) -> PromptPairs:
    """Return both halves of a task's pairs, which were divided before."""
    return PromptPairs(
        one.task,
        one.corruption,
        torch.cat(_padded(one.clean, other.clean)),
        torch.cat(_padded(one.corrupted, other.corrupted)),
        (*one.questions, *other.questions),
        torch.cat([one.lengths, other.lengths]),
        one.metric,
        (*one.roles, *other.roles),
    )


def _padded(*tensors: Tensor) -> list[Tensor]:
    width = max(tensor.shape[1] for tensor in tensors)
    return [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
