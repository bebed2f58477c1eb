"""What takes the place of units that a circuit leaves out.

- ``resample``: what the unit carries on the pair's own corrupted prompt;
- ``mean``: its mean over the corrupted prompts of a reference set, position by position where they are of one length;
- ``zero``: nothing;
- ``optimal``: the constant with which the model does best when units at random are left out. Source: Li and Janson 2024,
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
# Of a state's own spread: constants of every size move at the same pace.
OPTIMAL_RATE = 0.05


def ablation_values(space: Space, kind: str, reference: PromptPairs, seed: int = 0) -> Filler:
    """What fills in for absent units of a batch of pairs; all but ``resample`` take it from ``reference``.

    Raises:
        ValueError: If there is no such ablation.
    """
    require_choice("ablation", kind, ABLATIONS)
    if kind == "resample":
        return lambda batch: space.see(batch.corrupted)[1]
    state = mean_state(space, reference)
    if kind == "zero":
        state = [torch.zeros_like(tensor) for tensor in state]
    if kind == "optimal":
        state = optimal_state(space, reference, state, seed)
    return lambda _: state


@torch.no_grad()
def mean_state(space: Space, pairs: PromptPairs) -> State:
    """The mean of what units carry on the corrupted prompts; over positions too where prompts differ in length."""
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
    """Constants learned from ``start``: the model's output is to stay close, in KL, when a random share of units has them.

    Every step leaves out each unit with a probability that is itself drawn anew, so constants serve circuits of every size.
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
    """KL in nats of the changed predictions from the clean ones, mean over a pair's questions."""
    reference, others = pairs.asked_rows(clean).log_softmax(-1), pairs.asked_rows(changed).log_softmax(-1)
    return pairs.per_pair((reference.exp() * (reference - others)).sum(-1))


def _valid(pairs: PromptPairs, tensor: Tensor) -> Tensor:
    return pairs.valid.to(tensor).view(*pairs.valid.shape, *(1,) * (tensor.ndim - 2))
