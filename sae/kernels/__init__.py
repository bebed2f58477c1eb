"""Compiled kernels for the arithmetic of codes. Which ones run is decided by the tensors at hand, at call time.

``cpu`` is compiled by numba, ``gpu`` by Triton; both offer the same arithmetic (``base.Kernels``). Where neither can be had
the plain path in ``sae.sparse_ops`` does the same. Choosing among scores is compiled for the CPU only: torch sorts well on
GPUs.
"""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .base import AdamStep, Kernels, RowGrad, SelectionKernels
from .parallel import has_numba

__all__ = ["AdamStep", "Kernels", "RowGrad", "SelectionKernels", "backend", "cpu_kernels", "has_triton", "selection"]

log = logging.getLogger(__name__)

CPU_DTYPES = (torch.float32, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton compiles for no older ones.
OLDEST_GPU = (8, 0)


@cache
def has_triton(device: int) -> bool:
    """Return whether the compiler is installed (it comes with torch's CUDA builds) and knows the GPU of this number."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= OLDEST_GPU


def backend(*tensors: Tensor) -> Kernels | None:
    """Return the kernels that can work on these tensors, or ``None``: they must share device and dtype and be contiguous."""
    if not _alike(tensors):
        return None
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device == "cuda" and dtype in GPU_DTYPES and has_triton(tensors[0].get_device()):
        return _gpu()
    return selection(*tensors)


def selection(*tensors: Tensor) -> SelectionKernels | None:
    """Return the kernels that choose among scores, and round for choosing, if there are any for these tensors."""
    fits = _alike(tensors) and tensors[0].device.type == "cpu" and tensors[0].dtype in CPU_DTYPES
    return cpu_kernels() if fits else None


def cpu_kernels() -> SelectionKernels | None:
    """Return the kernels for tensors in main memory, or ``None`` without their compiler."""
    return _cpu() if has_numba() else None


def _alike(tensors: tuple[Tensor, ...]) -> bool:
    first = tensors[0]
    return all(t.device.type == first.device.type and t.dtype == first.dtype and t.is_contiguous() for t in tensors)


# Compilers are imported at first use: it takes a second, and not everybody has them.


@cache
def _cpu() -> SelectionKernels:
    from .cpu import CpuKernels

    kernels = CpuKernels()
    if not kernels.are_compiled():
        log.info("Compiling kernels for this CPU: about ten seconds, once.")
    return kernels


@cache
def _gpu() -> Kernels:
    from .gpu import GpuKernels

    return GpuKernels()
