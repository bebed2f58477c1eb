"""The error a dictionary leaves, split into what is linear in the activation it reads and what is not.

With ``e = y - y_hat``, a linear map of ``x`` is fitted to ``e`` on one set of documents and scored on another. Source: Engels,
Riggs and Tegmark 2024, arXiv:2410.14670. Least squares run on float64 moments, so nothing is stored per token.

A low ``fvu_nonlinear`` alone is no merit: an empty dictionary has none, its error being all linear. Read it beside
``fvu_total``.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.metrics import Moments

# Below this many tokens per regressor, the held-out score is visibly worse than the map could be.
TOKENS_PER_COLUMN = 10
RIDGE = 1e-6


class LinearFit:
    """Least squares of error vectors and squared error norms on activations, with a bias, from running moments."""

    def __init__(self, d_in: int, d_out: int, device: torch.device | str = "cpu"):
        self.inputs = torch.zeros(d_in + 1, d_in + 1, dtype=torch.float64, device=device)
        self.outputs = torch.zeros(d_in + 1, d_out + 1, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Float[Tensor, "tokens d_in"], error: Float[Tensor, "tokens d_out"]) -> None:
        x, targets = _with_ones(x), _with_norms(error)
        self.inputs += x.T @ x
        self.outputs += x.T @ targets
        self.tokens += x.shape[0]

    def solve(self) -> Float[Tensor, "columns targets"]:
        """The regression's coefficients: one column per error dimension, and the last for the squared norm."""
        d = self.inputs.shape[0]
        # A ridge of a millionth of the mean eigenvalue only decides directions in which the activations do not vary.
        ridge = RIDGE * self.inputs.diagonal().mean() * torch.eye(d, dtype=torch.float64, device=self.inputs.device)
        return torch.linalg.solve(self.inputs + ridge, self.outputs)


class DarkMatter:
    """Scores a fitted map on other documents."""

    def __init__(self, fit: LinearFit):
        self.fit = fit
        self.coefficients = fit.solve()
        d_out = fit.outputs.shape[1] - 1
        device = fit.outputs.device
        self.y = Moments(d_out, device)
        self.error = Moments(d_out, device)
        self.norm = Moments(1, device)
        # Per dimension, and for the squared norm: residuals of the regression.
        self.residual = torch.zeros(d_out + 1, dtype=torch.float64, device=device)
        self.squared_error = 0.0
        self.products = torch.zeros(3, dtype=torch.float64, device=device)

    def update(
        self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"]
    ) -> None:
        y, y_hat = y.double(), y_hat.double()
        targets = _with_norms(y - y_hat)
        self.residual += (targets - _with_ones(x) @ self.coefficients).pow(2).sum(0)
        self.y.update(y)
        self.error.update(targets[:, :-1])
        self.norm.update(targets[:, -1:])
        self.squared_error += float(targets[:, -1].sum())
        self.products += torch.stack([(y * y_hat).sum(), y_hat.pow(2).sum(), y.pow(2).sum()])

    def report(self) -> dict[str, Any]:
        """Flat entries; an entry that the data cannot define is ``None``."""
        total = float(self.y.squared_deviation())
        nonlinear = float(self.residual[:-1].sum())
        per_dimension = 1 - self.residual[:-1] / self.error.deviation
        norm_spread = float(self.norm.squared_deviation())
        dot, squared, energy = self.products.tolist()
        # The best single factor on x_hat takes out shrinkage, which is linear error of the plainest kind.
        rescaled = energy - dot**2 / squared if squared > 0 else energy
        columns = self.fit.inputs.shape[0]
        return {
            "fvu_total": _ratio(self.squared_error, total),
            "fvu_nonlinear": _ratio(nonlinear, total),
            "linear_error_share": None if self.squared_error == 0 else 1 - nonlinear / self.squared_error,
            "fvu_rescaled": _ratio(rescaled, total),
            "err_vec_r2_mean_dim": float(per_dimension.mean()) if bool(torch.isfinite(per_dimension).all()) else None,
            "err_norm_r2": None if norm_spread == 0 else 1 - float(self.residual[-1]) / norm_spread,
            # What an error unrelated to x would score: below 0, because the map fits noise.
            "dark_matter_noise_floor": -columns / self.fit.tokens,
            "dark_matter_fit_tokens": self.fit.tokens,
            "dark_matter_score_tokens": self.y.count,
            "dark_matter_enough_tokens": self.fit.tokens >= TOKENS_PER_COLUMN * columns,
        }


class AffineFloor:
    """``fvu_affine``: of the best affine map ``y ~ A x + b``, fitted on some documents and scored on others.

    What a transcoder achieves is to be read beside it: a linear map alone often explains much of an MLP.
    """

    def __init__(self, fit: LinearFit):
        # An error that is the whole target: what the regression leaves of it is what no affine map explains.
        self.score = DarkMatter(fit)

    def update(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        self.score.update(x, y, torch.zeros_like(y))

    def report(self) -> dict[str, Any]:
        return {"fvu_affine": self.score.report()["fvu_nonlinear"]}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(x.shape[0], 1, dtype=torch.float64, device=x.device)], dim=1)


def _with_norms(error: Tensor) -> Tensor:
    error = error.double()
    return torch.cat([error, error.pow(2).sum(-1, keepdim=True)], dim=1)
