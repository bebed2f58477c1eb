"""Edge Pruning: a mask over all units, learned so that the circuit predicts the model's outputs with fewer and fewer units.

The mask is random during training: a hard concrete variable, which is often exactly 0 or exactly 1 and has a gradient. The
target share of removed units rises step by step and is enforced by a Lagrangian whose multipliers grow while too many units are
left. Source: Bhaskar et al. 2024, arXiv:2406.16778, whose units are edges; Louizos et al. 2018, arXiv:1712.01312 (masks).
"""

import itertools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from ..units.ablation import divergence
from ..units.space import Space, State
from .method import Method, UnitScores

LOSSES = ("kl", "metric")
# Published parameters of the hard concrete distribution: temperature, stretch beyond 0 and 1, and distance of the uniform
# samples from 0 and 1.
TEMPERATURE, STRETCH, MARGIN = 2 / 3, 0.1, 1e-6
# Mean and standard deviation of initial mask logits: all units are kept.
START, SPREAD = 10.0, 0.01
# Share of all steps with rising learning rates: 200 of the published 3000.
WARMUP = 1 / 15


class EdgePruning(Method):
    """Discovery by Edge Pruning: scores are mask logits, above 0 if a unit is more likely kept than not.

    ``kept_units`` turns scores into a circuit. ``target`` is the share of units to remove by the end of a share ``ramp`` of the
    steps. Circuits differ in size; an unreachable target (1 or above) removes all units that the model can do without. ``loss``
    is the distance of the circuit from the model: ``kl`` in nats at the questions, or ``metric``, the squared difference of the
    metric, for models with one output. A larger ``multiplier_lr`` accepts more loss for the target.

    Learning rates, their schedule and initial logits are those published for GPT-2. There, 3000 steps share one mask among all
    prompts of a batch, the target rises in 2500 of them, and multipliers learn at 0.8 (for compiled transformers, 0.001 or
    less). Here every pair of a batch has its own mask, so far fewer steps sample as many masks. A target below 1 is overshot if
    it rises fast; the published ``ramp`` (5 / 6) holds it.
    """

    def __init__(
        self,
        target: float = 1.0,
        steps: int = 200,
        lr: float = 0.8,
        multiplier_lr: float = 0.001,
        ramp: float = 0.3,
        loss: str = "kl",
        seed: int = 0,
        batch: int = BATCH,
    ):
        require_choice("loss", loss, LOSSES)
        if steps < 1 or not 0 < ramp <= 1:
            raise ValueError(f"steps, ramp: expected at least 1 step and a share above 0 up to 1, got {steps} and {ramp}.")
        self.target, self.steps, self.lr, self.multiplier_lr = target, steps, lr, multiplier_lr
        self.ramp, self.loss, self.seed, self.batch = ramp, loss, seed, batch

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        with space.passes.counted() as cost:
            logits = self._learn(space, pairs, torch.Generator().manual_seed(self.seed))
        return UnitScores(logits, cost)

    def _learn(self, space: Space, pairs: PromptPairs, draw: torch.Generator) -> Float[Tensor, " units"]:
        logits = (START + SPREAD * torch.randn(space.size, generator=draw)).requires_grad_()
        multipliers = torch.zeros(2, requires_grad=True)
        groups = [
            {"params": [logits], "lr": self.lr},
            {"params": [multipliers], "lr": self.multiplier_lr, "maximize": True},
        ]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._pace)
        for step, (some, clean, corrupted) in zip(range(self.steps), self._batches(space, pairs, draw), strict=False):
            target = self.target * min(1.0, step / (self.ramp * self.steps))
            with torch.enable_grad():
                mask = sample_mask(logits.expand(len(some), -1), draw)
                missing = 1.0 - mask.mean() - target
                constraint = multipliers[0] * missing + multipliers[1] * missing**2
                loss = self._distance(some, clean, space.run(some.clean, mask, corrupted)) + constraint
                optimizer.zero_grad()
                loss.backward()
            space.passes.backwards += 1
            optimizer.step()
            schedule.step()
        return logits.detach()

    def _batches(self, space: Space, pairs: PromptPairs, draw: torch.Generator) -> Iterator[tuple[PromptPairs, Tensor, State]]:
        """Yield pairs, the model's logits on them and replacement values, endlessly; run once if all pairs are one batch."""
        if len(pairs) <= self.batch:
            yield from itertools.repeat(_references(space, pairs))
        while True:
            yield _references(space, pairs.take(torch.randperm(len(pairs), generator=draw)[: self.batch]))

    def _pace(self, step: int) -> float:
        """Return the factor of the learning rates: linear up to 1, then down to 0."""
        warmup = WARMUP * self.steps
        return step / warmup if step < warmup else (self.steps - step) / (self.steps - warmup)

    def _distance(self, pairs: PromptPairs, clean: Tensor, changed: Tensor) -> Float[Tensor, ""]:
        if self.loss == "metric":
            return (pairs.measure(changed) - pairs.measure(clean)).pow(2).mean().to(torch.float32)
        if clean.shape[-1] == 1:
            raise ValueError("loss: expected a model with several outputs for kl, got one with 1. Use loss: metric.")
        return divergence(pairs, clean, changed).mean().to(torch.float32)


@torch.no_grad()
def _references(space: Space, pairs: PromptPairs) -> tuple[PromptPairs, Tensor, State]:
    return pairs, space.passes.run(pairs.clean), space.see(pairs.corrupted)[1]


def sample_mask(logits: Float[Tensor, "*rows units"], draw: torch.Generator) -> Float[Tensor, "*rows units"]:
    """Draw a hard concrete mask: values from 0 to 1, many of them exactly 0 or 1."""
    uniform = MARGIN + (1 - 2 * MARGIN) * torch.rand(logits.shape, generator=draw)
    soft = torch.sigmoid((uniform.logit() + logits) / TEMPERATURE)
    return (soft * (1 + 2 * STRETCH) - STRETCH).clamp(0.0, 1.0)


def chance_kept(logits: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Return the probability that each unit's mask is not 0."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(STRETCH / (1 + STRETCH)))


def kept_units(logits: Float[Tensor, " units"]) -> Bool[Tensor, " units"]:
    """Return the circuit of a mask: the most likely units, as many as are nonzero on average."""
    kept = torch.zeros(len(logits), dtype=torch.bool)
    kept[logits.argsort(descending=True, stable=True)[: round(float(chance_kept(logits).sum()))]] = True
    return kept
