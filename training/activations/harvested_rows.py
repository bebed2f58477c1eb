"""Rows of a harvest: the model's activations at the tokens that are kept, without those that cannot be stored."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...sae.ranks import Ranks
from ..bad_rows import BadTokens
from ..recipe import HarvestSection
from ..text import are_heldout
from .buffer_pool import Memory
from .contexts import ContextBatch
from .model import LanguageModel

SPLITS = ("train", "heldout")
# Largest value that each format holds; int8 has 127 steps of a float16 scale.
LARGEST = {"float16": 65504.0, "int8": 127 * 65000.0}
# Rows, bad ones, what is wrong with the first of these, and a remedy.
BadCount = tuple[int, int, str, str]


@dataclass
class HarvestedRows:
    """Tokens that are not excluded: labels ``(n,)`` and tensors ``(n, width)``."""

    labels: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def select(self, keep: Tensor) -> "HarvestedRows":
        return HarvestedRows({k: v[keep] for k, v in self.labels.items()}, {k: v[keep] for k, v in self.tensors.items()})

    def at(self, hooks: tuple[str, ...]) -> "HarvestedRows":
        """Return the same rows with the tensors of these hooks only."""
        return HarvestedRows(self.labels, {k: v for k, v in self.tensors.items() if k.partition(":")[2] in hooks})

    @staticmethod
    def join(pieces: list["HarvestedRows"]) -> "HarvestedRows":
        first = pieces[0]
        return HarvestedRows(
            {k: torch.cat([piece.labels[k] for piece in pieces]) for k in first.labels},
            {k: torch.cat([piece.tensors[k] for piece in pieces]) for k in first.tensors},
        )

    def __len__(self) -> int:
        return self.labels["token"].shape[0]


def rows_of(
    model: LanguageModel,
    batch: ContextBatch,
    section: HarvestSection,
    hooks: tuple[str, ...],
    memory: dict[str, Memory] | None = None,
) -> dict[str, HarvestedRows]:
    """Run the model on a batch of contexts and return the kept tokens of each split, as float32 on the CPU.

    Args:
        memory: Array pools by tensor name, in which training rows are stored.
    """
    shape = batch.token_ids.shape
    places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    labels = {"token": batch.token_ids, "document": batch.document_ids, "position": places, "offset": batch.positions}
    heldout = are_heldout(batch.document_ids, section.heldout)
    ids = batch.on(model.device).token_ids
    if section.gradients:
        documents = torch.from_numpy(batch.document_ids).to(model.device)
        values, gradients = model.activations_and_gradients(ids, hooks, documents)
    else:
        values, gradients = model.activations(ids, hooks), {}
    tensors = {f"x:{hook}": x for hook, x in values.items()} | {f"grad:{hook}": g for hook, g in gradients.items()}
    splits = {}
    for split, here in zip(SPLITS, (batch.kept & ~heldout, batch.kept & heldout), strict=True):
        index = np.flatnonzero(here)
        chosen = torch.from_numpy(index).to(model.device)
        splits[split] = HarvestedRows(
            {key: torch.from_numpy(label.reshape(-1)[index]) for key, label in labels.items()},
            {
                name: _pick(tensor, chosen, memory[name].take() if memory and split == "train" else None)
                for name, tensor in tensors.items()
            },
        )
    return splits


def usable_rows(rows: HarvestedRows, bad: BadTokens, where: str) -> HarvestedRows:
    """Drop and count rows that are not finite, or too large to be stored, at any hook.

    Raises:
        ValueError: If there are more of them than the recipe allows.
    """
    usable, found = without_bad(rows, bad, where)
    bad.count(*found)
    return usable


def without_bad(rows: HarvestedRows, bad: BadTokens, where: str) -> tuple[HarvestedRows, BadCount]:
    """Return the rows that are usable, and what ``bad.count`` takes."""
    good = bad.usable(rows.tensors.values())
    if good is None:
        return rows, (len(rows), 0, "", "")
    row = int((~good).nonzero()[0])
    name = next(name for name, x in rows.tensors.items() if not bool((x[row].abs() <= bad.largest).all()))
    place = {key: int(values[row]) for key, values in rows.labels.items()}
    if bool(torch.isfinite(rows.tensors[name][row]).all()):
        problem, remedy = "an activation larger than harvest.dtype holds", "Set harvest.dtype: bfloat16 or float32"
    else:
        problem, remedy = "not finite", "The model overflows there: set model.dtype: float32"
    remedy += ", or leave such tokens out with harvest.exclude_leading."
    return rows.select(good), (len(rows), int((~good).sum()), f"{where}: {name}: {problem} ({place})", remedy)


def counts_of_all(ranks: Ranks, found: BadCount) -> tuple[list[int], BadCount]:
    """Return the numbers of usable rows of all ranks, and what ``BadTokens.count`` takes of all their rows together."""
    everywhere = ranks.gather_objects(found)
    _, _, where, remedy = next((each for each in everywhere if each[1]), found)
    rows, bad = sum(each[0] for each in everywhere), sum(each[1] for each in everywhere)
    return [each[0] - each[1] for each in everywhere], (rows, bad, where, remedy)


def _pick(tensor: Tensor, rows: Tensor, memory: np.ndarray | None) -> Tensor:
    """Return rows of ``(contexts, positions, width)`` as ``(n, width)`` float32 on the CPU."""
    flat = tensor.flatten(0, 1)
    if memory is None:
        return flat.index_select(0, rows).float().cpu()
    out = torch.from_numpy(memory)[: len(rows)]
    if flat.dtype == out.dtype and flat.device == out.device:
        return torch.index_select(flat, 0, rows, out=out)
    return out.copy_(flat.index_select(0, rows))
