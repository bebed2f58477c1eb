"""GpuKernels: kernels for tensors in GPU memory, compiled by Triton."""

from typing import Any

import torch
from torch import Tensor

from . import triton_blocks as blocks
from .base import AdamStep, Kernels, RowGrad

# Columns per program, and entries whose rows it reads at once: 32 numbers per thread of four warps.
COLUMNS = 512
SOME = 8
# Rows up to this length keep their gradient in registers while they are updated.
WHOLE_ROW = 8192
# Maximum number of entries that one program adds up sequentially, so that a latent firing on every token does not delay the
# rest: whole chunks of its segment are summed beforehand by programs of their own.
CHUNK = 256
# Maximum number of chunk sums: 256 MB for rows of 4096. Chunks grow if there would be more.
MOST_CHUNKS = 1 << 14


class GpuKernels(Kernels):
    """Programs over rows. No method synchronizes with the GPU."""

    def decode(self, bounds: Tensor, latents: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
        # Tokens have similar numbers of entries, so nothing needs to be split.
        return _sum_segments(bounds, latents, values, atoms, _not_split(bounds, atoms))

    def dots(self, bounds: Tensor, latents: Tensor, left: Tensor, rows: Tensor) -> Tensor:
        out = rows.new_empty(latents.shape[0])
        sizes = {"SOME": SOME, "BLOCK": _block(rows.shape[1], COLUMNS)}
        arguments = (bounds, latents.contiguous(), left, rows, rows.shape[1], out)
        _launch(blocks.dots_block, (bounds.shape[0] - 1,), *arguments, **sizes)
        return out

    def spread(self, firsts: Tensor, tokens: Tensor, values: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        found = _sum_segments(firsts, tokens, values, rows, _split(firsts, tokens, values, rows))
        return found if out is None else out.copy_(found)

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
        # Python numbers are passed as kernel arguments: a tensor of them would have to be copied to the GPU.
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
    """Return the chunk arguments for unsplit segments; kernels do not read the tensors."""
    return firsts, rows, CHUNK, False


def _split(firsts: Tensor, tokens: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, int, bool]:
    """Return each segment's first chunk, the chunk sums, the entries per chunk, and True if there are chunks.

    Only the GPU knows the segment lengths, but the number of whole chunks is bounded by the number of entries.
    """
    entries, d = tokens.shape[0], rows.shape[1]
    length = max(CHUNK, 1 << max(-(-entries // MOST_CHUNKS) - 1, 0).bit_length())
    count = entries // length
    if not count:
        return _not_split(firsts, rows)
    heads = torch.zeros_like(firsts)
    torch.cumsum(firsts.diff() // length, 0, out=heads[1:])
    number = torch.arange(count, device=firsts.device)
    # Chunk numbers from the last head on belong to no segment.
    segment = (torch.searchsorted(heads, number, right=True) - 1).clamp_(max=len(firsts) - 2)
    begins = torch.where(number < heads[-1], firsts[segment] + (number - heads[segment]) * length, -1)
    sums = torch.empty(count, d, dtype=torch.float32, device=rows.device)
    block = _block(d, COLUMNS)
    arguments = (begins, length, tokens, values, rows, d, sums)
    _launch(blocks.sum_chunks_block, (count, -(-d // block)), *arguments, SOME=SOME, BLOCK=block)
    return heads, sums, length, True


def _of_rows(weights: Tensor, unit: bool, gradient: RowGrad) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and compile-time sizes of the kernels that work on a gradient's rows."""
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
    """Return the number of columns per block: a power of two, at most ``most``."""
    return min(most, max(16, 1 << (d - 1).bit_length()))


def _launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **sizes: Any) -> None:
    # Triton launches on the current device, which may differ from the tensors' device.
    with torch.cuda.device_of(arguments[0]):
        if all(programs):
            # Fused multiply-add, as on the CPU; set explicitly because Triton's default is about to change.
            kernel[programs](*arguments, **sizes, enable_fp_fusion=True)
