"""Gated: one path decides which latents fire, another computes their values."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..dense_encoding import gated_positive
from ..encoder import Weights, crowded, dense_inputs, scorer, with_gradient
from ..penalised import Penalised, SparsityPenalty
from ..sparse_code import AuxTerms, SparseCode
from ..sparse_ops import per_entry
from ..tiled_scores import Scorer, above


class Gated(Penalised):
    """Encoder with value ``relu(exp(r_mag) W_enc x + b_mag)`` where the gate ``W_enc x + b_enc`` is positive, else 0.

    The penalty applies to the rectified gate, so it does not shrink the values. To keep the gate meaningful, its own values
    must reconstruct the target with a decoder that this term does not update. ``sparsity``, ``target_l0``, and ``ramp`` work as
    in ``relu``. Source: Rajamanoharan et al. 2024, arXiv:2404.16014.

    Args:
        sparsity: Weight of the penalty, in units of FVU; with a target, its initial value.
        target_l0: Target mean L0 per token; ``None`` keeps the weight fixed.
        ramp: Fraction of the run over which the weight rises from 0.
        pre_act_loss: Weight of the auxiliary loss on dead latents, in units of FVU.
    """

    betas = (0.0, 0.999)

    def __init__(
        self,
        sparsity: int | float = 1.0,
        target_l0: int | float | None = None,
        ramp: int | float = 0.1,
        pre_act_loss: int | float = 0.03,
    ):
        super().__init__(sparsity, target_l0, ramp, pre_act_loss)
        self.penalty = SparsityPenalty()

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        tokens, n_latents = x.shape[0], weights.W_enc.shape[0]
        if self.training and crowded(x, weights, x.new_zeros(()))[0]:
            found = gated_positive(dense_inputs(x, weights), self.r_mag, self.b_mag)
            terms = self._requests(found.gate_mass.sum(), found.code.fired.sum() / tokens, found.gate, x, weights)
            return found.code.requesting(terms)
        open_ = above(scorer(x, weights).tiles(), x.new_zeros(()), tokens, n_latents)
        gate, latents = with_gradient(open_, x, weights).values, open_.latents
        bias = 0.0 if weights.b_enc is None else per_entry(weights.b_enc, latents)
        magnitudes = (per_entry(self.r_mag.exp(), latents) * (gate - bias) + per_entry(self.b_mag, latents)).relu()
        code = SparseCode(latents, magnitudes, open_.starts)
        if not self.training or tokens == 0:
            return code
        opened = SparseCode(code.latents, gate, code.starts)
        return code.requesting(self._requests(gate.sum(), (magnitudes.detach() > 0).sum() / tokens, opened, x, weights))

    def _requests(
        self,
        measure: Float[Tensor, ""],
        l0: Float[Tensor, ""],
        gate: SparseCode,
        x: Float[Tensor, "tokens d_in"],
        weights: Weights,
    ) -> AuxTerms:
        """Return the terms of a training batch, from the sum of its gate, its L0, and the gate."""
        measure = weights.shards.reduced(measure / (len(x) * weights.unit))
        l0 = weights.ranks.mean(weights.shards.sum(l0))
        return AuxTerms(
            penalties={"sparsity": self.penalty(measure, self.weight_now(), l0, self.target_l0, self.rising)},
            frozen=gate,
            revival=self.revival(x.new_zeros(len(weights.W_enc))),
        )

    def prepare_cuts(self, n_latents: int) -> None:
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.b_mag = nn.Parameter(torch.zeros(n_latents))

    def margins(self, scores: Scorer, weights: Weights) -> tuple[Scorer, Float[Tensor, " n_latents"] | None]:
        # An open gate does not fire if its magnitude is not positive.
        assert weights.b_enc is not None
        return scores, weights.b_enc - self.b_mag * (-self.r_mag).exp()

    @torch.no_grad()
    def raise_cuts(self, by: float, weights: Weights) -> None:
        # Magnitudes do not depend on the gate's bias.
        assert weights.b_enc is not None
        weights.b_enc.sub_(by)
