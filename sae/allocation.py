"""Spending a budget of matches over a whole batch: which (token, latent) pairs are kept.

A cell is the number of a pair in the ``(tokens, n_latents)`` matrix, counted row by row. Nothing here carries gradient.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A prime, so that the sampled cells visit every latent and every token.
SAMPLE_STRIDE = 61
# How much of the budget the sampled cut should let through, so that it seldom lets through too little.
SLACK = 1.25


@torch.no_grad()
def largest_cells(scores: Float[Tensor, "tokens n_latents"], budget: int) -> Int[Tensor, " budget"]:
    """The ``budget`` cells with the largest scores, ascending. The count is exact; among equal scores lower cells win.

    A cut estimated from a sample of the cells leaves few candidates, which are then ranked exactly; if the sample misled
    and too few are left, all cells are ranked.
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
    smallest = candidates.topk(budget, sorted=False).values.amin()
    above, equal = candidates > smallest, candidates == smallest
    spare = budget - above.sum()
    return cells[above | (equal & (equal.cumsum(0) <= spare))]


@torch.no_grad()
def largest_cells_per_latent(
    scores: Float[Tensor, "tokens n_latents"], budgets: Int[Tensor, " n_latents"]
) -> tuple[Int[Tensor, " nnz"], Float[Tensor, " n_latents"]]:
    """Each latent's ``budgets[i]`` cells with the largest scores, ascending, and the smallest score each latent kept.

    A budget above the number of tokens keeps every token; a latent without budget keeps none and has an infinite smallest
    score.
    """
    tokens, n_latents = scores.shape
    smallest = scores.new_full((n_latents,), float("inf"))
    cells: list[Tensor] = []
    by_latent = scores.T.contiguous()
    order = budgets.clamp(max=tokens).argsort(descending=True, stable=True)
    ranked = budgets.clamp(max=tokens)[order]
    first, remaining = 0, int((ranked > 0).sum())
    while first < remaining:
        # Latents whose budgets are within a factor of two are ranked together, so little of the ranking is thrown away.
        most = int(ranked[first])
        last = int((ranked[:remaining] * 2 > most).sum())
        chosen = order[first:last]
        best = by_latent[chosen].topk(most, dim=-1)
        kept = torch.arange(most, device=scores.device) < ranked[first:last, None]
        cells.append((best.indices * n_latents + chosen[:, None])[kept])
        smallest[chosen] = best.values.gather(1, ranked[first:last, None] - 1).squeeze(1)
        first = last
    found = torch.cat(cells) if cells else torch.empty(0, dtype=torch.long, device=scores.device)
    return found.sort().values, smallest


def between(sorted_scores: Float[Tensor, " n"], rank: int) -> float:
    """A threshold that exactly ``rank`` of the descending scores exceed, if they differ there; never below 0."""
    if rank <= 0:
        return max(0.0, float(sorted_scores[0])) if len(sorted_scores) else 0.0
    if rank >= len(sorted_scores):
        return 0.0
    return max(0.0, float((sorted_scores[rank - 1] + sorted_scores[rank]) / 2))
