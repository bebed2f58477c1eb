"""Passes of a model for circuit analysis: what is seen at hooks, gradients of a metric there, and how many passes it took."""

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
    """Passes of whole batches, and the time from first to last."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


class Passes:
    """Runs a model, and counts. Every pass goes through here, so what a method says it costs is what it took."""

    def __init__(self, model: LanguageModel):
        self.model, self.forwards, self.backwards = model, 0, 0

    @contextmanager
    def counted(self) -> Iterator[Cost]:
        """Fills in the cost of what is done inside when it is done."""
        cost, forwards, backwards, start = Cost(), self.forwards, self.backwards, time.perf_counter()
        yield cost
        cost.forwards, cost.backwards = self.forwards - forwards, self.backwards - backwards
        cost.seconds = time.perf_counter() - start

    @torch.no_grad()
    def see(self, token_ids: Int[Tensor, "pairs positions"], hooks: Sequence[str]) -> tuple[Tensor, Seen]:
        """Logits, and what the untouched model has at each hook."""
        seen: Seen = {}

        def keep(hook: str) -> Callable[[Tensor], None]:
            # Modules above may write into what they get.
            return lambda x: seen.update({hook: x.clone()})

        with self.model.hooked({hook: keep(hook) for hook in hooks}):
            return self.run(token_ids), seen

    def run(self, token_ids: Int[Tensor, "pairs positions"]) -> Float[Tensor, "pairs positions vocabulary"]:
        """Logits, under whatever hooks are in place; gradients flow if they are enabled."""
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
        """What each hook sees, and the gradient there of the metric's sum: one forward and one backward pass.

        Pairs do not see each other, so the gradient of a pair is that of its own metric. ``held`` are tensors that take the
        place of what the model has at a hook; ``rules`` is opened around both passes, behind the hooks, and may change how
        gradients flow.
        """
        seen: Seen = {}
        held = held or {}

        def leaf(hook: str) -> Callable[[Tensor], Tensor]:
            def reader(x: Tensor) -> Tensor:
                x = held[hook].to(x) if hook in held else x
                # The first hook starts the graph; later ones are part of it, and keep their gradient.
                # A copy, as the module that is hooked may not be the only one to read this tensor.
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
        # A hook that the metric does not depend on has no gradient.
        grads = {hook: torch.zeros_like(x) if x.grad is None else x.grad for hook, x in seen.items()}
        return {hook: x.detach() for hook, x in seen.items()}, grads
