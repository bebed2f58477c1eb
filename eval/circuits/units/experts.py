"""Experts as units: the logits of a mixture's router, by which it chooses the experts of every token.

An ablated expert takes its logit from elsewhere: another prompt, the mean, or minus infinity, which is off (``zero``). The
router then chooses again by its own rules: experts that are off get no token, and the scores of others follow.

Source: MoTE, which suppresses experts that are more frequent where a behavior is elicited (the method ``frequency``).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .nodes import Coordinates
from .space import State


class Experts(Coordinates):
    """Experts of one block, by the logits at the output of its router."""

    routes = True

    def __init__(self, name: str, hook: str, n_experts: int):
        super().__init__(name, hook, n_experts, 1)

    def zeros(self, state: State) -> State:
        return [torch.full_like(tensor, -torch.inf) for tensor in state]

    def change(self, x: Tensor, y: Tensor, absent: Tensor, filler: State) -> Tensor:
        off = filler[0] == -torch.inf
        moved = (torch.where(off, y, filler[0]) - y) * absent
        # A share of an expert: so much of its odds.
        return moved + torch.log1p(-torch.where(off, absent, 0.0))

    def active(
        self, state: State, chosen: Bool[Tensor, "pairs positions n_units"] | None
    ) -> Float[Tensor, "pairs positions n_units"]:
        assert chosen is not None, "NodeSpace records what its routers choose"
        return chosen.to(state[0])
