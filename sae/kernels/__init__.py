"""Compiled kernels for the arithmetic of codes. Which ones run is decided by the tensors at hand, at call time.

``cpu`` is compiled by numba, ``gpu`` by Triton; both offer the same functions. Where neither can be had the plain path in
``sae.sparse_ops`` does the same.
"""

import logging
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


@cache
def has_triton() -> bool:
    """Whether the compiler is installed; it comes with torch's CUDA builds."""
    return find_spec("triton") is not None


def backend(*tensors: Tensor) -> ModuleType | None:
    """The kernels that can work on these tensors, or ``None``: they must share device and dtype and be contiguous."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if any(t.device.type != device or t.dtype != dtype or not t.is_contiguous() for t in tensors):
        return None
    if device == "cpu" and dtype in CPU_DTYPES and has_numba():
        return _cpu()
    if device == "cuda" and dtype in GPU_DTYPES and has_triton():
        return import_module(".gpu", __name__)
    return None


@cache
def _cpu() -> ModuleType:
    """The kernels for the CPU; who waits for their first compilation is told so."""
    cpu = import_module(".cpu", __name__)
    if not cpu.are_compiled():
        log.info("Compiling kernels for this CPU: about ten seconds, once.")
    return cpu
