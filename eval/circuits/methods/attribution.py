"""Attribution patching: activation difference times gradient of the metric; on edges, edge attribution patching (EAP).

Two forward passes and one backward pass per batch, for any number of units. Source: Nanda 2023, "Attribution patching"; for
edges Syed, Rager and Conmy 2023, arXiv:2310.10348.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from ..units.space import Space
from .method import Method, UnitScores, score_batches

ENDS = ("clean", "corrupted")


class AttributionPatching(Method):
    """Linear estimate of patching effects, with gradients at the clean prompt, or ``at`` the corrupted one."""

    def __init__(self, at: str = "clean", batch: int = BATCH):
        self.at, self.batch = require_end("at", at), batch

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        return linear_scores(space, pairs, self.at, self.batch)


def require_end(option: str, value: str) -> str:
    """Return ``value`` if it names a prompt of the pair.

    Raises:
        ValueError: If it names neither.
    """
    require_choice(option, value, ENDS)
    return value


def linear_scores(
    space: Space, pairs: PromptPairs, at: str, batch: int, rules: Callable[[], AbstractContextManager] | None = None
) -> UnitScores:
    """Score units by activation difference times gradient at one prompt; ``rules`` opens a context around those passes."""
    other = ENDS[1 - ENDS.index(at)]

    def contributions(some: PromptPairs) -> Tensor:
        ends = {"clean": some.clean, "corrupted": some.corrupted}
        seen, grads = space.passes.gradients(ends[at], space.hooks, some.measure, rules=rules and rules())
        with torch.no_grad():
            states = {at: space.state(seen), other: space.see(ends[other])[1]}
            return space.contrast(states["clean"], states["corrupted"], space.slopes(seen, grads))

    return score_batches(space, pairs, batch, contributions)
