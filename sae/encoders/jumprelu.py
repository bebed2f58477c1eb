"""JumpReLU: every latent has a learned threshold below which it does not fire."""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..dense_code import DenseCode, kept_scores
from ..dense_encoding import jumped
from ..encoder import Weights, crowded, dense_inputs, require_argument, scorer, with_gradient
from ..penalised import Penalised, SparsityPenalty
from ..sparse_code import AuxTerms, SparseCode
from ..sparse_ops import per_entry
from ..threshold_window import count_above, window
from ..tiled_scores import Scorer, Tile, above, largest_of_batch, largest_values, smallest_of

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
        if not self.training or len(x) == 0:
            return self._kept(above(scorer(x, weights).tiles(), self.thresholds().detach(), *self._shape(x)), x, weights)[0]
        scores = scorer(x, weights)
        thinning = self.target_l0 is not None and (self.progress < THINNING or not int(self.started))
        if thinning and not int(self.started):
            self._start(scores)
            thinning = False
        # Entries just below the threshold have value zero but contribute to its gradient.
        margin, theta = self.bandwidth / 2, self.thresholds().detach()
        many_near, many_firing = crowded(x, weights, theta - margin, theta)
        if thinning:
            # Ranks choose what exceeds the maximum together, so they have to take the same path.
            many_firing = scores.selecting.largest(int(many_firing)) > 0
        # The gradient of tanh at 0 would have to reach all pre-activations in the window as well.
        if many_firing or (many_near and self.penalty != "tanh"):
            code, fired = self._dense(x, weights, scores, thinning, many_firing)
        else:
            code = above(scores.tiles(), theta - margin, *self._shape(x))
            if thinning and self._thin_out(code, scores):
                code = code.where(code.values > per_entry(self.thresholds().detach() - margin, code.latents))
            code, fired = self._kept(code, x, weights)
        requests = AuxTerms(
            penalties={"sparsity": self._charge(code, fired, weights)},
            revival=self.revival(self.thresholds()),
        )
        return code.requesting(requests)

    def _shape(self, x: Float[Tensor, "tokens d_in"]) -> tuple[int, int]:
        return len(x), len(self.log_threshold)

    def _kept(
        self, code: SparseCode, x: Float[Tensor, "tokens d_in"], weights: Weights
    ) -> tuple[SparseCode, Float[Tensor, ""]]:
        """Return the code of pre-activations, zero below their thresholds, and its number of firing entries."""
        code = with_gradient(code, x, weights)
        theta = per_entry(self.thresholds(), code.latents)
        values, fires = Jump.apply(code.values, theta, self.bandwidth)  # pyright: ignore[reportGeneralTypeIssues]
        return SparseCode(code.latents, values, code.starts), fires.sum()

    def _dense(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, scores: Scorer, thinning: bool, many_firing: bool
    ) -> tuple[SparseCode, Float[Tensor, ""]]:
        """Return the same as ``_kept`` if many pre-activations are near their thresholds, or above them."""
        inputs = dense_inputs(x, weights)
        every = kept_scores(x, weights.W_enc, weights.b_enc)
        if many_firing:
            firing = int(count_above(every, self.thresholds().detach()).sum()) if thinning else 0
            if thinning and scores.selecting.total(firing) > self._budget(scores):
                kept = largest_of_batch(self._margins(scores), self._budget(scores))[0]
                self._raise_by(smallest_of(kept, scores.selecting))
            code = jumped(inputs, every, window(every, self.thresholds(), self.bandwidth))
            return code, code.fired.sum()
        code = above([Tile(0, every, 0)], self.thresholds().detach(), *every.shape)
        if thinning and self._thin_out(code, scores):
            code = code.where(code.values > per_entry(self.thresholds().detach(), code.latents))
        near = window(every, self.thresholds(), self.bandwidth)
        fired = near.fired(torch.tensor(float(len(code.values)), dtype=x.dtype, device=x.device))
        return replace(with_gradient(code, x, weights), window=near), fired

    def thresholds(self) -> Float[Tensor, " n_latents"]:
        """Return the thresholds of pre-activations, in normalized units."""
        return (PACE * self.log_threshold).exp()

    def _charge(self, code: SparseCode, fired: Float[Tensor, ""], weights: Weights) -> Float[Tensor, ""]:
        """Return the sparsity penalty of a training batch."""
        l0 = weights.ranks.whole(weights.shards.reduced(fired / code.n_tokens))
        if self.penalty == "square":
            assert self.target_l0 is not None
            return self.weight_now() * (l0 / self.target_l0 - 1).pow(2)
        if self.penalty == "tanh":
            norms = weights.norms()
            values = code.matrix * norms if isinstance(code, DenseCode) else code.values * per_entry(norms, code.latents)
            measure = weights.shards.reduced((self.steepness * values).tanh().sum() / code.n_tokens)
        else:
            measure = l0
        return self.steering(measure / weights.unit, self.weight_now(), l0, self.target_l0, self.rising)

    @property
    def most_now(self) -> float | None:
        """Maximum L0 allowed at this point of training."""
        early = max(0.0, 1 - self.progress / THINNING)
        return None if self.target_l0 is None else self.target_l0 * (1 + (max(self.start, 1.0) - 1) * early)

    def _budget(self, scores: Scorer) -> int:
        """Return the largest number of firing entries in a batch at this point of training."""
        assert self.most_now is not None
        return min(round(scores.batch_tokens * self.most_now), scores.batch_tokens * scores.all_latents)

    @torch.no_grad()
    def _start(self, scores: Scorer) -> None:
        """Set one threshold for all latents that the first batch's maximum L0 meets."""
        level = smallest_of(largest_of_batch(scores, self._budget(scores))[0], scores.selecting)
        self.log_threshold.fill_(float(level.clamp_min(1e-3).log()) / PACE)
        self.started.fill_(1)

    @torch.no_grad()
    def _thin_out(self, code: SparseCode, scores: Scorer) -> bool:
        """Raise thresholds to enforce the maximum L0 on a code that holds all firing entries; return True if they moved."""
        ranks, budget = scores.selecting, self._budget(scores)
        margins = code.values - per_entry(self.thresholds(), code.latents)
        margins = margins[margins > 0]
        if ranks.total(len(margins)) <= budget:
            return False
        kept = margins[largest_values(margins, budget, ranks)]
        self._raise_by(ranks.least(kept.amin() if len(kept) else kept.new_full((), torch.inf)))
        return True

    @torch.no_grad()
    def _raise_by(self, margin: Float[Tensor, ""]) -> None:
        self.log_threshold.copy_((self.thresholds() + margin).log() / PACE)

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
