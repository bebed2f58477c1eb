"""Compiled kernels for sparse-code arithmetic, chosen at call time by the given tensors.

``cpu`` is compiled by numba, ``gpu`` by Triton; both implement ``base.Kernels``. Without either, the plain torch code in
``sae.sparse_ops`` computes the same. Selection kernels exist for the CPU only, because torch sorts well on GPUs.
"""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .base import AdamStep, Kernels, RowGrad, SelectionKernels
from .parallel import has_numba, loops_together

__all__ = [
    "AdamStep",
    "Kernels",
    "RowGrad",
    "SelectionKernels",
    "backend",
    "cpu_kernels",
    "has_triton",
    "loops_together",
    "selection",
]

log = logging.getLogger(__name__)

CPU_DTYPES = (torch.float32, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Oldest compute capability that Triton supports.
OLDEST_GPU = (8, 0)


@cache
def has_triton(device: int) -> bool:
    """Return True if Triton is installed (it comes with torch's CUDA builds) and supports the GPU with this index."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= OLDEST_GPU


def backend(*tensors: Tensor) -> Kernels | None:
    """Return the kernels for these tensors, which must be contiguous and share device and dtype, or ``None``."""
    if not _alike(tensors):
        return None
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device == "cuda" and dtype in GPU_DTYPES and has_triton(tensors[0].get_device()):
        return _gpu()
    return selection(*tensors)


def selection(*tensors: Tensor) -> SelectionKernels | None:
    """Return the kernels for selecting scores, and for quantizing them, or ``None`` if these tensors have none."""
    fits = _alike(tensors) and tensors[0].device.type == "cpu" and tensors[0].dtype in CPU_DTYPES
    return cpu_kernels() if fits else None


def cpu_kernels() -> SelectionKernels | None:
    """Return the kernels for tensors in main memory, or ``None`` without numba."""
    return _cpu() if has_numba() else None


def _alike(tensors: tuple[Tensor, ...]) -> bool:
    first = tensors[0]
    return all(t.device.type == first.device.type and t.dtype == first.dtype and t.is_contiguous() for t in tensors)


# Compilers are imported lazily: importing takes a second, and they may not be installed.


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
