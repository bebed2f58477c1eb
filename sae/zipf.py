"""How often each latent may fire: Zipf-Mandelbrot laws of density, and integer budgets that follow them.

The law gives the latent of rank ``i`` (from 1) a density proportional to ``1 / (i + shift) ** alpha``. Densities of trained
dictionaries follow it except at their rarest end (Ayonrinde 2024, arXiv:2411.02124).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ALPHAS = (0.3, 2.0)
# Ranks are sampled evenly in their logarithm, or the long tail would be all that is fitted.
FIT_POINTS = 128
# The rarest latents depart from the law and are left out of the fit.
FITTED_SHARE = 0.9
SHIFTS = 32


def zipf(n_latents: int, alpha: float, shift: float) -> Float[Tensor, " n_latents"]:
    """The law's densities by rank, most frequent first, adding up to 1; ``alpha = 0`` is uniform. float64."""
    ranks = torch.arange(1, n_latents + 1, dtype=torch.float64)
    weights = (ranks + shift).pow(-alpha)
    return weights / weights.sum()


def fit_zipf(density: Float[Tensor, " n_latents"]) -> tuple[float, float]:
    """``alpha`` and ``shift`` of measured densities, by least squares on log density over log-spaced ranks.

    Silent latents and the rarest tenth of the others are left out. ``alpha`` is kept within 0.3 to 2, ``shift`` within 0
    and a tenth of the latents. With fewer than three latents to go by the law is uniform: ``(0, 0)``.
    """
    alive = density[density > 0].double().cpu().sort(descending=True).values
    alive = alive[: max(int(len(alive) * FITTED_SHARE), min(len(alive), 3))]
    if len(alive) < 3:
        return 0.0, 0.0
    picks = torch.logspace(0, torch.log10(torch.tensor(float(len(alive)))).item(), FIT_POINTS, dtype=torch.float64)
    ranks = picks.round().long().clamp(1, len(alive)).unique()
    target = alive[ranks - 1].log()
    largest = max(len(density) / 10, 1e-3)
    shifts = torch.cat([torch.zeros(1), torch.logspace(-1, 0, SHIFTS) * largest, torch.logspace(-3, -1, SHIFTS) * largest])
    x = (ranks[None, :] + shifts.double()[:, None]).log()
    dx, dy = x - x.mean(1, keepdim=True), target - target.mean()
    alphas = (-(dx * dy).sum(1) / dx.pow(2).sum(1)).clamp(*ALPHAS)
    errors = (dy + alphas[:, None] * dx).pow(2).sum(1)
    best = int(errors.argmin())
    return float(alphas[best]), float(shifts[best])


def integer_budgets(law: Float[Tensor, " n_latents"], total: int, most: int) -> Int[Tensor, " n_latents"]:
    """Whole numbers from 1 to ``most`` that follow ``law`` and add up to ``total`` exactly.

    The law is scaled until its clipped values reach the total; what rounding down leaves goes to the largest remainders.

    Raises:
        ValueError: If no such numbers exist.
    """
    n = len(law)
    if not n <= total <= n * most:
        raise ValueError(f"budget: expected {n} to {n} x {most} matches for {n} latents, got {total}.")
    law = law.double()
    # The answer may be that every latent has the same bound; both ends of the search must reach past that.
    low, high = 0.0, most / float(law.min())
    for _ in range(200):
        scale = (low + high) / 2
        low, high = (scale, high) if float((scale * law).clamp(1, most).sum()) < total else (low, scale)
    wanted = (high * law).clamp(1, most)
    budgets = wanted.floor().long()
    spare = total - int(budgets.sum())
    step = 1 if spare > 0 else -1
    remainder = wanted - budgets
    while spare:
        room = budgets < most if step > 0 else budgets > 1
        ranked = torch.where(room, remainder * step, -torch.inf).argsort(descending=True, stable=True)
        chosen = ranked[: min(abs(spare), int(room.sum()))]
        budgets[chosen] += step
        remainder[chosen] -= step
        spare = total - int(budgets.sum())
    return budgets


def underused(density: Float[Tensor, " n_latents"], tau: float, absolute: bool = False) -> Bool[Tensor, " n_latents"]:
    """Latents that fire less than ``tau`` times what the fitted law expects of their rank.

    ``absolute`` compares with what the law expects of the last rank instead. The law is scaled to the measured densities,
    so that both add up to the same l0. Without any firing no latent is called underused.
    """
    total = float(density.sum())
    if tau == 0 or total == 0:
        return torch.zeros_like(density, dtype=torch.bool)
    expected = (zipf(len(density), *fit_zipf(density)) * total).to(density)
    if absolute:
        return density < tau * expected[-1]
    below = torch.empty_like(density, dtype=torch.bool)
    order = density.argsort(descending=True, stable=True)
    below[order] = density[order] < tau * expected
    return below
