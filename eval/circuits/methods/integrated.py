"""Integrated gradients: gradients averaged along the path between the prompts, because the metric is not linear.

``IntegratedInputs`` interpolates the embeddings, and all later activations follow. ``IntegratedActivations`` interpolates the
units of one group at a time while everything upstream stays clean, so the scores of a group add up to the effect of patching
the group (up to the discretization error, which falls with more steps); it repeats all passes for every group.

Sources: Hanna, Pezzelle and Belinkov 2024, arXiv:2403.17806 (inputs); Marks et al. 2024, arXiv:2403.19647 (activations).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from ..units.space import Space, State
from .method import Method, UnitScores, score_batches

# Point of each step at which the gradient is taken: its clean end, its corrupted end, or the middle.
POINTS = {"clean": 0.0, "middle": 0.5, "corrupted": 1.0}


class IntegratedInputs(Method):
    """Gradients averaged over runs with interpolated embeddings. Published with 5 steps, at their corrupted ends."""

    def __init__(self, steps: int = 5, point: str = "corrupted", batch: int = BATCH):
        self.shares, self.batch = _shares(steps, point), batch

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        return score_batches(space, pairs, self.batch, lambda some: self._contributions(space, some))

    def _contributions(self, space: Space, pairs: PromptPairs) -> Float[Tensor, "pairs units"]:
        embedding = space.model.module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        hook = next(f"{name}:out" for name, module in space.model.module.named_modules() if module is embedding)
        hooks = tuple(dict.fromkeys((*space.hooks, hook)))
        (_, clean), (_, corrupted) = (space.passes.see(token_ids, hooks) for token_ids in (pairs.clean, pairs.corrupted))
        slopes: State = []
        for share in self.shares:
            held = {hook: torch.lerp(clean[hook], corrupted[hook], share)}
            seen, grads = space.passes.gradients(pairs.clean, space.hooks, pairs.measure, held)
            with torch.no_grad():
                step = space.slopes(seen, grads)
            slopes = [a + b for a, b in zip(slopes, step, strict=True)] if slopes else step
        with torch.no_grad():
            average = [total / len(self.shares) for total in slopes]
            return space.contrast(space.state(clean), space.state(corrupted), average)


class IntegratedActivations(Method):
    """Gradients averaged over circuits that lack a share of one group. Published with 10 steps, at their clean ends.

    One step is attribution patching.
    """

    def __init__(self, steps: int = 10, point: str = "clean", batch: int = BATCH):
        self.shares, self.batch = _shares(steps, point), batch

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        return score_batches(space, pairs, self.batch, lambda some: self._every_group(space, some))

    def _every_group(self, space: Space, pairs: PromptPairs) -> Float[Tensor, "pairs units"]:
        _, filler = space.see(pairs.corrupted)
        return torch.cat([self._contributions(space, pairs, filler, group) for group in space.groups.values()], dim=1)

    def _contributions(self, space: Space, pairs: PromptPairs, filler: State, group: slice) -> Float[Tensor, "pairs group"]:
        """Return scores: the gradient with respect to a unit's mask is activation difference times gradient, for any units."""
        # At least the model's precision, and at least float32 for the shares.
        dtype = torch.promote_types(filler[0].dtype, torch.float32)
        total = torch.zeros(len(pairs), group.stop - group.start, dtype=dtype)
        for share in self.shares:
            kept = torch.ones(len(pairs), space.size, dtype=dtype)
            kept[:, group] = 1.0 - share
            kept.requires_grad_(True)
            with torch.enable_grad():
                metric = pairs.measure(space.run(pairs.clean, kept, filler)).sum()
            space.passes.backwards += 1
            # Gradients of the mask only; backward() would also write to dictionary weights that require them.
            (slope,) = torch.autograd.grad(metric, kept)
            total += slope[:, group]
        return total / len(self.shares)


def _shares(steps: int, point: str) -> list[float]:
    """Return the share of corruption at each step, from 0 to 1."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    require_choice("point", point, POINTS)
    return [(step + POINTS[point]) / steps for step in range(steps)]
