"""Conversion of user-supplied activations: tensors of any dtype and device, NumPy and other arrays, lists."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class ArrayLike(Protocol):
    """Object that NumPy converts to an array."""

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray: ...


# Tensors and anything that can be converted to one.
Rows = Tensor | ArrayLike | Sequence[Any]


def as_rows(values: object, name: str = "x", device: torch.device | str = "cpu") -> Float[Tensor, "..."]:
    """Return real numbers as a detached float32 tensor on a device, without copying a tensor that already is one.

    >>> as_rows(np.ones((2, 3), np.float16)).dtype
    torch.float32

    Raises:
        ValueError: If the values are not numbers, or not a dense block of them.
    """
    try:
        found = values if isinstance(values, Tensor) else torch.as_tensor(_array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: expected a tensor or an array of numbers, got {type(values).__name__} ({reason}).") from None
    if found.is_complex() or found.layout != torch.strided or found.is_quantized or found.is_meta:
        kind = f"{found.dtype}, {found.layout}" + (" on the meta device" if found.is_meta else "")
        raise ValueError(f"{name}: expected a dense tensor of real numbers, got {kind}.")
    return found.detach().to(device=device, dtype=torch.float32)


def _array(values: object) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind == "V":
        # NumPy sees the bfloat16 of other libraries as a void dtype.
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"dtype {array.dtype}")
    # torch requires native byte order, writable memory, and no negative strides.
    fits = array.dtype.isnative and array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return array if fits else array.astype(array.dtype.newbyteorder("="))
