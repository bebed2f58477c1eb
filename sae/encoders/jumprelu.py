"""JumpReLU: every latent has a learned threshold below which it is silent."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..encoder import Encoder, Weights, require_argument, scorer, with_gradient
from ..sparse_code import AuxTerms, SparseCode
from ..tiled_scores import Scorer, above, largest_of_batch

# Thresholds are exp(PACE * log_threshold): Adam moves them PACE times as fast, per cent for per cent, as it moves weights.
PACE = 10.0


class Jump(torch.autograd.Function):
    """``(a H(a - theta), H(a - theta))`` with the paper's pseudo-derivatives for theta and none for ``a`` in the jump.

    A rectangle of width ``bandwidth`` around the threshold stands in for Dirac's delta.
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


class JumpReLU(Encoder):
    """Keep the pre-activations above the latent's threshold, unchanged; ``sparsity (l0 / target_l0 - 1)^2`` steers the l0.

    Thresholds are stored as logarithms. Their gradient comes from pre-activations within ``bandwidth`` of them: too narrow
    and they stand still, too wide and they are biased; the unit is that of normalised inputs. They start where the first
    training batch has ``target_l0`` latents per token: from a small constant, as published, short runs do not get there.
    Source: Rajamanoharan et al. 2024, arXiv:2407.14435; the squared form of the penalty is its appendix's.
    """

    started: Int[Tensor, ""]

    def __init__(self, target_l0: int | float, sparsity: int | float = 1.0, bandwidth: int | float = 0.2):
        super().__init__()
        require_argument("target_l0", target_l0, 1, fix="It is the wanted mean number of latents per token.")
        require_argument("sparsity", sparsity, 0.0, fix="0 is no penalty.")
        require_argument("bandwidth", bandwidth, 1e-6, fix="It is in units of normalised pre-activations.")
        self.target_l0, self.sparsity, self.bandwidth = target_l0, sparsity, bandwidth

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        tokens = x.shape[0]
        if self.training and tokens and int(self.started) == 0:
            self._start(scorer(x, weights), tokens)
        # Just below the threshold an entry is silent but has a say in where the threshold moves.
        margin = self.bandwidth / 2 if self.training else 0.0
        cut = self.thresholds().detach() - margin
        code = with_gradient(above(scorer(x, weights).tiles(), cut, tokens, len(cut)), x, weights)
        values, fires = Jump.apply(code.values, self.thresholds()[code.latents], self.bandwidth)  # pyright: ignore[reportGeneralTypeIssues]
        code = SparseCode(code.latents, values, code.starts)
        if not self.training or tokens == 0:
            return code
        penalty = self.sparsity * (fires.sum() / tokens / self.target_l0 - 1).pow(2)
        return SparseCode(code.latents, code.values, code.starts, AuxTerms(penalties={"sparsity": penalty}))

    def thresholds(self) -> Float[Tensor, " n_latents"]:
        """What a pre-activation must exceed, in normalised units."""
        return (PACE * self.log_threshold).exp()

    @torch.no_grad()
    def _start(self, scores: Scorer, tokens: int) -> None:
        level = largest_of_batch(scores, round(tokens * self.target_l0), None)[0].values.amin()
        self.log_threshold.fill_(float(level.clamp_min(1e-3).log()) / PACE)
        self.started.fill_(1)

    def prepare(self, n_latents: int) -> None:
        require_argument("target_l0", self.target_l0, 1, n_latents, "It cannot exceed dictionary.n_latents.")
        self.log_threshold = nn.Parameter(torch.full((n_latents,), -0.3))
        self.register_buffer("started", torch.zeros((), dtype=torch.long))
