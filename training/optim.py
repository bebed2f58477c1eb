"""The optimizer and the learning rate of every step."""

import torch

from ..sae import SparseDictionary
from ..sae.sparse_grad import drop_ledger
from .phases import Phases
from .recipe import Recipe, peak_lr, total_steps

# Gao et al. 2024: gradients of rarely active latents are small, and Adam's usual 1e-8 would drown them.
ADAM_EPS = 6.25e-10


class DictionaryAdam(torch.optim.Adam):
    """Adam that keeps atoms on the unit sphere; its step is all that lies between the gradient and the next forward pass."""

    def __init__(self, dictionary: SparseDictionary, phases: Phases, recipe: Recipe):
        parameters = list(dict.fromkeys([*dictionary.parameters(), *phases.parameters()]))
        # An optimizer before this one may have kept some, which would swallow the gradients.
        for parameter in parameters:
            drop_ledger(parameter)
        betas = dictionary.encoder.betas if recipe.betas == "auto" else recipe.betas
        super().__init__(parameters, lr=peak_lr(recipe), betas=betas, eps=ADAM_EPS, fused=True)
        self.dictionary, self.grad_clip = dictionary, recipe.grad_clip

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Project, clip, update, renormalise."""
        # Before clipping: the radial part of an atom's gradient is no step and must not use up the norm.
        self.dictionary.project_grad()
        if self.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.dictionary.parameters(), self.grad_clip)
        super().step()
        # After the step: the next forward must see unit atoms.
        self.dictionary.renormalize()


def lr_share(recipe: Recipe, step: int) -> float:
    """The part of ``lr`` that step ``step``, counted from 0, has by warm-up and decay: between 0 and 1."""
    steps, warmup = total_steps(recipe), recipe.lr_warmup_steps
    decay = round(steps * recipe.lr_decay)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, (steps - step) / decay) if decay else 1.0
    return min(rise, fall)


class Schedule:
    """Sets what depends on the step: the learning rate, the encoder in force and its scheduled arguments.

    The rate warms up linearly, stays, and falls linearly to 0 over the last share of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, dictionary: SparseDictionary, phases: Phases, recipe: Recipe):
        self.optimizer, self.dictionary, self.phases = optimizer, dictionary, phases
        self.recipe, self.peak = recipe, peak_lr(recipe)

    def lr(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        return self.peak * lr_share(self.recipe, step) * self.phases.lr_factor(step)

    def apply(self, step: int) -> None:
        self.phases.enter(self.dictionary, step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
