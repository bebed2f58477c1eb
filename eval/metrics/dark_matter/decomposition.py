"""Decomposition of the reconstruction error into parts linear and nonlinear in the dictionary's input.

A linear map from ``x`` to the error ``e = y - y_hat`` is fitted on one set of documents and scored on another. Source: Engels,
Riggs and Tegmark 2024, arXiv:2410.14670. Least squares run on float64 moments, so nothing is stored per token.

A low ``fvu_nonlinear`` alone is no merit: an empty dictionary has none, because its error is all linear. Read it together with
``fvu_total``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ....sae.metrics import Moments
from .regression import RIDGE, TOKENS_PER_COLUMN, FoldedRegression, Regression, needed_tokens, r2

# A dictionary is dead if its reconstruction varies less than this, relative to the target.
DEAD_VARIANCE = 1e-9
# Entries that are undefined if the map was fitted on too few tokens.
REGRESSED = (
    "fvu_nonlinear",
    "linear_error_share",
    "linear_error_share_rescaled",
    "err_vec_r2",
    "err_vec_r2_mean_dim",
    "err_norm_r2",
)


@dataclass(frozen=True)
class FitOptions:
    """Settings of the linear fit. A ridge is in units of the activation's mean square.

    Given several ridges, cross-validation over documents chooses one for the error vector and one for its norm.
    """

    bias: bool = True
    ridge: float | Sequence[float] = RIDGE

    def __post_init__(self) -> None:
        ridges = [self.ridge] if isinstance(self.ridge, int | float) else list(self.ridge)
        if not ridges or any(not 0 <= ridge < float("inf") for ridge in ridges):
            raise ValueError(f"ridge: expected a number of at least 0, or a list of them, got {self.ridge!r}.")


USUAL = FitOptions()


class LinearFit:
    """Least squares of error vectors and squared error norms on activations, from running moments."""

    def __init__(self, d_in: int, d_out: int, device: torch.device | str = "cpu", options: FitOptions = USUAL):
        self.options = options
        folds = 1 if isinstance(options.ridge, int | float) else 5
        self.folds = FoldedRegression(d_in, d_out + 1, device, options.bias, folds)
        self.d_out, self.device = d_out, torch.device(device)
        self.columns = self.folds.parts[0].columns

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.folds.parts)

    def update(
        self,
        x: Float[Tensor, "tokens d_in"],
        error: Float[Tensor, "tokens d_out"],
        documents: Int[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add a batch. ``documents``, the document index of each token, is needed only to choose among ridges."""
        if documents is None:
            if len(self.folds.parts) > 1:
                raise ValueError(
                    "ridge: expected documents for cross-validation among several ridges, got none. Give one ridge."
                )
            documents = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        self.folds.update(x, _with_norms(error), documents)

    def rows(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens columns"]:
        """Return the regression's design matrix for a batch of activations."""
        return self.folds.parts[0].rows(x)

    def ridges(self) -> tuple[float, float]:
        """Return the ridge used for the error vector and the one used for its norm."""
        if isinstance(self.options.ridge, int | float):
            return self.options.ridge, self.options.ridge
        vector, norm = slice(0, self.d_out), slice(self.d_out, None)
        return self.folds.best_ridge(self.options.ridge, vector), self.folds.best_ridge(self.options.ridge, norm)

    def solve(self) -> Float[Tensor, "columns targets"]:
        """Return the regression coefficients: one column per error dimension, and a last one for the squared norm."""
        whole, (vector, norm) = self.folds.whole(), self.ridges()
        coefficients = whole.solve(vector)
        return coefficients if vector == norm else torch.cat([coefficients[:, :-1], whole.solve(norm)[:, -1:]], dim=1)


class DarkMatter:
    """Scores of a fitted linear map on other documents.

    ``on_target`` states that the map's input is the reconstruction target itself, as for an SAE.
    """

    def __init__(self, fit: LinearFit, on_target: bool = False):
        self.fit, self.on_target = fit, on_target
        self.coefficients = fit.solve()
        d_out, device = fit.d_out, fit.device
        self.y, self.y_hat = Moments(d_out, device), Moments(d_out, device)
        self.error = Moments(d_out, device)
        self.norm = Moments(1, device)
        # Squared residuals of the regression, per dimension and (last) for the squared norm.
        self.residual = torch.zeros(d_out + 1, dtype=torch.float64, device=device)
        self.squared_error = 0.0
        self.products = torch.zeros(3, dtype=torch.float64, device=device)

    def update(
        self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"]
    ) -> None:
        y, y_hat = y.double(), y_hat.double()
        targets = _with_norms(y - y_hat)
        self.residual += (targets - self.fit.rows(x) @ self.coefficients).pow(2).sum(0)
        self.y.update(y)
        self.y_hat.update(y_hat)
        self.error.update(targets[:, :-1])
        self.norm.update(targets[:, -1:])
        self.squared_error += float(targets[:, -1].sum())
        self.products += torch.stack([(y * y_hat).sum(), y_hat.pow(2).sum(), y.pow(2).sum()])

    def linear_error(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """Return the linear part of the error, predicted from activations in float64; the rest is the nonlinear error."""
        return self.fit.rows(x) @ self.coefficients[:, :-1]

    def report(self) -> dict[str, Any]:
        """Return flat entries; undefined ones are ``None``, and ``dark_matter_notes`` gives the reason."""
        total = float(self.y.squared_deviation())
        nonlinear = float(self.residual[:-1].sum())
        norm_spread = float(self.norm.squared_deviation())
        dot, squared, energy = self.products.tolist()
        # The best scalar factor on y_hat removes shrinkage, the simplest linear error.
        factor = dot / squared if squared > 0 else None
        rescaled = energy - dot * factor if factor is not None else energy
        columns, tokens = self.fit.columns, self.fit.tokens
        per_dimension = 1 - self.residual[:-1] / self.error.deviation
        entries: dict[str, Any] = {
            "fvu_total": _ratio(self.squared_error, total),
            "fvu_nonlinear": _ratio(nonlinear, total),
            "linear_error_share": None if self.squared_error == 0 else 1 - nonlinear / self.squared_error,
            "fvu_rescaled": _ratio(rescaled, total),
            # Rescaling y_hat multiplies the nonlinear error by factor²; the rest is a multiple of y, hence linear.
            "linear_error_share_rescaled": None
            if factor is None or rescaled <= 0 or not self.on_target
            else 1 - factor**2 * nonlinear / rescaled,
            "best_factor": factor,
            "reconstruction_variance": _ratio(float(self.y_hat.squared_deviation()), total),
            "err_vec_r2": r2(nonlinear, float(self.error.squared_deviation())),
            "err_vec_r2_mean_dim": float(per_dimension.mean()) if bool(torch.isfinite(per_dimension).all()) else None,
            "err_norm_r2": r2(float(self.residual[-1]), norm_spread),
            # Expected R2 of an error unrelated to x: below 0, because the map fits noise.
            "dark_matter_noise_floor": -columns / tokens if tokens else None,
            "dark_matter_fit_tokens": tokens,
            "dark_matter_score_tokens": self.y.count,
            "dark_matter_enough_tokens": tokens >= needed_tokens(columns),
            "dark_matter_needed_tokens": needed_tokens(columns),
            "dark_matter_bias": self.fit.options.bias,
            "dark_matter_ridge": self.fit.ridges()[0],
        }
        if not self.on_target:
            del entries["linear_error_share_rescaled"]
        # With at least as many coefficients as tokens, the map interpolates any error, so its scores mean nothing.
        if tokens <= columns:
            entries |= dict.fromkeys((key for key in REGRESSED if key in entries), None)
        return entries | {"dark_matter_notes": self._notes(entries, total)}

    def _notes(self, entries: dict[str, Any], total: float) -> list[str]:
        """Return reasons for undefined entries, and warnings about misleading ones."""
        columns, tokens = self.fit.columns, self.fit.tokens
        notes = []
        if tokens < needed_tokens(columns):
            undefined = ", so that nothing can be said of it" if tokens <= columns else ": the linear share is understated"
            notes.append(
                f"The map has {columns} coefficients per dimension and was fitted on {tokens} tokens{undefined}. Give at "
                f"least {needed_tokens(columns)} to fit on ({TOKENS_PER_COLUMN} per coefficient), or choose among ridges."
            )
        if self.y.count == 0:
            notes.append("No token was left to score: the documents that fit the map hold all there are.")
        elif total == 0:
            notes.append("The target does not vary, so that no share of its variance is defined.")
        elif self.squared_error == 0:
            notes.append("There is no error to split.")
        elif (entries["reconstruction_variance"] or 0.0) < DEAD_VARIANCE:
            notes.append(
                "The reconstruction is the same on every token: a dead dictionary. Its error is the activation itself, all "
                "linear, and its nonlinear error is none by construction."
            )
        if self.squared_error > 0 and entries["err_vec_r2_mean_dim"] is None and tokens > columns:
            notes.append("err_vec_r2_mean_dim: the error does not vary in some dimension.")
        return notes


class AffineFloor:
    """FVU of the best affine map ``y ~ A x + b``, fitted on some documents and scored on others (``fvu_affine``).

    A transcoder should be compared with it, since an affine map alone often explains much of an MLP.
    """

    def __init__(self, fit: LinearFit):
        # With y_hat = 0 the error is the whole target, and its nonlinear part is the residual of the best affine map.
        self.score = DarkMatter(fit)

    def update(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        self.score.update(x, y, torch.zeros_like(y))

    def report(self) -> dict[str, Any]:
        return {"fvu_affine": self.score.report()["fvu_nonlinear"]}


class AuthorsSplit:
    """Error decomposition as computed by the authors' scripts, reported under separate names.

    The map is fitted on a random subset of the tokens, regardless of documents, without bias or ridge; R2 of the vector is the
    unweighted mean over dimensions; and fvu covers all tokens, including the ones used to fit the map. The subset depends
    only on a token's position in the stream. To follow the authors further, pass the first 1,024 tokens of 300 documents of at
    least that length, without positions 0 to 199 and the last.
    """

    # 150,000 of 246,900 tokens.
    FIT_SHARE = 150_000 / 246_900

    def __init__(self, d_in: int, d_out: int, device: torch.device | str = "cpu", seed: int = 0):
        self.fit, self.rest = (Regression(d_in, d_out + 1, device, bias=False) for _ in range(2))
        self.y = Moments(d_out, device)
        # NumPy's draws do not depend on the batch size.
        self.random = np.random.default_rng(seed)

    def update(
        self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"]
    ) -> None:
        fits = torch.from_numpy(self.random.random(x.shape[0]) < self.FIT_SHARE).to(x.device)
        targets = _with_norms(y.double() - y_hat.double())
        self.fit.update(x[fits], targets[fits])
        self.rest.update(x[~fits], targets[~fits])
        self.y.update(y)

    def report(self) -> dict[str, Any]:
        """Return flat entries, ``None`` if there were too few tokens."""
        if self.fit.tokens <= self.fit.columns or self.rest.tokens == 0:
            return dict.fromkeys(
                f"authors_{key}" for key in ("fvu_total", "fvu_nonlinear", "err_vec_r2_mean_dim", "err_norm_r2")
            )
        coefficients, total = self.fit.solve(0.0), float(self.y.squared_deviation())
        held_out = self.rest.squared_residual(coefficients)
        everywhere = held_out + self.fit.squared_residual(coefficients)
        per_dimension = 1 - held_out / self.rest.deviation()
        energy = self.fit.squares + self.rest.squares
        return {
            "authors_fvu_total": _ratio(float(energy[:-1].sum()), total),
            "authors_fvu_nonlinear": _ratio(float(everywhere[:-1].sum()), total),
            "authors_err_vec_r2_mean_dim": float(per_dimension[:-1].mean())
            if bool(torch.isfinite(per_dimension[:-1]).all())
            else None,
            "authors_err_norm_r2": r2(float(held_out[-1]), float(self.rest.deviation()[-1])),
        }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _with_norms(error: Tensor) -> Tensor:
    error = error.double()
    return torch.cat([error, error.pow(2).sum(-1, keepdim=True)], dim=1)
