"""Models without weights, run for the shapes they compute: no memory for parameters, no time for matrix products.

Each parameter is one number expanded to its shape; matrix products return zeros of the right shape. Everything else runs on
the CPU as usual: masks, positions, routing and any code that inspects values, which fails on the meta device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Not zero, because some norms divide by it, and small enough for its exponentials to fit in float16.
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
    """Dispatch mode in which matrix products on the CPU return zeros of the right shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.endswith("_") and args and isinstance(args[0], Tensor) and 0 in args[0].stride():
            # Some models rescale their weights in place (RWKV), which expanded tensors do not allow.
            return args[0]
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device="cpu"), func(*args, **kwargs))


def weightless(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the module that ``build`` makes, without its weights: only the shapes it computes are meaningful."""
    # Imported on first use: it takes a second.
    import accelerate

    # Buffers are kept, because positions, masks and codes are computed from them.
    with accelerate.init_empty_weights(include_buffers=False):
        module: Any = build()
    if callable(getattr(module, "set_experts_implementation", None)):
        # One product per expert: products of all at once take no expanded weights.
        module.set_experts_implementation("eager")
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                spread = torch.full((), ANY_WEIGHT, dtype=weight.dtype).expand(weight.shape)
                part._parameters[name] = nn.Parameter(spread, requires_grad=False)
        for name, buffer in part._buffers.items():
            # Buffers made from parameters are on the meta device.
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.zeros_like(buffer, device="cpu")
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Gradient mode is left unchanged: `dataflow` needs the autograd graph of a pass.
        with _ShapesOfProducts():
            return own(*args, **kwargs)

    module.forward = forward
    return module
