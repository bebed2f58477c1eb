"""The optimizer and the learning rate of every step."""

import torch

from sae import SparseDictionary

from .recipe import Recipe

# Gao et al. 2024: gradients of rarely active latents are small, and Adam's usual 1e-8 would drown them.
ADAM_EPS = 6.25e-10


def build_optimizer(dictionary: SparseDictionary, recipe: Recipe) -> torch.optim.Adam:
    """Adam over all weights, its step fused into one pass per tensor."""
    return torch.optim.Adam(dictionary.parameters(), lr=recipe.lr, betas=recipe.betas, eps=ADAM_EPS, fused=True)


class Schedule:
    """Linear warm-up, a plateau, and over the last share of the run a linear fall to 0: a function of the step alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe):
        self.optimizer = optimizer
        self.peak = recipe.lr
        self.steps = total_steps(recipe)
        self.warmup = recipe.lr_warmup_steps
        self.decay = round(self.steps * recipe.lr_decay)

    def lr(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (self.steps - step) / self.decay) if self.decay else 1.0
        return self.peak * min(rise, fall)

    def apply(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)


def total_steps(recipe: Recipe) -> int:
    """Steps of the whole run; the last batch is a full one."""
    return -(-recipe.tokens // recipe.batch_tokens)
