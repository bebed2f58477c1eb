"""Relevance patching: attribution patching whose slopes are those of layer-wise relevance propagation.

The values of a model stay what they are, bit for bit; only how gradients flow through it changes, so that a norm's
denominator, an activation function or one factor of a product no longer makes the slope at a point a bad guide to what
happens further away.

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

# By class name, as libraries have classes of their own; a ReLU is its own identity rule.
SMOOTH = re.compile("gelu|silu|swish|mish", re.IGNORECASE)
# What an MLP whose activations are multiplied by a second projection has.
GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
# A module, what it computes, and its input to something with the gradients that it should have.
Flow = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]
# Nearer to 0 than this an activation function is taken to be as steep as it is here.
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
    """While open, gradients flow through the model by rules:

    - ``normalisation``: a norm divides by a constant; the mean it subtracts keeps its gradient;
    - ``activation``: a smooth activation function multiplies by a constant, its value by its argument;
    - ``gate``: each factor of a gated product gets half of the gradient;
    - ``attention``: patterns are constants, so nothing flows into queries and keys.

    Open it after hooks are in place: what reads queries and keys is then before the place where they end. The model is as it
    was afterwards, whatever happens.

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
                # First of all hooks: who reads the product there sees the whole gradient.
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
    """The module's values, with the gradients of ``flow``."""
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
    # Exactly the value: a number less itself is 0.
    return value + (other - other.detach())


def _centred_norm(module: nn.Module, before: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The norm with a constant denominator, but for its bias, which has no gradient to give."""
    assert isinstance(module, nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.detach().pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
    return centred / scale if module.weight is None else centred / scale * module.weight


def _proportional(module: nn.Module, before: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``x`` times the constant by which the module multiplies it; a norm that subtracts no mean is one of these too."""
    with torch.no_grad():
        away = torch.where(x.abs() < NUDGE, torch.where(x < 0, -NUDGE, NUDGE).to(x), x)
        ratio = before(away) / away
    return x * ratio


def _halved(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    product, *rest = args
    return (_with_gradient_of(product.detach(), product / 2), *rest)


def _ended(_module: nn.Module, _args: tuple, output: Tensor, passes: Tensor) -> Tensor:
    """Gradients flow back from these columns alone."""
    return torch.where(passes.to(output.device), output, output.detach())


def _projections(module: nn.Module, layer: int) -> list[tuple[nn.Module, Tensor]]:
    """What makes queries and keys in one block; for each of its columns whether it is part of a value instead."""
    path = find_block(module, layer).attention
    attention: Any = module.get_submodule(path) if path else nn.Module()
    names = {name for name, _ in attention.named_children()}
    if {"q_proj", "k_proj"} <= names:
        return [(getattr(attention, name), torch.tensor(False)) for name in ("q_proj", "k_proj")]
    if "c_attn" in names:
        # All queries, all keys, all values (GPT-2); its weights lie the other way round.
        width = attention.c_attn.weight.shape[1] // 3
        return [(attention.c_attn, torch.arange(3 * width) >= 2 * width)]
    if "query_key_value" in names and hasattr(attention, "head_size"):
        # Query, key and value of one head lie next to each other (GPT-NeoX).
        columns = torch.arange(attention.query_key_value.out_features)
        return [(attention.query_key_value, columns % (3 * attention.head_size) >= 2 * attention.head_size)]
    raise ValueError(
        f"attention: queries and keys could not be located among {', '.join(sorted(names)) or 'no modules'} in block {layer}. "
        "Expected q_proj and k_proj, c_attn, or query_key_value. Leave the rule for attention off."
    )
