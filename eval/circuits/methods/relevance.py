"""Relevance patching (RelP): attribution patching with the gradients of layer-wise relevance propagation.

Activations stay bit-identical; only gradient flow changes, so that a norm's denominator, an activation function or one factor
of a product no longer makes the local gradient a poor guide to larger changes.

Source: Jafari et al. 2025, arXiv:2508.21258 (RelP); the rule for attention is Ali et al. 2022, arXiv:2202.07304.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....training.activations.model import LanguageModel
from ....training.activations.sites import find_block, n_layers
from ..tasks.pairs import BATCH, PromptPairs
from ..units.space import Space
from .attribution import linear_scores, require_end
from .method import Method, UnitScores

# Matched by class name, as libraries have their own classes; a ReLU is its own identity rule.
SMOOTH = re.compile("gelu|silu|swish|mish", re.IGNORECASE)
# Submodules of gated MLPs, whose activations are multiplied by a second projection.
GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
# A module, its original forward, and its input, mapped to a tensor that has the desired gradients.
Flow = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]
# Inputs nearer to 0 are moved to this magnitude before output is divided by input.
NUDGE = 1e-6


class RelevancePatching(Method):
    """Attribution patching under ``relevance_rules``; relevance starts ``at`` the clean prompt or the corrupted one."""

    def __init__(
        self,
        normalisation: bool = True,
        activation: bool = True,
        gate: bool = True,
        attention: bool = False,
        at: str = "clean",
        batch: int = BATCH,
    ):
        self.rules = {"normalisation": normalisation, "activation": activation, "gate": gate, "attention": attention}
        self.at, self.batch = require_end("at", at), batch

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        rules = partial(relevance_rules, space.model, **self.rules)
        with space.frozen_norms() if self.rules["normalisation"] else nullcontext():
            return linear_scores(space, pairs, self.at, self.batch, rules)


@contextmanager
def relevance_rules(
    model: LanguageModel, normalisation: bool = True, activation: bool = True, gate: bool = True, attention: bool = False
) -> Iterator[None]:
    """Change how gradients flow through the model, while open:

    - ``normalisation``: a norm divides by a constant; the mean it subtracts keeps its gradient;
    - ``activation``: a smooth activation function multiplies by a constant, the ratio of its value to its argument;
    - ``gate``: each factor of a gated product gets half of the gradient;
    - ``attention``: attention patterns are constants, so no gradient flows into queries and keys.

    Open it after hooks are in place, so that hooks on queries and keys run before their gradients are cut. The model is
    restored on exit, also after an error.

    Raises:
        ValueError: If with ``attention`` the model's queries and keys cannot be located.
    """
    with ExitStack() as stack:
        for module in model.module.modules():
            flow = _flow_of(module, normalisation, activation)
            if flow is not None:
                stack.enter_context(_flowing(module, flow))
            names = {name for name, _ in module.named_children()}
            if gate and any(parts <= names for parts in GATED):
                # Registered first, so that hooks that read the product see the full gradient.
                down: Any = module.get_submodule("down_proj")
                stack.callback(down.register_forward_pre_hook(_halved, prepend=True).remove)
        if attention:
            for layer in range(n_layers(model.module)):
                for projection, passes in _projections(model.module, layer):
                    stack.callback(projection.register_forward_hook(partial(_ended, passes=passes)).remove)
        yield


def _flow_of(module: nn.Module, normalisation: bool, activation: bool) -> Flow | None:
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm):
        return _centred_norm if normalisation else None
    if name.endswith("RMSNorm"):
        return _proportional if normalisation else None
    return _proportional if activation and SMOOTH.search(name) and not any(module.children()) else None


@contextmanager
def _flowing(module: nn.Module, flow: Flow) -> Iterator[None]:
    """Keep the module's values, with the gradients of ``flow``."""
    before, own = module.forward, "forward" in vars(module)

    def forward(x: Tensor) -> Tensor:
        return _with_gradient_of(before(x).detach(), flow(module, before, x))

    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = before
        else:
            del module.forward


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    # Bit-exact: a number minus itself is 0.
    return value + (other - other.detach())


def _centred_norm(module: nn.Module, before: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the norm with a constant denominator and without its bias, which has no gradient."""
    assert isinstance(module, nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.detach().pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
    return centred / scale if module.weight is None else centred / scale * module.weight


def _proportional(module: nn.Module, before: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``x`` times the constant ratio of the module's output to its input; also for norms without mean subtraction."""
    with torch.no_grad():
        away = torch.where(x.abs() < NUDGE, torch.where(x < 0, -NUDGE, NUDGE).to(x), x)
        ratio = before(away) / away
    return x * ratio


def _halved(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    product, *rest = args
    return (_with_gradient_of(product.detach(), product / 2), *rest)


def _ended(_module: nn.Module, _args: tuple, output: Tensor, passes: Tensor) -> Tensor:
    """Detach all columns but ``passes``."""
    return torch.where(passes.to(output.device), output, output.detach())


def _projections(module: nn.Module, layer: int) -> list[tuple[nn.Module, Tensor]]:
    """Return the modules that compute queries and keys in one block, with masks of the columns that belong to values."""
    path = find_block(module, layer).attention
    attention: Any = module.get_submodule(path) if path else nn.Module()
    names = {name for name, _ in attention.named_children()}
    if {"q_proj", "k_proj"} <= names:
        return [(getattr(attention, name), torch.tensor(False)) for name in ("q_proj", "k_proj")]
    if "c_attn" in names:
        # GPT-2: all queries, all keys, all values; the weights are transposed.
        width = attention.c_attn.weight.shape[1] // 3
        return [(attention.c_attn, torch.arange(3 * width) >= 2 * width)]
    if "query_key_value" in names and hasattr(attention, "head_size"):
        # GPT-NeoX: query, key and value of one head are adjacent.
        columns = torch.arange(attention.query_key_value.out_features)
        return [(attention.query_key_value, columns % (3 * attention.head_size) >= 2 * attention.head_size)]
    raise ValueError(
        f"attention: queries and keys could not be located among {', '.join(sorted(names)) or 'no modules'} in block {layer}. "
        "Expected q_proj and k_proj, c_attn, or query_key_value. Leave the rule for attention off."
    )
