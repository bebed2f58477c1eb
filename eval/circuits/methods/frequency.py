"""Difference in frequency: how much more often a unit is active on clean than on corrupted prompts.

Meant for experts, which a router chooses or not; latents and neurons are active or silent too. Two forward passes per batch, no
gradients, and no metric: prompts that elicit a behavior are the clean ones, prompts that do not are the corrupted ones.

Source: the resonance (fTRI) of experts in MoTE, there at the first tokens of answers, which are predicted where ``at="asked"``.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from ..units.space import Space
from .method import Method, UnitScores, score_batches

PLACES = ("all", "asked")


class ActivationFrequency(Method):
    """Share of positions with an active unit on the clean prompt, minus that on the corrupted one.

    Args:
        at: Positions that count: ``all`` but padding, or those that are ``asked``, where the answer is predicted.
    """

    def __init__(self, at: str = "all", batch: int = BATCH):
        require_choice("at", at, PLACES)
        self.at, self.batch = at, batch

    @torch.no_grad()
    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        return score_batches(space, pairs, self.batch, lambda some: self._differences(space, some))

    def _differences(self, space: Space, pairs: PromptPairs) -> Float[Tensor, "pairs units"]:
        counted = pairs.valid if self.at == "all" else _asked(pairs)
        counted = counted.to(space.model.device)
        return space.frequency(pairs.clean, counted) - space.frequency(pairs.corrupted, counted)


def _asked(pairs: PromptPairs) -> Bool[Tensor, "pairs positions"]:
    found = torch.zeros_like(pairs.valid)
    for row, questions in enumerate(pairs.questions):
        found[row, [question.position for question in questions]] = True
    return found
