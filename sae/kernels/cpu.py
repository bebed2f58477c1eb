"""CpuKernels: kernels for tensors in main memory, compiled by numba."""

from pathlib import Path

import torch
from torch import Tensor

from . import numba_loops as loops
from .base import AdamStep, RowGrad, SelectionKernels
from .parallel import over_rows

# Minimum number of rows per part.
LEAST_ROWS = 32


class CpuKernels(SelectionKernels):
    """Loops over rows, divided among threads."""

    def are_compiled(self) -> bool:
        """Return True if an earlier process cached the compiled loops."""
        place = loops.decode_loop.stats.cache_path
        return place is not None and any(Path(place).glob(f"{Path(loops.__file__).stem}.*.nbi"))

    def decode(self, bounds: Tensor, latents: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
        out = atoms.new_empty(bounds.shape[0] - 1, atoms.shape[1])
        over_rows(loops.decode_loop, len(out), bounds, latents, values, atoms, out, least=LEAST_ROWS)
        return out

    def dots(self, bounds: Tensor, latents: Tensor, left: Tensor, rows: Tensor) -> Tensor:
        out = rows.new_empty(latents.shape[0])
        over_rows(loops.dots_loop, bounds.shape[0] - 1, bounds, latents, left, rows, out, least=LEAST_ROWS)
        return out

    def spread(self, firsts: Tensor, tokens: Tensor, values: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        out = rows.new_empty(firsts.shape[0] - 1, rows.shape[1]) if out is None else out
        over_rows(loops.spread_loop, len(out), firsts, tokens, values, rows, out, least=LEAST_ROWS)
        return out

    def squared_norms(self, weights: Tensor, unit: bool, gradient: RowGrad) -> Tensor:
        out = weights.new_empty(weights.shape[0])
        over_rows(loops.squared_norms_loop, len(out), weights, unit, *gradient, out, least=LEAST_ROWS)
        return out

    def adam_(
        self, weights: Tensor, unit: bool, gradient: RowGrad, mean: Tensor, square: Tensor, factor: Tensor, step: AdamStep
    ) -> None:
        # In the weights' precision: wider constants would widen all arithmetic.
        numbers = [1 - step.beta1, step.beta2, 1 - step.beta2, step.length, step.root, step.eps]
        settings = torch.cat([factor.to(weights.dtype).reshape(1), torch.tensor(numbers, dtype=weights.dtype)])
        over_rows(loops.adam_loop, len(weights), weights, unit, *gradient, mean, square, settings, least=LEAST_ROWS)

    def group(self, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
        firsts, order = torch.zeros(count + 2, dtype=torch.long), torch.empty_like(keys)
        loops.group_loop(keys.numpy(), firsts.numpy(), order.numpy())
        return firsts[:-1], order

    def keep_largest_(self, scores: Tensor, offset: int, values: Tensor, latents: Tensor) -> None:
        over_rows(loops.keep_largest_loop, len(scores), scores, offset, values, latents, least=LEAST_ROWS)

    def keep_largest_ragged(self, scores: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        firsts = torch.cat([room.new_zeros(1), room.cumsum(0)])
        values = scores.new_empty(int(firsts[-1]))
        columns = torch.zeros(len(values), dtype=torch.long)
        over_rows(loops.keep_largest_ragged_loop, len(scores), scores, firsts, values, columns, least=LEAST_ROWS)
        return values, columns

    def above(self, scores: Tensor, cut: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.empty(len(scores), dtype=torch.long)
        over_rows(loops.count_above_loop, len(scores), scores, cut, counts, least=LEAST_ROWS)
        ends = counts.cumsum(0)
        values = scores.new_empty(int(ends[-1]) if len(ends) else 0)
        latents = torch.empty(len(values), dtype=torch.long)
        over_rows(loops.collect_above_loop, len(scores), scores, cut, offset, ends, values, latents, least=LEAST_ROWS)
        return counts, values, latents

    def quantize(self, rows: Tensor, levels: int, least: float) -> tuple[Tensor, Tensor]:
        out, scale = torch.empty(rows.shape, dtype=torch.int8), rows.new_empty(len(rows))
        over_rows(loops.quantize_loop, len(rows), rows, levels, least, out, scale, least=LEAST_ROWS)
        return out, scale

    def rescale_(self, product: Tensor, scale: Tensor, token_scale: Tensor, shift: Tensor, out: Tensor) -> None:
        over_rows(loops.rescale_loop, len(product), product, scale, token_scale, shift, out, least=LEAST_ROWS)
