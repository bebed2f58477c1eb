"""Least squares from running float64 moments: nothing is stored per token, and batch boundaries do not matter."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

# With fewer tokens per regressor, overfitting visibly lowers the held-out score.
TOKENS_PER_COLUMN = 10
# A millionth of the mean eigenvalue only affects directions in which the inputs do not vary.
RIDGE = 1e-6
FOLDS = 5
# Grid for a search over ridges, from nearly none to one that nearly suppresses the map.
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Regression:
    """Moments of inputs and targets, sufficient to fit a linear map and to score any other.

    With ``bias`` the last coefficient belongs to a constant input, which the ridge does not shrink.
    """

    def __init__(self, n_inputs: int, n_targets: int, device: torch.device | str = "cpu", bias: bool = True):
        self.bias, self.columns, self.tokens = bias, n_inputs + bias, 0
        self.inputs = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=device)
        self.outputs = torch.zeros(self.columns, n_targets, dtype=torch.float64, device=device)
        self.sums = torch.zeros(n_targets, dtype=torch.float64, device=device)
        self.squares = torch.zeros(n_targets, dtype=torch.float64, device=device)

    def update(self, inputs: Float[Tensor, "tokens n_inputs"], targets: Float[Tensor, "tokens n_targets"]) -> None:
        rows, targets = self.rows(inputs), targets.double()
        self.inputs += rows.T @ rows
        self.outputs += rows.T @ targets
        self.sums += targets.sum(0)
        self.squares += targets.pow(2).sum(0)
        self.tokens += rows.shape[0]

    def rows(self, inputs: Float[Tensor, "tokens n_inputs"]) -> Float[Tensor, "tokens columns"]:
        """Return the design matrix: the inputs, with a column of ones if there is a bias."""
        return with_ones(inputs) if self.bias else inputs.double()

    def joined(self, others: Sequence["Regression"]) -> "Regression":
        """Return a regression with the moments of all tokens combined."""
        whole = Regression(self.columns - self.bias, self.outputs.shape[1], self.outputs.device, self.bias)
        for one in (self, *others):
            for name in ("inputs", "outputs", "sums", "squares", "tokens"):
                setattr(whole, name, getattr(whole, name) + getattr(one, name))
        return whole

    def solve(self, ridge: float = RIDGE) -> Float[Tensor, "columns n_targets"]:
        """Return the coefficients; ``ridge`` is in units of the inputs' mean square. At 0, the minimum-norm solution."""
        if ridge == 0:
            return torch.linalg.pinv(self.inputs, hermitian=True) @ self.outputs
        n_inputs = self.columns - self.bias
        diagonal = torch.zeros(self.columns, dtype=torch.float64, device=self.inputs.device)
        # Without tokens, or with all-zero inputs, every map fits equally well: the clamp selects the zero map.
        diagonal[:n_inputs] = ridge * max(float(self.inputs.diagonal()[:n_inputs].mean()), torch.finfo(torch.float64).tiny)
        if self.bias and self.tokens == 0:
            diagonal[-1] = 1.0
        return torch.linalg.solve(self.inputs + torch.diag(diagonal), self.outputs)

    def squared_residual(self, coefficients: Float[Tensor, "columns n_targets"]) -> Float[Tensor, " n_targets"]:
        """Return a map's squared residual on these tokens, summed over tokens; it may have been fitted on others."""
        cross = (coefficients * self.outputs).sum(0)
        return (self.squares - 2 * cross + (coefficients * (self.inputs @ coefficients)).sum(0)).clamp_min(0)

    def deviation(self) -> Float[Tensor, " n_targets"]:
        """Return the squared deviation of the targets from their mean, summed over tokens."""
        return (self.squares - self.sums.pow(2) / max(self.tokens, 1)).clamp_min(0)

    def noise_floor(self) -> float | None:
        """Return the approximate held-out R2 of a target unrelated to the inputs: below 0, because the map fits noise."""
        return -self.columns / self.tokens if self.tokens else None


class FoldedRegression:
    """Regression whose moments are kept in folds of documents, so that the ridge can be cross-validated."""

    def __init__(
        self, n_inputs: int, n_targets: int, device: torch.device | str = "cpu", bias: bool = True, folds: int = FOLDS
    ):
        self.parts = [Regression(n_inputs, n_targets, device, bias) for _ in range(folds)]

    def update(
        self,
        inputs: Float[Tensor, "tokens n_inputs"],
        targets: Float[Tensor, "tokens n_targets"],
        documents: Int[Tensor, " tokens"],
    ) -> None:
        fold = documents % len(self.parts)
        for number, part in enumerate(self.parts):
            rows = fold == number
            part.update(inputs[rows], targets[rows])

    def whole(self) -> Regression:
        return self.parts[0].joined(self.parts[1:])

    def best_ridge(self, ridges: Sequence[float], targets: slice) -> float:
        """Return the ridge with the smallest cross-validated residual for these targets.

        Raises:
            ValueError: If fewer than two folds have tokens.
        """
        filled = [part for part in self.parts if part.tokens]
        if len(filled) < 2:
            raise ValueError(
                "ridge: expected several documents for cross-validation, got one, or numbers that agree modulo "
                f"{len(self.parts)}. Give one ridge, or more documents."
            )
        left = dict.fromkeys(ridges, 0.0)
        for part in filled:
            others = [other for other in filled if other is not part]
            rest = others[0].joined(others[1:])
            for ridge in ridges:
                left[ridge] += float(part.squared_residual(rest.solve(ridge))[targets].sum())
        return min(ridges, key=lambda ridge: left[ridge])


def needed_tokens(columns: int) -> int:
    """Return the number of tokens needed to fit a map with this many coefficients per target."""
    return TOKENS_PER_COLUMN * columns


def r2(residual: float, deviation: float) -> float | None:
    """Return the R2, or ``None`` if the target does not vary."""
    return 1 - residual / deviation if deviation > 0 else None


def with_ones(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens columns"]:
    return torch.cat([x.double(), torch.ones(x.shape[0], 1, dtype=torch.float64, device=x.device)], dim=1)
