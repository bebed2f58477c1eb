"""Neurons of the MLPs: where they are read, and whether their activation function is zero below zero."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .sites import MLP_PROJECTION, block_paths, named_parts

# Names of activation functions, as modules or as plain functions, in the MLPs and blocks of transformers.
ACTIVATIONS = (
    "act",
    "act_fn",
    "activation_fn",
    "activation",
    "activation_function",
    "activation_func",
    "intermediate_act_fn",
    "gelu_impl",
)
# Inputs that tell a gate at zero: negative ones become exactly zero, positive ones do not.
_NEGATIVE, _POSITIVE = (-6.0, -2.0, -0.5), (0.5, 2.0)


@dataclass(frozen=True)
class MlpNeurons:
    """Neurons of one block's MLP: the ``hook`` at the input of its last projection, or the reason why there is none.

    ``hook`` is set only if neurons can be silent: their activation function is zero for negative inputs (ReLU, squared ReLU,
    ReLU6), or the gate that multiplies them is.
    """

    hook: str | None
    reason: str = ""


def gated_neurons(module: nn.Module) -> list[MlpNeurons]:
    """Return the neurons of every block whose activation function has a gate at zero.

    Raises:
        ValueError: If the model's blocks are not found.
    """
    return [_neurons(module, path) for path in block_paths(module)]


def _neurons(module: nn.Module, path: str) -> MlpNeurons:
    # By name: the flow of data would take a pass of its own.
    ends = named_parts(module, path).mlp
    if ends is None:
        return MlpNeurons(None, "a block has no MLP that is recognized by name")
    first, last = (module.get_submodule(end) for end in ends)
    inside = {name for name, _ in last.named_children()}
    names = [name for name in MLP_PROJECTION if name in inside]
    if not names and inside:
        where = type(last).__name__
        return MlpNeurons(
            None, f"in {where} no module reads the neurons ({', '.join(MLP_PROJECTION)}); mixtures of experts have none"
        )
    function = next(_activations((first, last, module.get_submodule(path))), None)
    if function is None:
        return MlpNeurons(None, f"the activation function of {type(first).__name__} was not found")
    if not _is_gate(function):
        name = getattr(function, "__name__", type(function).__name__)
        return MlpNeurons(None, f"the MLPs' activation function, {name}, has no gate at zero: no neuron is exactly silent")
    return MlpNeurons(f"{'.'.join([ends[1], *names[:1]])}:in")


def _activations(parts: tuple[nn.Module, ...]) -> Iterator[Callable[..., Any]]:
    """Yield the activation functions of these modules by name, those of their descendants before those of the next."""
    for part in parts[:2]:
        for inner in part.modules():
            yield from _named(inner)
    # OPT's are of the block, beside its two projections. Descendants of a block include attention's.
    yield from _named(parts[2])


def _named(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for name in ACTIVATIONS:
        found: Any = getattr(module, name, None)
        if callable(found):
            yield found


@torch.no_grad()
def _is_gate(function: Callable[..., Any]) -> bool:
    """Return True if the function is zero at negative inputs and not at positive ones."""
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        # A learned function (xIELU) is smooth, and its parameters may be on another device.
        return False
    try:
        below, above = function(torch.tensor(_NEGATIVE)), function(torch.tensor(_POSITIVE))
    except Exception:  # noqa: BLE001 - models raise anything: of halves of a vector, say
        return False
    return below.shape == (len(_NEGATIVE),) and bool((below == 0).all() and (above != 0).all())
