"""Prompt positions that dictionary training excluded, and the reconstruction error on prompts."""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ...sae.metrics import RunningFvu
from ...training.activations.exclusions import Exclusions
from ...training.activations.model import LanguageModel
from ...training.recipe import HarvestSection, TextSection
from ...training.shortfalls import Shortfall
from ..result import Report
from .compared_units import ComparedCheckpoint
from .tasks.pairs import BATCH, PromptPairs


def prompt_fit(
    model: LanguageModel, dictionaries: ComparedCheckpoint, pairs: PromptPairs
) -> tuple[list[Report], list[Shortfall]]:
    """Return each hook's FVU on clean prompts, and shortfalls that count positions excluded from training.

    Circuits replace activations at every position of a prompt, but a dictionary never saw the positions that
    ``harvest.exclude_leading`` or ``harvest.exclude_special`` excluded.
    """
    left_out, rows = _left_out(model, dictionaries, pairs), []
    valid = pairs.valid
    hooks = (*dictionaries.hooks_in.values(), *dictionaries.by_hook)
    parts = {hook: (_Fvu(d.d_out), _Fvu(d.d_out)) for hook, d in dictionaries.by_hook.items()}
    for start in range(0, len(pairs), BATCH):
        some = slice(start, start + BATCH)
        seen = model.activations(pairs.clean[some].to(model.device), tuple(dict.fromkeys(hooks)))
        for hook, dictionary in dictionaries.by_hook.items():
            x, y = seen[dictionaries.hooks_in[hook]].float(), seen[hook].float()
            for fvu, mask in zip(parts[hook], (valid[some], valid[some] & left_out[some]), strict=True):
                here = mask.to(model.device)
                fvu.update(y[here], dictionary(x[here]))
    positions, missing = int(valid.sum()), int((valid & left_out).sum())
    for hook, (whole, outside) in parts.items():
        about = {"task": pairs.task, "checkpoint": dictionaries.name, "hook": hook}
        counts = {"positions": positions, "positions_left_out": missing}
        rows.append(about | counts | {"fvu": whole.known(), "fvu_left_out": outside.known()})
    doubts = []
    if missing:
        words = ", ".join(f"fvu {row['fvu']:.4f} at {row['hook']}" for row in rows if row["fvu"] is not None)
        doubts.append(
            Shortfall(
                f"{dictionaries.name}: harvest.exclude_leading",
                positions,
                positions - missing,
                f"positions of the {pairs.task} prompts",
                f"training left the other {missing:,} out, and circuits replace them all ({words}). Train with "
                "harvest.exclude_leading: 0, or give longer prompts",
                serious=True,
            )
        )
    return rows, doubts


class _Fvu(RunningFvu):
    """Running FVU that is None if the targets have no variance."""

    def known(self) -> float | None:
        return float(self.value()) if self.moments.squared_deviation() > 0 else None


def _left_out(model: LanguageModel, dictionaries: ComparedCheckpoint, pairs: PromptPairs) -> Bool[Tensor, "pairs positions"]:
    """Return a mask of positions excluded from the training of any dictionary in the checkpoint, if its files say so."""
    found = torch.zeros_like(pairs.clean, dtype=torch.bool)
    for member in dictionaries.opened.members:
        # Keys that the files do not have left nothing out.
        nothing = {"exclude_leading": 0, "exclude_special": False}
        harvest = HarvestSection.model_validate(nothing | dict(member.provenance.get("harvest") or {}))
        ids, documents = pairs.clean.numpy().copy(), np.zeros(pairs.clean.shape, np.int64)
        found |= torch.from_numpy(Exclusions(model.tokenizer, TextSection(), harvest).dropped(ids, documents, None))
    return found
