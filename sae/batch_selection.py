"""Selection of the (token, latent) pairs that a batch-wide budget keeps.

A cell is the index of a pair in the flattened ``(tokens, n_latents)`` matrix. No function here carries gradients.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .kernels import selection

# A prime, so that sampled cells cover every latent and every token.
SAMPLE_STRIDE = 61
# Factor by which a sampled cut aims above the budget, so that it rarely passes too few scores.
SLACK = 1.25


@torch.no_grad()
def smallest_of_largest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """Return the ``k``-th largest value, or NaN if there is a NaN; ``k`` is at least 1."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        # A tenth of the time of torch's selection, which also runs on one thread.
        largest = np.partition(values.numpy(), len(values) - k)[len(values) - k :]
        return torch.from_numpy(largest).amin()
    return values.topk(k, sorted=False).values.amin()


@torch.no_grad()
def largest_cells(scores: Float[Tensor, "tokens n_latents"], budget: int) -> Int[Tensor, " budget"]:
    """Return the cells of the ``budget`` largest scores, ascending: an exact count, with ties going to lower cells.

    A cut estimated from sampled cells leaves few candidates, which are ranked exactly; if the sample was misleading and too few
    are left, all cells are ranked.
    """
    flat = scores.reshape(-1)
    budget = min(budget, flat.numel())
    cells = torch.empty(0, dtype=torch.long, device=flat.device)
    sampled = flat[::SAMPLE_STRIDE]
    rank = int(budget / SAMPLE_STRIDE * SLACK) + 8
    if rank < sampled.numel():
        cells = (flat >= sampled.topk(rank, sorted=False).values.amin()).nonzero().squeeze(-1)
    if cells.numel() < budget:
        cells = torch.arange(flat.numel(), device=flat.device)
    candidates = flat[cells]
    if budget == 0 or cells.numel() == budget:
        return cells[:budget]
    smallest = smallest_of_largest(candidates, budget)
    above, equal = candidates > smallest, candidates == smallest
    spare = budget - above.sum()
    return cells[above | (equal & (equal.cumsum(0) <= spare))]


@torch.no_grad()
def largest_columns(
    scores: Float[Tensor, "rows columns"], room: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """Return every row's ``room[i]`` largest scores, row after row, and their columns. No room exceeds the column count."""
    kernels = selection(scores)
    return _ranked_columns(scores, room) if kernels is None else kernels.keep_largest_ragged(scores, room)


def _ranked_columns(
    scores: Float[Tensor, "rows columns"], room: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """Compute ``largest_columns`` by sorting in torch."""
    order = room.argsort(descending=True, stable=True)
    ranked = room[order]
    firsts = room.cumsum(0) - room
    total = int(room.sum())
    values, columns = scores.new_empty(total), torch.empty(total, dtype=torch.long, device=scores.device)
    first, remaining = 0, int((ranked > 0).sum())
    while first < remaining:
        # Rows whose rooms are within a factor of two are ranked together, so that little of the ranking is discarded.
        most = int(ranked[first])
        last = int((ranked[:remaining] * 2 > most).sum())
        chosen = order[first:last]
        best = scores[chosen].topk(most, dim=-1)
        within = torch.arange(most, device=scores.device)
        kept = within < ranked[first:last, None]
        places = (firsts[chosen, None] + within)[kept]
        values[places], columns[places] = best.values[kept], best.indices[kept]
        first = last
    return values, columns


def between(sorted_scores: Float[Tensor, " n"], rank: int) -> float:
    """Return a threshold that exactly ``rank`` of the descending scores exceed, unless they tie there; never below 0."""
    if rank <= 0:
        return max(0.0, float(sorted_scores[0])) if len(sorted_scores) else 0.0
    if rank >= len(sorted_scores):
        return 0.0
    return max(0.0, float((sorted_scores[rank - 1] + sorted_scores[rank]) / 2))
