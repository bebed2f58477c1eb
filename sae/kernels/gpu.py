"""GpuKernels: the kernels on tensors in a GPU's memory, compiled by Triton."""

from typing import Any

import torch
from torch import Tensor

from . import triton_blocks as blocks
from .base import AdamStep, Kernels, RowGrad

# Columns that a program adds up, and entries whose rows it reads at once: 32 numbers a thread of four warps.
COLUMNS = 512
SOME = 8
# A row's gradient of up to so many numbers is held in registers while the row is updated.
WHOLE_ROW = 8192
# Entries that one program adds up one after another at most, so that a latent which fires on every token is not waited for:
# its segment's whole chunks are added up before, by programs of their own.
CHUNK = 256
# Rows for the chunks' sums: 256 MB for rows of 4096. Chunks grow where there would be more.
MOST_CHUNKS = 1 << 14


class GpuKernels(Kernels):
    """Programs over rows. No method waits for the GPU."""

    def decode(self, bounds: Tensor, latents: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
        # Tokens have about equally many entries: there is nothing to split.
        return _sum_segments(bounds, latents, values, atoms, _not_split(bounds, atoms))

    def dots(self, bounds: Tensor, latents: Tensor, left: Tensor, rows: Tensor) -> Tensor:
        out = rows.new_empty(latents.shape[0])
        sizes = {"SOME": SOME, "BLOCK": _block(rows.shape[1], COLUMNS)}
        arguments = (bounds, latents.contiguous(), left, rows, rows.shape[1], out)
        _launch(blocks.dots_block, (bounds.shape[0] - 1,), *arguments, **sizes)
        return out

    def spread(self, firsts: Tensor, tokens: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        return _sum_segments(firsts, tokens, values, rows, _split(firsts, tokens, values, rows))

    def squared_norms(self, weights: Tensor, unit: bool, gradient: RowGrad) -> Tensor:
        out = torch.empty(weights.shape[0], dtype=torch.float32, device=weights.device)
        parts, sizes = _of_rows(weights, unit, gradient)
        _launch(blocks.squared_norms_block, (len(out),), weights, weights.shape[1], *parts, out, **sizes)
        return out

    def adam_(
        self, weights: Tensor, unit: bool, gradient: RowGrad, mean: Tensor, square: Tensor, factor: Tensor, step: AdamStep
    ) -> None:
        assert weights.is_contiguous()
        assert mean.is_contiguous()
        assert square.is_contiguous()
        parts, sizes = _of_rows(weights, unit, gradient)
        # Numbers from Python go as the kernel's arguments: a tensor made of them would have to be copied to the GPU.
        numbers = (1 - step.beta1, step.beta2, 1 - step.beta2, step.length, step.root, step.eps)
        rows, d = weights.shape
        _launch(blocks.adam_block, (rows,), weights, d, *parts, mean, square, factor, *numbers, **sizes)


def _sum_segments(firsts: Tensor, members: Tensor, values: Tensor, rows: Tensor, split: tuple[Any, ...]) -> Tensor:
    *chunks, is_split = split
    d = rows.shape[1]
    out = rows.new_empty(firsts.shape[0] - 1, d)
    block = _block(d, COLUMNS)
    sizes = {"SPLIT": is_split, "SOME": SOME, "BLOCK": block}
    arguments = (firsts, members.contiguous(), values, rows, *chunks, d, out)
    _launch(blocks.sum_segments_block, (len(out), -(-d // block)), *arguments, **sizes)
    return out


def _not_split(firsts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, int, bool]:
    """What kernels take for the chunks where there are none; the tensors are not looked at."""
    return firsts, rows, CHUNK, False


def _split(firsts: Tensor, tokens: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, int, bool]:
    """Each segment's first chunk among all, the chunks' sums, how many entries each has, and whether there are any.

    How long the segments are only the GPU knows, but not more chunks can be whole than the entries fill.
    """
    entries, d = tokens.shape[0], rows.shape[1]
    length = max(CHUNK, 1 << max(-(-entries // MOST_CHUNKS) - 1, 0).bit_length())
    count = entries // length
    if not count:
        return _not_split(firsts, rows)
    heads = torch.zeros_like(firsts)
    torch.cumsum(firsts.diff() // length, 0, out=heads[1:])
    number = torch.arange(count, device=firsts.device)
    # The numbers from the last head on belong to no segment.
    segment = (torch.searchsorted(heads, number, right=True) - 1).clamp_(max=len(firsts) - 2)
    begins = torch.where(number < heads[-1], firsts[segment] + (number - heads[segment]) * length, -1)
    sums = torch.empty(count, d, dtype=torch.float32, device=rows.device)
    block = _block(d, COLUMNS)
    arguments = (begins, length, tokens, values, rows, d, sums)
    _launch(blocks.sum_chunks_block, (count, -(-d // block)), *arguments, SOME=SOME, BLOCK=block)
    return heads, sums, length, True


def _of_rows(weights: Tensor, unit: bool, gradient: RowGrad) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernels that work on a gradient's rows take of it, and the sizes they are compiled for."""
    firsts, tokens, values, rows, dense_of, dense = (part.contiguous() for part in gradient)
    *chunks, is_split = _split(firsts, tokens, values, rows)
    block = _block(weights.shape[1], WHOLE_ROW)
    sizes = {
        "UNIT": unit,
        "WHOLE": weights.shape[1] <= block,
        "SPLIT": is_split,
        "SOME": max(1, min(SOME, WHOLE_ROW // block)),
        "BLOCK": block,
        "num_warps": max(4, min(16, block // 512)),
    }
    return (firsts, tokens, values, rows, dense_of, dense, *chunks), sizes


def _block(d: int, most: int) -> int:
    """The columns of a block: a power of two, at most ``most``."""
    return min(most, max(16, 1 << (d - 1).bit_length()))


def _launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **sizes: Any) -> None:
    # Triton launches on the current device, which may be another.
    with torch.cuda.device_of(arguments[0]):
        if all(programs):
            # Products may be fused with sums, as on the CPU; Triton's default is about to change.
            kernel[programs](*arguments, **sizes, enable_fp_fusion=True)
