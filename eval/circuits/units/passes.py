"""Counted model passes for circuit analysis: activations at hooks, and gradients of a metric there."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ....training.activations.model import LanguageModel

Seen = dict[str, Tensor]
Measure = Callable[[Float[Tensor, "pairs positions vocabulary"]], Float[Tensor, " pairs"]]


@dataclass
class Cost:
    """Number of passes of whole batches, and the elapsed time."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


class Passes:
    """Forward and backward passes of a model, counted. Every pass goes through here, so reported costs are measured."""

    def __init__(self, model: LanguageModel):
        self.model, self.forwards, self.backwards = model, 0, 0

    @contextmanager
    def counted(self) -> Iterator[Cost]:
        """Yield a ``Cost`` that is filled in on exit."""
        cost, forwards, backwards, start = Cost(), self.forwards, self.backwards, time.perf_counter()
        yield cost
        cost.forwards, cost.backwards = self.forwards - forwards, self.backwards - backwards
        cost.seconds = time.perf_counter() - start

    @torch.no_grad()
    def see(self, token_ids: Int[Tensor, "pairs positions"], hooks: Sequence[str]) -> tuple[Tensor, Seen]:
        """Return the logits, and the unmodified model's activations at each hook."""
        seen: Seen = {}

        def keep(hook: str) -> Callable[[Tensor], None]:
            # Downstream modules may write to their inputs in place.
            return lambda x: seen.update({hook: x.clone()})

        with self.model.hooked({hook: keep(hook) for hook in hooks}):
            return self.run(token_ids), seen

    def run(self, token_ids: Int[Tensor, "pairs positions"]) -> Float[Tensor, "pairs positions vocabulary"]:
        """Return the logits under the hooks in place; gradients flow if they are enabled."""
        self.forwards += 1
        return self.model.run(token_ids.to(self.model.device))

    def gradients(
        self,
        token_ids: Int[Tensor, "pairs positions"],
        hooks: Sequence[str],
        measure: Measure,
        held: Mapping[str, Tensor] | None = None,
        rules: AbstractContextManager | None = None,
    ) -> tuple[Seen, Seen]:
        """Return the activations at each hook and the gradient of the summed metric there: one forward and one backward pass.

        Pairs of a batch are independent, so the gradient of a pair is that of its own metric. ``held`` replaces the model's
        activations at hooks; ``rules`` is opened around both passes, after the hooks, and may change how gradients flow.
        """
        seen: Seen = {}
        held = held or {}

        def leaf(hook: str) -> Callable[[Tensor], Tensor]:
            def reader(x: Tensor) -> Tensor:
                x = held[hook].to(x) if hook in held else x
                # The first hook starts the graph; later ones are part of it, and keep their gradient. Cloned because other
                # modules may read this tensor too.
                x = x.clone() if x.requires_grad else x.detach().requires_grad_(True)
                x.retain_grad()
                seen[hook] = x
                return x.clone()

            return reader

        every = {hook: leaf(hook) for hook in dict.fromkeys([*held, *hooks])}
        with torch.enable_grad(), self.model.hooked(every), rules or nullcontext():
            measured = measure(self.run(token_ids)).sum()
            self.backwards += 1
            measured.backward()
        # The metric may not depend on a hook, which then has no gradient.
        grads = {hook: torch.zeros_like(x) if x.grad is None else x.grad for hook, x in seen.items()}
        return {hook: x.detach() for hook, x in seen.items()}, grads
