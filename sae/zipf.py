"""Zipf-Mandelbrot laws of latent densities, and integer budgets that follow them.

The law gives the latent of rank ``i`` (from 1) a density proportional to ``1 / (i + shift) ** alpha``. Densities of trained
dictionaries follow it except for the rarest latents (Ayonrinde 2024, arXiv:2411.02124).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ALPHAS = (0.3, 2.0)
# Ranks are sampled evenly on a log scale; otherwise the long tail would dominate the fit.
FIT_POINTS = 128
# The rarest latents deviate from the law and are excluded from the fit.
FITTED_SHARE = 0.9
SHIFTS = 32


def zipf(n_latents: int, alpha: float, shift: float) -> Float[Tensor, " n_latents"]:
    """Return the law's densities by rank, most frequent first, summing to 1, in float64; ``alpha = 0`` is uniform."""
    ranks = torch.arange(1, n_latents + 1, dtype=torch.float64)
    weights = (ranks + shift).pow(-alpha)
    return weights / weights.sum()


def fit_zipf(density: Float[Tensor, " n_latents"]) -> tuple[float, float]:
    """Fit ``alpha`` and ``shift`` to measured densities, by least squares on log density over log-spaced ranks.

    Silent latents and the rarest tenth of the others are excluded. ``alpha`` is limited to 0.3 to 2, ``shift`` to 0 to a tenth
    of the number of latents. With fewer than three firing latents the law is uniform: ``(0, 0)``.
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
    """Return integers from 1 to ``most`` that follow ``law`` and add up to ``total`` exactly.

    The law is scaled until its clipped values sum to the total; the remainder from rounding down goes to the largest fractions.

    Raises:
        ValueError: If no such integers exist.
    """
    n = len(law)
    if not n <= total <= n * most:
        raise ValueError(f"budget: expected {n} to {n} x {most} matches for {n} latents, got {total}.")
    law = law.double()
    # If all latents end at the same bound, the search interval must extend beyond it.
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
    """Return a mask of latents that fire less than ``tau`` times the density that the fitted law predicts for their rank.

    With ``absolute`` the comparison uses the law's density at the last rank instead. The law is scaled to the measured
    densities, so that both sum to the same L0. If no latent fires, none is underused.
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
