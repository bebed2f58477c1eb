"""The kernels on tensors in main memory: what ``backend`` offers there.

``bounds`` are a code's starts with its end; see ``sae.ledger`` for ``ByLatent`` and ``RowGradient``.
"""

import torch
from torch import Tensor

from ..ledger import ByLatent, RowGradient
from . import loops
from .parallel import over_rows

# Beyond so many, finding the smallest of the kept at every change costs more than torch's sorting.
KEPT_MOST = 96
# Rows that are worth a part of their own.
LEAST_ROWS = 32


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


def by_latent(bounds: Tensor, latents: Tensor, n_latents: int) -> ByLatent:
    """The same entries grouped by latent, tokens ascending."""
    firsts = torch.zeros(n_latents + 2, dtype=torch.long)
    tokens, order = torch.empty_like(latents), torch.empty_like(latents)
    loops.transpose(bounds.numpy(), latents.numpy(), firsts.numpy(), tokens.numpy(), order.numpy())
    return ByLatent(firsts[:-1], tokens, order)


def spread(group: ByLatent, values: Tensor, rows: Tensor) -> Tensor:
    """``(n_latents, d)``: per latent, the sum of its tokens' rows weighted by ``values``, which stand in ``group``'s order."""
    out = rows.new_empty(group.firsts.shape[0] - 1, rows.shape[1])
    _run(loops.spread, len(out), group.firsts, group.tokens, values, rows, out)
    return out


def squared_norms(weights: Tensor, unit: bool, gradient: RowGradient) -> Tensor:
    """``(n_latents,)``: squared length of every row of the gradient, where rows are ``unit`` of its tangential part."""
    out = weights.new_empty(weights.shape[0])
    _run(loops.squared_norms, len(out), weights, unit, *gradient.parts(), out)
    return out


def adam_(weights: Tensor, unit: bool, gradient: RowGradient, mean: Tensor, square: Tensor, settings: Tensor) -> None:
    """Adam's step on ``weights`` and its two moments, in place; ``settings`` as ``loops.adam`` has them."""
    _run(loops.adam, weights.shape[0], weights, unit, *gradient.parts(), mean, square, settings)


def keep_largest_(scores: Tensor, offset: int, values: Tensor, latents: Tensor) -> None:
    """Bring the largest scores of a tile whose first latent is ``offset`` into each token's kept ones, in place."""
    _run(loops.keep_largest, len(scores), scores, offset, _lanes(scores, values.shape[1]), values, latents)


def _lanes(scores: Tensor, most: int) -> int:
    """Lanes for the first bound: twice the places, if there are as many columns."""
    lanes = max(64, 1 << (2 * most - 1).bit_length())
    return lanes if lanes <= scores.shape[1] else 0


def _run(kernel, rows: int, *arguments) -> None:  # noqa: ANN001
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    over_rows(kernel, rows, *arrays, least=LEAST_ROWS)
