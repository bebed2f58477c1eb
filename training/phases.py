"""What changes during a run by recipe: which encoder is in force, and numbers among its arguments.

Everything here is a function of the step, so a resumed run does what an uninterrupted one would have done.
"""

import itertools
import random
from typing import Any, cast

from torch import nn

from ..sae import Encoder, SparseDictionary
from ..sae.batch_encoder import BatchWide
from ..sae.encoders import build_encoder
from .recipe import Recipe, total_steps

# A latent that is dead by now shows 1/16 of the density it had: less than a tenth of its due, a usual ``aux_zipf_tau``.
HALF_LIVES_TO_DEATH = 4


def density_half_life(dead_after_tokens: int) -> float:
    """Return the tokens after which running densities have forgotten half of what they knew."""
    return dead_after_tokens / HALF_LIVES_TO_DEATH


class Phases(nn.Module):
    """The encoders of a run in order; ``enter`` puts the right one into the dictionary, its scheduled arguments set.

    All of them exist from the start, so that one optimizer and one saved state hold them.
    """

    def __init__(self, dictionary: SparseDictionary, recipe: Recipe):
        super().__init__()
        self.recipe, self.steps = recipe, total_steps(recipe)
        self.starts = [0, *phase_starts(recipe)]
        later = [build_encoder(phase.encoder) for phase in recipe.phases]
        for encoder in later:
            encoder.prepare(dictionary.n_latents)
        self.encoders = nn.ModuleList([dictionary.encoder, *later])
        for encoder in self.encoders:
            if isinstance(encoder, BatchWide):
                encoder.density_half_life = density_half_life(recipe.dead_after_tokens)
        # Arguments that count something.
        self.whole = {
            name
            for encoder in (dictionary.encoder, *later)
            for name, parameter in encoder.parameters_of().items()
            if parameter.annotation is int
        }

    def enter(self, dictionary: SparseDictionary, step: int) -> None:
        """Make the dictionary ready for step ``step``, counted from 0."""
        number = self.number(step)
        if number and step == self.starts[number]:
            old, new = cast(Encoder, self.encoders[number - 1]), cast(Encoder, self.encoders[number])
            new.inherit(old)
            if new.unit_atoms and not old.unit_atoms:
                dictionary.fold_norms()
        self.select(dictionary, step)

    def select(self, dictionary: SparseDictionary, step: int) -> None:
        """Put the encoder of a step into the dictionary and set its scheduled arguments."""
        number = self.number(step)
        encoder = self.encoders[number - 1 if number and self._keeps_the_old(number, step) else number]
        if dictionary.encoder is not encoder:
            encoder.train(dictionary.training)
            dictionary.encoder = encoder  # pyright: ignore[reportAttributeAccessIssue]
        dictionary.encoder.progress = self.progress(step)
        for name, value in self.values(step).items():
            for each in self.encoders:
                if hasattr(each, name):
                    setattr(each, name, value)

    def number(self, step: int) -> int:
        """Which phase a step belongs to; 0 is the recipe's own encoder."""
        return max(i for i, start in enumerate(self.starts) if start <= step)

    def progress(self, step: int) -> float:
        """Return the share of its phase that is done before a step, 0 at the first and 1 at the last."""
        number = self.number(step)
        first, end = self.starts[number], [*self.starts, self.steps][number + 1]
        return (step - first) / max(end - first - 1, 1)

    def lr_factor(self, step: int) -> float:
        """What the phase multiplies the learning rate by."""
        number = self.number(step)
        return self.recipe.phases[number - 1].lr_factor if number else 1.0

    def values(self, step: int) -> dict[str, Any]:
        """Every scheduled argument's value at a step; whole numbers stay whole."""
        share = step / max(self.steps - 1, 1)
        return {
            name: round(value) if name in self.whole else value
            for name, knots in self.recipe.schedules.items()
            for value in (interpolate(knots, share),)
        }

    def _keeps_the_old(self, number: int, step: int) -> bool:
        """While a phase blends in, each batch is drawn to belong to it with a probability that rises from 0 to 1."""
        length = self.recipe.phases[number - 1].blend * self.steps
        since = step - self.starts[number]
        return since < length and random.Random(f"{self.recipe.seed} {step}").random() >= (since + 1) / (length + 1)


def phase_starts(recipe: Recipe) -> list[int]:
    """The step at which each phase of a recipe begins."""
    return [round(phase.start * total_steps(recipe)) for phase in recipe.phases]


def interpolate(knots: tuple[tuple[float, int | float], ...], share: float) -> float:
    """The piecewise linear curve through ``(share of the run, value)``, constant outside."""
    value: int | float = knots[-1][1]
    if share <= knots[0][0]:
        value = knots[0][1]
    for (left, low), (right, high) in itertools.pairwise(knots):
        if left <= share < right:
            value = low + (high - low) * (share - left) / (right - left)
            break
    return float(value)
