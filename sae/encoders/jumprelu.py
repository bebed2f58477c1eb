"""JumpReLU: every latent has a learned threshold below which it does not fire."""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..encoder import Weights, require_argument, scorer, with_gradient
from ..penalised import Penalised, SparsityPenalty
from ..sparse_code import AuxTerms, SparseCode
from ..sparse_ops import per_entry
from ..tiled_scores import Scorer, above, largest_of_batch, smallest_of

# Thresholds are exp(PACE * log_threshold), so Adam's relative steps on them are PACE times those on weights.
PACE = 10.0
# Initial value without a target to start from: exp(PACE * FIRST) = 0.05.
FIRST = -0.3
# Fraction of the run over which the maximum L0 falls linearly from its start to the target. The penalty alone is as fast on the
# embedded model, but needed the whole run on stories3M (L0 24.5 instead of 16 at its end).
THINNING = 0.3
# Lower bound of thresholds after calibration.
LEAST = 1e-6


class Jump(torch.autograd.Function):
    """Autograd function ``(a H(a - theta), H(a - theta))`` with the paper's pseudo-derivatives for ``theta``.

    A rectangle of width ``bandwidth`` around the threshold replaces Dirac's delta; ``a`` gets no gradient from the jump.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        fires = (a > theta).to(a.dtype)
        ctx.save_for_backward(a, theta, fires)
        ctx.bandwidth = bandwidth
        return a * fires, fires

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a, theta, fires = ctx.saved_tensors
        window = ((a - theta).abs() < ctx.bandwidth / 2).to(a.dtype) / ctx.bandwidth
        return grads[0] * fires, -window * (theta * grads[0] + grads[1]), None


class JumpReLU(Penalised):
    """Encoder that keeps the pre-activations above each latent's learned threshold, unchanged.

    Thresholds are stored as logarithms. Their gradient comes from pre-activations within ``bandwidth / 2`` of them, in units of
    normalized inputs: with a narrow window they hardly move, with a wide one they are biased.

    A latent whose pre-activations all stay below that window receives no gradient. Dead latents are therefore charged
    ``pre_act_loss`` times their distance below the threshold, which moves both (``sae.losses``).

    Args:
        target_l0: Target mean L0 per token; required by ``penalty: square``.
        sparsity: Weight of the penalty, in units of FVU. With a target and a penalty other than ``square``, the weight that
            steering starts from, as in ``relu``.
        bandwidth: Width of the window.
        penalty: ``square`` is ``sparsity (l0 / target_l0 - 1)^2``; ``l0`` is ``sparsity l0 / d_out``; ``tanh`` replaces the 1
            that every firing latent contributes to the L0 with ``tanh(steepness value)``, where the value is multiplied by the
            decoder norm, and has gradients to all weights.
        steepness: Steepness of ``tanh``.
        ramp: Fraction of the run over which ``sparsity`` rises from 0.
        pre_act_loss: Weight of the auxiliary loss on dead latents.
        start: Initial thresholds give the first training batch an L0 of ``start x target_l0``; without a target they are 0.05.
            The penalty then lowers the L0; over the first 30 % of a run, thresholds that lag behind a linear decline to the
            target are raised together, because Adam moves thresholds by only 1 % a step.

    Sources: Rajamanoharan et al. 2024, arXiv:2407.14435, with the squared penalty in its appendix; ``tanh``, the ramp over the
    whole run, and the term on dead latents are from the January 2025 update of Anthropic's Transformer Circuits thread.
    """

    betas = (0.0, 0.999)
    started: Int[Tensor, ""]

    def __init__(
        self,
        target_l0: int | float | None = None,
        sparsity: int | float = 1.0,
        bandwidth: int | float = 0.2,
        penalty: Literal["square", "l0", "tanh"] = "square",
        steepness: int | float = 4.0,
        ramp: int | float = 0.0,
        pre_act_loss: int | float = 0.03,
        start: int | float = 20.0,
    ):
        super().__init__(sparsity, target_l0, ramp, pre_act_loss)
        require_argument("bandwidth", bandwidth, 1e-6, fix="It is in units of normalised pre-activations.")
        require_argument("steepness", steepness, 1e-6, fix="4 is published.")
        require_argument("start", start, 1e-6, fix="1 starts at the target.")
        if penalty == "square" and target_l0 is None:
            raise ValueError(
                "dictionary.encoder.target_l0: expected a number with penalty square, got none. Set it, or set penalty to l0 "
                "or tanh."
            )
        self.bandwidth, self.penalty, self.steepness = bandwidth, penalty, steepness
        self.start = start
        if penalty != "square":
            self.steering = SparsityPenalty()

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        tokens = x.shape[0]
        if self.training and tokens and self.target_l0 is not None and (self.progress < THINNING or not int(self.started)):
            self._thin_out(scorer(x, weights))
        # Entries just below the threshold have value zero but contribute to its gradient.
        margin = self.bandwidth / 2 if self.training else 0.0
        theta = self.thresholds()
        cut = theta.detach() - margin
        code = with_gradient(above(scorer(x, weights).tiles(), cut, tokens, len(cut)), x, weights)
        values, fires = Jump.apply(code.values, per_entry(theta, code.latents), self.bandwidth)  # pyright: ignore[reportGeneralTypeIssues]
        code = SparseCode(code.latents, values, code.starts)
        if not self.training or tokens == 0:
            return code
        requests = AuxTerms(
            penalties={"sparsity": self._charge(code, fires, weights)},
            revival=self.revival(theta),
        )
        return SparseCode(code.latents, code.values, code.starts, requests)

    def thresholds(self) -> Float[Tensor, " n_latents"]:
        """Return the thresholds of pre-activations, in normalized units."""
        return (PACE * self.log_threshold).exp()

    def _charge(self, code: SparseCode, fires: Float[Tensor, " nnz"], weights: Weights) -> Float[Tensor, ""]:
        """Return the sparsity penalty of a training batch."""
        l0 = weights.ranks.whole(weights.shards.reduced(fires.sum() / code.n_tokens))
        if self.penalty == "square":
            assert self.target_l0 is not None
            return self.weight_now() * (l0 / self.target_l0 - 1).pow(2)
        if self.penalty == "tanh":
            norms = per_entry(weights.W_dec.norm(dim=-1), code.latents)
            measure = weights.shards.reduced((self.steepness * code.values * norms).tanh().sum() / code.n_tokens)
        else:
            measure = l0
        return self.steering(measure / weights.unit, self.weight_now(), l0, self.target_l0, self.rising)

    @property
    def most_now(self) -> float | None:
        """Maximum L0 allowed at this point of training."""
        early = max(0.0, 1 - self.progress / THINNING)
        return None if self.target_l0 is None else self.target_l0 * (1 + (max(self.start, 1.0) - 1) * early)

    @torch.no_grad()
    def _thin_out(self, scores: Scorer) -> None:
        """Raise thresholds to enforce the maximum L0; the first batch sets one threshold for all latents."""
        assert self.most_now is not None
        tokens = scores.batch_tokens
        budget = min(round(tokens * self.most_now), tokens * scores.all_latents)
        if not int(self.started):
            level = smallest_of(largest_of_batch(scores, budget)[0], scores.selecting)
            self.log_threshold.fill_(float(level.clamp_min(1e-3).log()) / PACE)
            self.started.fill_(1)
            return
        by = smallest_of(largest_of_batch(self._margins(scores), budget)[0], scores.selecting)
        if float(by) > 0:
            self.log_threshold.copy_((self.thresholds() + by).log() / PACE)

    def prepare_cuts(self, n_latents: int) -> None:
        self.log_threshold = nn.Parameter(torch.full((n_latents,), FIRST))
        self.register_buffer("started", torch.zeros((), dtype=torch.long))

    def margins(self, scores: Scorer, weights: Weights) -> tuple[Scorer, Float[Tensor, " n_latents"] | None]:
        return self._margins(scores), None

    def _margins(self, scores: Scorer) -> Scorer:
        below = -self.thresholds().detach().to(scores.W)
        return replace(scores, b=below if scores.b is None else scores.b + below)

    @torch.no_grad()
    def raise_cuts(self, by: float, weights: Weights) -> None:
        self.log_threshold.copy_((self.thresholds() + by).clamp_min(LEAST).log() / PACE)
