"""Compiled kernels for the arithmetic of codes. Which ones run is decided by the tensors at hand, at call time.

``cpu`` is compiled by numba, ``gpu`` by Triton; both offer the same arithmetic. Where neither can be had the plain path in
``sae.sparse_ops`` does the same. Choosing among scores is compiled for the CPU only: torch sorts well on GPUs.
"""

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from .parallel import has_numba

log = logging.getLogger(__name__)

CPU_DTYPES = (torch.float32, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton compiles for no older ones.
OLDEST_GPU = (8, 0)


@dataclass(frozen=True)
class AdamStep:
    """What a step of Adam goes by. The corrections for the moments' start at zero are in the last three.

    A weight moves by ``length`` times its first moment over ``eps`` plus ``root`` times the root of its second.
    """

    beta1: float
    beta2: float
    length: float
    root: float
    eps: float


@cache
def has_triton(device: int) -> bool:
    """Whether the compiler is installed (it comes with torch's CUDA builds) and knows the GPU of this number."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= OLDEST_GPU


def backend(*tensors: Tensor) -> ModuleType | None:
    """The kernels that can work on these tensors, or ``None``: they must share device and dtype and be contiguous."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if any(t.device.type != device or t.dtype != dtype or not t.is_contiguous() for t in tensors):
        return None
    if device == "cpu" and dtype in CPU_DTYPES and has_numba():
        return _cpu()
    if device == "cuda" and dtype in GPU_DTYPES and has_triton(tensors[0].get_device()):
        return import_module(".gpu", __name__)
    return None


def selection(*tensors: Tensor) -> ModuleType | None:
    """The kernels that choose among scores, and round for choosing, if there are any for these tensors."""
    return backend(*tensors) if tensors[0].device.type == "cpu" else None


@cache
def _cpu() -> ModuleType:
    """The kernels for the CPU; who waits for their first compilation is told so."""
    cpu = import_module(".cpu", __name__)
    if not cpu.are_compiled():
        log.info("Compiling kernels for this CPU: about ten seconds, once.")
    return cpu
