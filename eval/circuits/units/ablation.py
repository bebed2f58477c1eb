"""Ablations: replacement values for units outside a circuit.

- ``resample``: the unit's activation on the pair's own corrupted prompt;
- ``mean``: its mean over the corrupted prompts of a reference set, per position if all prompts have equal length;
- ``zero``: zero; experts of a mixture are off;
- ``optimal``: the constant at which the model does best when random units are ablated. Source: Li and Janson 2024,
  arXiv:2409.09951, whose constants are learned in the same way.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ....sae.suggestions import require_choice
from ..tasks.pairs import BATCH, PromptPairs
from .space import Space, State

ABLATIONS = ("resample", "mean", "zero", "optimal")
Filler = Callable[[PromptPairs], State]
OPTIMAL_STEPS = 100
# Relative to each tensor's standard deviation, so that constants of every scale learn at the same pace.
OPTIMAL_RATE = 0.05


def ablation_values(space: Space, kind: str, reference: PromptPairs, seed: int = 0) -> Filler:
    """Return a function from a batch of pairs to replacement values; all but ``resample`` compute them on ``reference``.

    Raises:
        ValueError: If the ablation is unknown.
    """
    require_choice("ablation", kind, ABLATIONS)
    if kind == "resample":
        return lambda batch: space.see(batch.corrupted)[1]
    state = mean_state(space, reference)
    if kind == "zero":
        state = space.zeros(state)
    if kind == "optimal":
        state = optimal_state(space, reference, state, seed)
    return lambda _: state


@torch.no_grad()
def mean_state(space: Space, pairs: PromptPairs) -> State:
    """Return mean unit activations on the corrupted prompts, also over positions if prompts differ in length."""
    sums: State = []
    for some in pairs.batches(BATCH):
        _, state = space.see(some.corrupted)
        weights = [_valid(some, tensor) for tensor in state]
        parts = [(tensor * weight).sum(0, keepdim=True) for tensor, weight in zip(state, weights, strict=True)]
        sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
    if pairs.equal:
        return [total / len(pairs) for total in sums]
    return [total.sum(1, keepdim=True) / pairs.lengths.sum() for total in sums]


def optimal_state(space: Space, pairs: PromptPairs, start: State, seed: int = 0, steps: int = OPTIMAL_STEPS) -> State:
    """Learn constants from ``start`` that keep the model's output close, in KL, when random units are set to them.

    Each step redraws the ablation probability, so the constants suit circuits of every size.
    """
    spreads = [tensor.std().clamp_min(1e-6) for tensor in start]
    shifts = [torch.zeros_like(tensor, requires_grad=True) for tensor in start]
    optimizer = torch.optim.Adam(shifts, lr=OPTIMAL_RATE)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = pairs.take(torch.randint(len(pairs), (min(BATCH, len(pairs)),), generator=draw))
        with torch.no_grad():
            clean = space.passes.run(some.clean)
        share = torch.rand(1, generator=draw)
        kept = torch.rand(space.size, generator=draw) >= share
        with torch.enable_grad():
            state = [tensor + shift * spread for tensor, shift, spread in zip(start, shifts, spreads, strict=True)]
            loss = divergence(some, clean, space.run(some.clean, kept, state)).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return [(tensor + shift * spread).detach() for tensor, shift, spread in zip(start, shifts, spreads, strict=True)]


def divergence(
    pairs: PromptPairs,
    clean: Float[Tensor, "pairs positions vocabulary"],
    changed: Float[Tensor, "pairs positions vocabulary"],
) -> Float[Tensor, " pairs"]:
    """Return the KL divergence in nats of changed from clean predictions, averaged over a pair's questions."""
    reference, others = pairs.asked_rows(clean).log_softmax(-1), pairs.asked_rows(changed).log_softmax(-1)
    return pairs.per_pair((reference.exp() * (reference - others)).sum(-1))


def _valid(pairs: PromptPairs, tensor: Tensor) -> Tensor:
    return pairs.valid.to(tensor).view(*pairs.valid.shape, *(1,) * (tensor.ndim - 2))
