"""Exact activation patching: every unit is patched alone from the other run, and the metric is measured again.

All other methods estimate this. ``noising`` patches corrupted activations into the clean run and finds each input of an AND;
``denoising`` patches clean activations into the corrupted run and finds each input of an OR. ``both`` takes the effect of
larger magnitude for each pair. Many rows, each with another unit patched, share a forward pass.

Source: Heimersheim and Nanda 2024, arXiv:2404.15255.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from ..units.space import Space, State
from .method import Method, UnitScores, score_batches

DIRECTIONS = ("noising", "denoising", "both")
ROWS = 128


class ExactPatching(Method):
    """Exact effect of all units, of ``units`` random ones (drawn with ``seed``), or of a list; other units get NaN.

    ``noising``: m(clean) - m(clean with the unit corrupted); ``denoising``: m(corrupted with the unit clean) - m(corrupted). A
    unit with equal activations on both prompts of a pair has no effect there and costs no pass.
    """

    def __init__(
        self,
        units: int | Sequence[int] | None = None,
        seed: int = 0,
        direction: str = "noising",
        rows: int = ROWS,
        batch: int = BATCH,
    ):
        require_choice("direction", direction, DIRECTIONS)
        self.units, self.seed, self.direction, self.rows, self.batch = units, seed, direction, rows, batch

    @torch.no_grad()
    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        asked = self._asked(space.size)
        return score_batches(space, pairs, self.batch, lambda some: self._effects(space, some, asked))

    def _asked(self, size: int) -> Bool[Tensor, " units"]:
        asked = torch.zeros(size, dtype=torch.bool)
        if self.units is None:
            return ~asked
        if isinstance(self.units, int):
            chosen = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))[: self.units]
        else:
            chosen = torch.as_tensor(self.units, dtype=torch.long)
            if ((chosen < 0) | (chosen >= size)).any():
                raise ValueError(f"units: expected numbers from 0 to {size - 1}, got {list(self.units)}.")
        asked[chosen] = True
        return asked

    def _effects(self, space: Space, pairs: PromptPairs, asked: Bool[Tensor, " units"]) -> Float[Tensor, "pairs units"]:
        logits, clean = space.see(pairs.clean)
        other, corrupted = space.see(pairs.corrupted)
        differs = (space.distance(clean, corrupted) > 0).cpu() & asked
        found = []
        if self.direction != "denoising":
            found.append(patched_drops(space, pairs, pairs.clean, pairs.measure(logits), corrupted, differs, self.rows))
        if self.direction != "noising":
            found.append(-patched_drops(space, pairs, pairs.corrupted, pairs.measure(other), clean, differs, self.rows))
        effects = found[0] if len(found) == 1 else torch.where(found[0].abs() >= found[1].abs(), *found)
        effects[:, ~asked] = torch.nan
        return effects


@torch.no_grad()
def patched_drops(
    space: Space,
    pairs: PromptPairs,
    token_ids: Int[Tensor, "pairs positions"],
    whole: Float[Tensor, " pairs"],
    filler: State,
    differs: Bool[Tensor, "pairs units"],
    rows: int = ROWS,
) -> Float[Tensor, "pairs units"]:
    """Return the drop of the metric below ``whole`` if a unit that differs is taken from ``filler``, alone; 0 for others."""
    effects = torch.zeros(len(pairs), space.size, dtype=whole.dtype)
    # Ordered by unit, so that units of one part, which may be slow to run, share passes.
    runs = differs.T.nonzero()
    for start in range(0, len(runs), rows):
        units, at = runs[start : start + rows].unbind(1)
        kept = torch.ones(len(at), space.size, dtype=torch.bool)
        kept[torch.arange(len(at)), units] = False
        logits = space.run(token_ids[at], kept, _rows(filler, at))
        effects[at, units] = (whole[at.to(whole.device)] - pairs.take(at).measure(logits)).cpu()
    return effects


def _rows(state: State, rows: Tensor) -> State:
    return [tensor[rows.to(tensor.device)] for tensor in state]
