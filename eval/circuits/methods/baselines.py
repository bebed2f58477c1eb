"""Baselines for all methods: random scores, and activation magnitudes; neither uses the metric."""

import torch
from jaxtyping import Float
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from ..units.space import Space, State
from .method import Method, UnitScores, score_batches

MAGNITUDES = ("difference", "clean")


class RandomScores(Method):
    """Uniform random scores between 0 and 1."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        with space.passes.counted() as cost:
            values = torch.rand(space.size, generator=torch.Generator().manual_seed(self.seed))
        return UnitScores(values, cost)


class ActivationMagnitude(Method):
    """Norm of a unit's activations over positions: of the ``difference`` between the prompts, or on the ``clean`` one.

    The difference is attribution with every gradient set to 1; the clean norm is the criterion of pruning by activation.
    Padding is excluded.
    """

    def __init__(self, of: str = "difference", batch: int = BATCH):
        require_choice("of", of, MAGNITUDES)
        self.of, self.batch = of, batch

    @torch.no_grad()
    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        return score_batches(space, pairs, self.batch, lambda some: self._norms(space, some))

    def _norms(self, space: Space, pairs: PromptPairs) -> Float[Tensor, "pairs units"]:
        _, clean = space.see(pairs.clean)
        other = space.see(pairs.corrupted)[1] if self.of == "difference" else [torch.zeros_like(x) for x in clean]
        return space.distance(_without_padding(clean, pairs), _without_padding(other, pairs))


def _without_padding(state: State, pairs: PromptPairs) -> State:
    valid = pairs.valid
    return [x * valid.to(x).view(*valid.shape, *(1,) * (x.ndim - 2)) for x in state]
