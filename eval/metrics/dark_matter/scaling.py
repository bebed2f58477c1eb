"""Error norms of one dictionary predicted from those of another: a test of whether both find the same tokens hard.

Source: Engels, Riggs and Tegmark 2024, arXiv:2410.14670, who regress squared norms, with a bias.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .regression import r2

# The authors predict squared norms, whose R2 is dominated by a few tokens with large errors; plain norms are less affected.
POWERS = {"squared_norm": 2, "norm": 1}


class Scaling:
    """Moments of several dictionaries' error norms on the same tokens, kept separately for fitting and scoring."""

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu"):
        self.names = tuple(names)
        columns = 2 * len(self.names) + 1
        self.fitted = {power: torch.zeros(columns, columns, dtype=torch.float64, device=device) for power in POWERS}
        self.scored = {power: torch.zeros_like(products) for power, products in self.fitted.items()}

    def fit(self, errors: Float[Tensor, "tokens m"], nonlinear: Float[Tensor, "tokens m"]) -> None:
        """Add norms of the errors and of their nonlinear parts, one column per dictionary."""
        self._add(self.fitted, errors, nonlinear)

    def score(self, errors: Float[Tensor, "tokens m"], nonlinear: Float[Tensor, "tokens m"]) -> None:
        self._add(self.scored, errors, nonlinear)

    def _add(self, products: dict[str, Tensor], errors: Tensor, nonlinear: Tensor) -> None:
        for name, power in POWERS.items():
            norms = torch.cat([errors.double(), nonlinear.double()], dim=1).pow(power)
            rows = torch.cat([torch.ones_like(norms[:, :1]), norms], dim=1)
            products[name] += rows.T @ rows

    def report(self) -> dict[str, Any]:
        """Return matrices whose entry ``[i][j]`` concerns the norms of dictionary ``j``, predicted from those of ``i``.

        ``r2`` uses the error's norm, ``r2_both`` also the norm of its nonlinear part, and ``gain`` is the fraction of the
        residual variance that the second predictor removes: ``(r2_both - r2) / (1 - r2)``.
        """
        entries: dict[str, Any] = {"scaling_names": list(self.names), "scaling_tokens": self._count(self.scored)}
        for power in POWERS:
            one, both, gain = self._matrices(power)
            entries |= {f"scaling_{power}_r2": one, f"scaling_{power}_r2_both": both, f"scaling_{power}_gain": gain}
        return entries

    def _count(self, products: dict[str, Tensor]) -> int:
        return int(products["norm"][0, 0])

    def _matrices(self, power: str) -> tuple[list[list[float | None]], ...]:
        m = len(self.names)
        found: tuple[list[list[float | None]], ...] = ([], [], [])
        for i in range(m):
            rows: list[list[float | None]] = [[], [], []]
            for j in range(m):
                one, both = self._r2(power, [0, 1 + i], 1 + j), self._r2(power, [0, 1 + i, 1 + m + i], 1 + j)
                gain = None
                # A dictionary predicts itself exactly, which leaves no residual to remove.
                if one is not None and both is not None and i != j and one < 1:
                    gain = (both - one) / (1 - one)
                for row, value in zip(rows, (one, both, gain), strict=True):
                    row.append(value)
            for matrix, row in zip(found, rows, strict=True):
                matrix.append(row)
        return found

    def _r2(self, power: str, inputs: list[int], target: int) -> float | None:
        fitted, scored = self.fitted[power], self.scored[power]
        if fitted[0, 0] <= len(inputs) or scored[0, 0] < 2:
            return None
        # Normalize the columns: some models' norms are in the thousands, and the constant is one.
        scale = fitted.diagonal()[inputs].sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        normal = fitted[inputs][:, inputs] / scale[:, None] / scale
        coefficients = (torch.linalg.pinv(normal, hermitian=True) @ (fitted[inputs, target] / scale)) / scale
        squares = scored[target, target]
        left = squares - 2 * coefficients @ scored[inputs, target] + coefficients @ scored[inputs][:, inputs] @ coefficients
        deviation = squares - scored[0, target] ** 2 / scored[0, 0]
        # A deviation this small relative to the sums is rounding error.
        return r2(max(float(left), 0.0), float(deviation)) if deviation > 1e-12 * squares else None
