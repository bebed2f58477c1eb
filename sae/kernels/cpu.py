"""The kernels on tensors in main memory: what ``backend`` offers there.

``bounds`` are a code's starts with its end; see ``sae.sparse_grad`` for ``ByLatent`` and ``RowGrad``.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..sparse_code import ByLatent
from ..sparse_grad import RowGrad
from . import AdamStep
from . import numba_loops as loops
from .parallel import over_rows

# Beyond so many, finding the smallest of the kept at every change costs more than torch's sorting (24,576 latents).
KEPT_MOST = 256
# Rows that are worth a part of their own.
LEAST_ROWS = 32


def are_compiled() -> bool:
    """Whether an earlier process left compiled kernels behind."""
    place = loops.decode.stats.cache_path
    return place is not None and any(Path(place).glob("loops.*.nbi"))


def decode(bounds: Tensor, latents: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
    """``(tokens, d)``: the sum of every token's atoms, weighted by its values."""
    out = atoms.new_empty(bounds.shape[0] - 1, atoms.shape[1])
    _run(loops.decode, len(out), bounds, latents, values, atoms, out)
    return out


def dots(bounds: Tensor, latents: Tensor, left: Tensor, rows: Tensor) -> Tensor:
    """``(nnz,)``: for every entry the product of its token's row of ``left`` with its latent's row."""
    out = rows.new_empty(latents.shape[0])
    _run(loops.dots, bounds.shape[0] - 1, bounds, latents, left, rows, out)
    return out


def group(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where each of ``count`` keys' places begin and end in the second tensor: all places by key, ascending within one."""
    firsts, order = torch.zeros(count + 2, dtype=torch.long), torch.empty_like(keys)
    loops.group(keys.numpy(), firsts.numpy(), order.numpy())
    return firsts[:-1], order


def spread(group: ByLatent, values: Tensor, rows: Tensor) -> Tensor:
    """``(n_latents, d)``: per latent, the sum of its tokens' rows weighted by ``values``, which stand in ``group``'s order."""
    out = rows.new_empty(group.firsts.shape[0] - 1, rows.shape[1])
    _run(loops.spread, len(out), group.firsts, group.tokens, values, rows, out)
    return out


def squared_norms(weights: Tensor, unit: bool, gradient: RowGrad) -> Tensor:
    """``(n_latents,)``: squared length of every row of the gradient, where rows are ``unit`` of its tangential part."""
    out = weights.new_empty(weights.shape[0])
    _run(loops.squared_norms, len(out), weights, unit, *gradient.parts(), out)
    return out


def adam_(weights: Tensor, unit: bool, gradient: RowGrad, mean: Tensor, square: Tensor, factor: Tensor, step: AdamStep) -> None:
    """Adam's step on ``weights`` and its two moments, in place, with the gradient times ``factor``, a scalar."""
    # Numbers in the weights' own precision: with wider ones all arithmetic would be wider.
    numbers = [1 - step.beta1, step.beta2, 1 - step.beta2, step.length, step.root, step.eps]
    settings = torch.cat([factor.to(weights.dtype).reshape(1), torch.tensor(numbers, dtype=weights.dtype)])
    _run(loops.adam, weights.shape[0], weights, unit, *gradient.parts(), mean, square, settings)


def keep_largest_(scores: Tensor, offset: int, values: Tensor, latents: Tensor) -> None:
    """Bring the largest scores of a tile whose first latent is ``offset`` into each token's kept ones, in place."""
    _run(loops.keep_largest, len(scores), scores, offset, _lanes(scores, values.shape[1]), values, latents)


def keep_largest_ragged(scores: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The ``room[i]`` largest scores of every row, one row after the other, and the columns they stand in."""
    firsts = torch.cat([room.new_zeros(1), room.cumsum(0)])
    values = scores.new_empty(int(firsts[-1]))
    columns = torch.zeros(len(values), dtype=torch.long)
    _run(loops.keep_largest_ragged, len(scores), scores, firsts, values, columns)
    return values, columns


def above(scores: Tensor, cut: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """How many scores of each token exceed their latent's ``cut``; these, token by token, and their latents from ``offset``."""
    counts = torch.empty(len(scores), dtype=torch.long)
    _run(loops.count_above, len(scores), scores, cut, counts)
    ends = counts.cumsum(0)
    values = scores.new_empty(int(ends[-1]) if len(ends) else 0)
    latents = torch.empty(len(values), dtype=torch.long)
    _run(loops.collect_above, len(scores), scores, cut, offset, ends, values, latents)
    return counts, values, latents


def quantize(rows: Tensor, levels: int, least: float) -> tuple[Tensor, Tensor]:
    """int8 rows in ``levels`` of their largest entry, and what undoes it, at the ``least`` so much; NaN if one is NaN."""
    out, scale = torch.empty(rows.shape, dtype=torch.int8), rows.new_empty(len(rows))
    _run(loops.quantize, len(rows), rows, levels, least, out, scale)
    return out, scale


def rescale_(product: Tensor, scale: Tensor, token_scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """Write the scores that an integer product of quantised rows stands for, each token's divided by its scale."""
    _run(loops.rescale, len(product), product, scale, token_scale, shift, out)


def _lanes(scores: Tensor, most: int) -> int:
    """Lanes for the first bound: twice the places, if there are as many columns."""
    lanes = max(32, 1 << (2 * most - 1).bit_length())
    return lanes if lanes <= scores.shape[1] else 0


def _run(kernel, rows: int, *arguments) -> None:
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    over_rows(kernel, rows, *arrays, least=LEAST_ROWS)
