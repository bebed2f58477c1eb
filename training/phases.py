"""Changes during a run: the active encoder and its scheduled arguments.

Everything here is a function of the step, so a resumed run does the same as an uninterrupted one.
"""

import itertools
import random
from typing import Any, cast

from torch import nn

from ..sae import Encoder, SparseDictionary
from ..sae.batch_encoder import BatchWide
from ..sae.encoders import build_encoder
from .objective import LossWeights
from .recipe import Recipe, total_steps

# When a latent counts as dead, its density has fallen to 1/16: below a tenth of what is expected, a usual ``aux_zipf_tau``.
HALF_LIVES_TO_DEATH = 4


def density_half_life(dead_after_tokens: int) -> float:
    """Return the half-life of the running densities, in tokens."""
    return dead_after_tokens / HALF_LIVES_TO_DEATH


class Phases(nn.Module):
    """Encoders of a run, in order. ``enter`` puts the right one into the dictionary and sets its scheduled arguments.

    All encoders exist from the start, so that one optimizer and one saved state hold them.
    """

    def __init__(self, dictionary: SparseDictionary, recipe: Recipe):
        super().__init__()
        self.recipe, self.steps = recipe, total_steps(recipe)
        self.starts = [0, *phase_starts(recipe)]
        encoders = [dictionary.encoder]
        for phase in recipe.phases:
            # A phase without an encoder keeps the one before it.
            encoders.append(encoders[-1] if phase.encoder is None else build_encoder(phase.encoder))
            if phase.encoder is not None:
                encoders[-1].prepare(dictionary.n_latents)
        self.encoders = nn.ModuleList(encoders)
        for encoder in self.encoders:
            cast(Encoder, encoder).n_shards = dictionary.shards.size
            if isinstance(encoder, BatchWide):
                encoder.density_half_life = density_half_life(recipe.dead_after_tokens)
        # Integer arguments, to which scheduled values are rounded.
        self.whole = {
            name for encoder in encoders for name, parameter in encoder.parameters_of().items() if parameter.annotation is int
        }

    def enter(self, dictionary: SparseDictionary, step: int) -> None:
        """Prepare the dictionary for step ``step``, counted from 0."""
        number = self.number(step)
        if number and step == self.starts[number]:
            old, new = cast(Encoder, self.encoders[number - 1]), cast(Encoder, self.encoders[number])
            if new is not old:
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
        """Return the index of a step's phase; 0 is the recipe's own encoder."""
        return max(i for i, start in enumerate(self.starts) if start <= step)

    def progress(self, step: int) -> float:
        """Return the fraction of the steps of its encoder that are done before a step: 0 at the first and 1 at the last."""
        encoder, bounds = self.encoders[self.number(step)], [*self.starts, self.steps]
        # Phases that keep the encoder belong together.
        own = [number for number, each in enumerate(self.encoders) if each is encoder]
        first, end = bounds[own[0]], bounds[own[-1] + 1]
        return (step - first) / max(end - first - 1, 1)

    def weights(self, step: int) -> LossWeights:
        """Return the weights of the main terms at a step."""
        recipe, number = self.recipe, self.number(step)
        objective, weight = recipe.objective, recipe.reconstruction_weight
        for phase in recipe.phases[:number]:
            if phase.objective not in (None, objective):
                objective, weight = phase.objective, None
            weight = weight if phase.reconstruction_weight is None else phase.reconstruction_weight
        kl = objective == "kl"
        return LossWeights(float(not kl) if weight is None else weight, float(kl))

    def lr_factor(self, step: int) -> float:
        """Return the learning-rate multiplier of a step's phase."""
        number = self.number(step)
        return self.recipe.phases[number - 1].lr_factor if number else 1.0

    def values(self, step: int) -> dict[str, Any]:
        """Return the value of every scheduled argument at a step; integer arguments are rounded."""
        share = step / max(self.steps - 1, 1)
        return {
            name: round(value) if name in self.whole else value
            for name, knots in self.recipe.schedules.items()
            for value in (interpolate(knots, share),)
        }

    def _keeps_the_old(self, number: int, step: int) -> bool:
        """Return True if a blending phase leaves this batch to the previous encoder, with probability falling from 1 to 0."""
        length = self.recipe.phases[number - 1].blend * self.steps
        since = step - self.starts[number]
        return since < length and random.Random(f"{self.recipe.seed} {step}").random() >= (since + 1) / (length + 1)


def phase_starts(recipe: Recipe) -> list[int]:
    """Return the step at which each phase of a recipe begins."""
    return [round(phase.start * total_steps(recipe)) for phase in recipe.phases]


def interpolate(knots: tuple[tuple[float, int | float], ...], share: float) -> float:
    """Return the piecewise linear interpolation of knots ``(share of the run, value)``, constant outside them."""
    value: int | float = knots[-1][1]
    if share <= knots[0][0]:
        value = knots[0][1]
    for (left, low), (right, high) in itertools.pairwise(knots):
        if left <= share < right:
            value = low + (high - low) * (share - left) / (right - left)
            break
    return float(value)
