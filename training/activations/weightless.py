"""Run a model without its weights, for the shapes it computes: no memory for parameters, no time for matrix products.

Parameters are one number each, spread over their shape; products are zeros of the shape they would have. All else is computed
on the CPU as ever: masks, positions, routing and whatever code asks of values, which the meta device cannot answer.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Neither zero, by which some norms would divide, nor so large that exponentials of it leave float16.
ANY_WEIGHT = 0.01
PRODUCTS = tuple(
    getattr(torch.ops.aten, name)
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


class _ShapesOfProducts(TorchDispatchMode):
    """While it is active, products on the CPU are zeros of their shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.endswith("_") and args and isinstance(args[0], Tensor) and 0 in args[0].stride():
            # Some models rescale their weights in place (RWKV), which spread numbers do not allow.
            return args[0]
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device="cpu"), func(*args, **kwargs))


def weightless(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the module that ``build`` makes, without its weights: of what it computes only the shapes mean something."""
    # Imported on first use: it takes a second.
    import accelerate

    # Buffers are kept: what positions, masks and codes are computed from.
    with accelerate.init_empty_weights(include_buffers=False):
        module = build()
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                spread = torch.full((), ANY_WEIGHT, dtype=weight.dtype).expand(weight.shape)
                part._parameters[name] = nn.Parameter(spread, requires_grad=False)
        for name, buffer in part._buffers.items():
            # Some are made from parameters.
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.zeros_like(buffer, device="cpu")
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Gradients are as outside: the graph of a pass shows what depends on what.
        with _ShapesOfProducts():
            return own(*args, **kwargs)

    module.forward = forward
    return module
