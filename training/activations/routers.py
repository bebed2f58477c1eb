"""Routers of mixture-of-experts blocks: modules that return logits, scores and indices of the chosen experts for every token.

The experts read scores and indices only (transformers 5), so logits that a hook replaces have an effect only if the router
chooses again. ``rerouted`` runs the router's own code on them; it needs no formula of any architecture. Experts whose logit is
``-inf`` are switched off: they rank below all others wherever the router ranks experts, and get a score of 0.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .hidden_states import HookError

RANKINGS = (torch.topk, Tensor.topk)


class Routing(NamedTuple):
    """Output of a router: a logit for every expert, and the chosen experts with their scores; ``scores`` may be None."""

    logits: Float[Tensor, "tokens n_experts"]
    scores: Float[Tensor, "tokens k"] | None
    indices: Int[Tensor, "tokens k"]


def _llama4(output: Any, k: int) -> Routing:
    scores, logits = output
    indices = logits.topk(k, dim=-1).indices
    return Routing(logits, scores.gather(1, indices), indices)


def _jetmoe(output: Any, k: int) -> Routing:
    best, indices = output[4].topk(k, dim=-1)
    return Routing(output[4], best.softmax(-1).nan_to_num(0.0), indices)


def _dbrx(output: Any, k: int) -> Routing:
    best, indices = output.softmax(-1).topk(k, dim=-1)
    return Routing(output, best, indices)


class OtherRouter(NamedTuple):
    """A router that does not return logits, scores and indices in this order: the path of its logits, and how to read it.

    ``read`` is called with the output and the number of experts that a token gets.
    """

    logits: tuple[int, ...]
    read: Callable[[Any, int], Routing]


# By class. DBRX chooses experts in the module that calls the router.
OTHERS = {
    "Llama4Router": OtherRouter((1,), _llama4),
    "JetMoeTopKGating": OtherRouter((4,), _jetmoe),
    "DbrxRouter": OtherRouter((), _dbrx),
}
# Mixtures without a logit for every expert, by class, and why.
WITHOUT = {
    "DogeCDMoE": "its router_gate gives logits of keys, pairs of which make experts, and mixes those of different tokens",
}


def routing(output: Any, module: nn.Module | None = None, k: int | None = None) -> Routing | None:
    """Return the parts of a router's output; None if it is not one.

    A router returns several tensors with a row for every token: first its logits, and among the others whole numbers, the
    chosen experts. ``OTHERS`` return something else.

    Args:
        module: The module that returned the output.
        k: Experts of a token, for a router of ``OTHERS`` that does not know it.
    """
    if (other := OTHERS.get(type(module).__name__)) is not None:
        return other.read(output, k or int(getattr(module, "top_k", 1)))
    if not isinstance(output, tuple | list) or not output:
        return None
    logits = output[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim != 2:
        return None
    others = [x for x in output[1:] if isinstance(x, Tensor) and x.ndim == 2 and len(x) == len(logits)]
    indices = next((x for x in others if x.dtype in (torch.int64, torch.int32) and x.shape[1] <= logits.shape[1]), None)
    if indices is None:
        return None
    scores = next((x for x in others if x.is_floating_point() and x.shape == indices.shape), None)
    return Routing(logits, scores, indices)


def rerouted(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], before: Routing, logits: Tensor, hook: str
) -> Any:
    """Return the output of a router, called with these arguments, whose logits are replaced: it chooses experts by ``logits``.

    Equal logits give an equal output. A token whose experts are all off gets scores of 0.

    Args:
        before: Output of the same call with its own logits.
        hook: Name of the hook, for messages.

    Raises:
        HookError: If the module does not compute its scores from the logits that it returns.
    """
    replacement = _Replacement(before.logits.detach(), logits)
    with replacement:
        output = module.forward(*args, **kwargs)
    after = routing(output, module)
    refused = (
        f"hook {hook}: expected a router that chooses experts by the logits it returns, got a {type(module).__name__}, "
        "which does not. Replace another hook; this one can be read."
    )
    if not replacement.done or after is None:
        raise HookError(refused)
    off = logits == -torch.inf
    if after.scores is None or not bool(off.any()):
        return output
    none = off.all(-1, keepdim=True)
    # 0 / 0 where scores are divided by their sum.
    scores = after.scores.masked_fill(none, 0.0)
    if bool((off.gather(1, after.indices.long()) & (scores != 0)).any()):
        raise HookError(refused)
    if type(module).__name__ not in OTHERS:
        return type(output)(scores if x is after.scores else x for x in output)
    if isinstance(output, Tensor) and bool(none.any()):
        raise HookError(
            f"hook {hook}: expected an expert that is on for every token, got a token without: a {type(module).__name__} gives "
            "logits only, from which scores are computed elsewhere. Keep one expert on."
        )
    # Scores of a token without experts are 0 / 0 here, too.
    return output if isinstance(output, Tensor) else type(output)(_zeros_for_nan(x, before.logits) for x in output)


def _zeros_for_nan(x: Any, logits: Tensor) -> Any:
    scores = isinstance(x, Tensor) and x.is_floating_point() and x.shape != logits.shape
    return x.nan_to_num(0.0, torch.inf, -torch.inf) if scores else x


class _Replacement(TorchFunctionMode):
    """Mode in which the first function that returns ``before`` returns ``logits``, and experts that are off rank last."""

    def __init__(self, before: Tensor, logits: Tensor):
        super().__init__()
        self._before, self._logits = before, logits
        self._off = logits.detach() == -torch.inf
        self._any_off = bool(self._off.any())
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.done:
            found = func(*args, **kwargs)
            if _equal(found, self._before):
                self.done = True
                return self._logits.reshape(found.shape)
            return found
        if self._any_off and func in RANKINGS and args and args[0].numel() == self._off.numel():
            return self._ranked(func, args, kwargs)
        return func(*args, **kwargs)

    def _ranked(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        values, *rest = args
        ranked = _below(values.reshape(self._off.shape), self._off).view(values.shape)
        found = func(ranked, *rest, **kwargs)
        if values.shape[-1] == self._off.shape[-1]:
            # Scores may be computed from these values (GPT-OSS), so they are those of the router itself.
            return type(found)((values.gather(-1, found.indices), found.indices))
        # Experts in groups (DeepSeek-V3): a group without its best experts is worth less.
        return found


def _equal(found: Any, before: Tensor) -> bool:
    # Tokens may still be in contexts where the logits are computed.
    if not isinstance(found, Tensor) or found.numel() != before.numel() or found.shape[-1:] != before.shape[-1:]:
        return False
    return torch.equal(found.detach().reshape(before.shape).to(before), before)


def _below(values: Float[Tensor, "tokens n_experts"], off: Bool[Tensor, "tokens n_experts"]) -> Tensor:
    """Return values in which experts that are off are less than all others, but more than those that are ruled out (-inf).

    They are so much less that two others, whichever, add up to more than one other and one that is off.
    """
    others = ~off & values.isfinite()
    least = values.masked_fill(~others, torch.inf).amin(1, keepdim=True)
    most = values.masked_fill(~others, -torch.inf).amax(1, keepdim=True)
    low = (2 * least - most - 1).nan_to_num(0.0, 0.0, 0.0)
    return torch.where(off, low, values)


@contextmanager
def chosen_experts(
    modules: Mapping[str, nn.Module], within: nn.Module
) -> Iterator[dict[str, Bool[Tensor, "tokens n_experts"]]]:
    """Context manager that records the experts each router chooses with a score above 0 in the last pass, by its name here.

    Args:
        within: The model that the routers are part of.
    """
    found: dict[str, Tensor] = {}

    def recorder(name: str, k: int | None) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            seen = routing(output, module, k)
            if seen is not None:
                used = torch.ones_like(seen.indices, dtype=torch.bool) if seen.scores is None else seen.scores > 0
                chosen = torch.zeros(seen.logits.shape, dtype=torch.bool, device=seen.logits.device)
                found[name] = chosen.scatter(1, seen.indices.long(), used)

        return record

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(recorder(name, _top_k(module, within))).remove)
        yield found


def _top_k(router: nn.Module, within: nn.Module) -> int | None:
    """Return the number of experts of a token by the router, or by the module that it is a child of; None if neither says."""
    holders = (router, *(part for part in within.modules() if any(child is router for child in part.children())))
    return next((int(found) for holder in holders if isinstance(found := getattr(holder, "top_k", None), int)), None)
