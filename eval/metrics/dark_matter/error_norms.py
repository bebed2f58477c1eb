"""R2 of per-token squared norms (of the error and of other vectors), predicted from the activation and from simpler inputs.

A linear map of the activation that predicts the error's norm says little by itself: such a map also predicts the activation's
own norm, and the token's identity or the dictionary's l0 may predict the error's norm too. Source: Engels, Riggs and Tegmark
2024, arXiv:2410.14670, whose token predictor is scored on the tokens it was fitted on; here it is scored on held-out tokens,
and theirs is reported as ``_in_sample``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ....sae.metrics import Moments
from .regression import RIDGE, Regression, r2


class TokenMeans:
    """Sums of targets by token id; the predictor is a token's mean target in the documents used for fitting."""

    def __init__(self, vocabulary: int, n_targets: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(vocabulary, dtype=torch.float64, device=device)
        self.sums = torch.zeros(vocabulary, n_targets, dtype=torch.float64, device=device)

    def update(self, token_ids: Int[Tensor, " tokens"], targets: Float[Tensor, "tokens n_targets"]) -> None:
        self.counts += torch.bincount(token_ids, minlength=len(self.counts))
        self.sums.index_add_(0, token_ids, targets.double())

    def predict(self, token_ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens n_targets"]:
        """Return the mean target of each token; unseen tokens get the overall mean."""
        overall = self.sums.sum(0) / self.counts.sum().clamp_min(1)
        seen = self.counts[token_ids, None]
        return torch.where(seen > 0, self.sums[token_ids] / seen.clamp_min(1), overall)

    def explained(self) -> Float[Tensor, " n_targets"]:
        """Return the sum of squares that the means explain on the tokens they were computed from."""
        return (self.sums.pow(2) / self.counts.clamp_min(1)[:, None]).sum(0)


class NormRegressions:
    """R2 of every target from every predictor, fitted on some documents and scored on others.

    Targets are squared norms. Predictors are the activation, the token id and each of ``scalars`` (regressed separately, with a
    bias). All predictors must see the same tokens, so pass only tokens on which all scalars are defined.
    """

    def __init__(
        self,
        d_in: int,
        vocabulary: int,
        targets: Sequence[str],
        scalars: Sequence[str],
        device: torch.device | str = "cpu",
        bias: bool = True,
        ridge: float = RIDGE,
    ):
        self.targets, self.scalars, self.ridge = tuple(targets), tuple(scalars), ridge
        m = len(self.targets)
        self.by_activation = Regression(d_in, m, device, bias)
        self.by_scalar = [Regression(1, m, device) for _ in scalars]
        self.by_token, self.scored_tokens = TokenMeans(vocabulary, m, device), TokenMeans(vocabulary, m, device)
        self.moments = Moments(m, device)
        self.squares = torch.zeros(m, dtype=torch.float64, device=device)
        self.unseen = 0
        # Per predictor and target; coefficients are solved once, when the first token is scored.
        self.residual = torch.zeros(2 + len(self.scalars), m, dtype=torch.float64, device=device)
        self._solved: list[Tensor] | None = None

    def fit(
        self,
        x: Float[Tensor, "tokens d_in"],
        token_ids: Int[Tensor, " tokens"],
        targets: Float[Tensor, "tokens n_targets"],
        scalars: Float[Tensor, "tokens n_scalars"],
    ) -> None:
        assert self._solved is None, "tokens to fit on come before those to score"
        self.by_activation.update(x, targets)
        self.by_token.update(token_ids, targets)
        for number, regression in enumerate(self.by_scalar):
            regression.update(scalars[:, number : number + 1], targets)

    def score(
        self,
        x: Float[Tensor, "tokens d_in"],
        token_ids: Int[Tensor, " tokens"],
        targets: Float[Tensor, "tokens n_targets"],
        scalars: Float[Tensor, "tokens n_scalars"],
    ) -> None:
        regressions = [self.by_activation, *self.by_scalar]
        if self._solved is None:
            self._solved = [regression.solve(self.ridge) for regression in regressions]
        targets = targets.double()
        inputs = [x, *scalars.split(1, dim=1)]
        guesses = [self.by_token.predict(token_ids)]
        guesses += [r.rows(rows) @ solved for r, rows, solved in zip(regressions, inputs, self._solved, strict=True)]
        self.residual += torch.stack([(targets - guess).pow(2).sum(0) for guess in guesses])
        self.moments.update(targets)
        self.squares += targets.pow(2).sum(0)
        self.scored_tokens.update(token_ids, targets)
        self.unseen += int((self.by_token.counts[token_ids] == 0).sum())

    def report(self) -> dict[str, Any]:
        """Return flat entries ``TARGET_r2_from_PREDICTOR``.

        An entry is ``None`` if the target does not vary or if there were too few tokens to fit on.
        """
        predictors = ("token_id", "activation", *self.scalars)
        tokens, columns = self.by_activation.tokens, self.by_activation.columns
        entries: dict[str, Any] = {}
        for row, predictor in enumerate(predictors):
            enough = tokens > (columns if predictor == "activation" else 2)
            for column, target in enumerate(self.targets):
                value = r2(float(self.residual[row, column]), float(self.moments.deviation[column])) if enough else None
                entries[f"{target}_r2_from_{predictor}"] = value
        in_sample = self.squares - self.scored_tokens.explained()
        for column, target in enumerate(self.targets):
            value = r2(float(in_sample[column]), float(self.moments.deviation[column]))
            entries[f"{target}_r2_from_token_id_in_sample"] = value
        scored = self.moments.count
        return entries | {
            "norm_fit_tokens": tokens,
            "norm_score_tokens": scored,
            "norm_unseen_token_share": self.unseen / scored if scored else None,
        }
