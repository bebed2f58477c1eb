"""ReLU with a penalty on its values: L1, logarithm, or square root."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..dense_encoding import positive
from ..encoder import Weights, crowded, dense_inputs, scorer, with_gradient
from ..penalised import Penalised, SparsityPenalty
from ..sparse_code import AuxTerms, SparseCode
from ..sparse_ops import per_entry
from ..tiled_scores import Scorer, above

# Value, in normalized units, below which the concave penalties are nearly linear.
EPS = 0.1


class ReLU(Penalised):
    """Encoder that keeps every positive pre-activation, with a penalty on values weighted by decoder norm.

    The L1 penalty charges large values most, and so shrinks them. The concave penalties approach a charge per active latent:
    with ``m`` a value times its decoder norm, ``log`` is ``log(1 + m / eps) / log(1 + 1 / eps)``, and ``sqrt`` is ``sqrt(m +
    eps) - sqrt(eps)``, with eps 0.1; the first is 1 at ``m = 1``, as L1 is.

    The norm makes the penalty invariant to rescaling a latent, so decoder norms need no constraint; they are folded to unit
    norm, together with the values, when training ends. The sum over latents is divided by the width of one site, which gives
    units of FVU, as in the reconstruction term. ``target_l0`` steers the penalty's weight, starting from ``sparsity``, until
    that many latents fire per token; the schedule then depends on the data, which a comparison must state. The weight rises
    over the first ``ramp`` of the run, so that latents are fitted before they are penalized. Source: the April 2024 update of
    Anthropic's Transformer Circuits thread.

    Args:
        sparsity: Weight of the penalty, in units of FVU; with a target, its initial value.
        target_l0: Target mean L0 per token; ``None`` keeps the weight fixed.
        ramp: Fraction of the run over which the weight rises from 0.
        pre_act_loss: Weight of the auxiliary loss on dead latents, in units of FVU.
        penalty_form: Charge for a value.
    """

    unit_atoms = False

    def __init__(
        self,
        sparsity: int | float = 1.0,
        target_l0: int | float | None = None,
        ramp: int | float = 0.1,
        pre_act_loss: int | float = 0.03,
        penalty_form: Literal["l1", "log", "sqrt"] = "l1",
    ):
        super().__init__(sparsity, target_l0, ramp, pre_act_loss)
        self.penalty_form = penalty_form
        self.penalty = SparsityPenalty()

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        tokens, n_latents = x.shape[0], weights.W_enc.shape[0]
        if self.training and crowded(x, weights, x.new_zeros(()))[0]:
            found = positive(dense_inputs(x, weights))
            norms = weights.norms()
            # The sum of L1 needs no gradient as large as the code.
            linear = self.penalty_form == "l1"
            measure = found.mass @ norms if linear else charge(found.code.matrix * norms, self.penalty_form).sum()
            return found.code.requesting(self._requests(measure, found.code.fired.sum() / tokens, x, weights))
        code = above(scorer(x, weights).tiles(), x.new_zeros(()), tokens, n_latents)
        code = with_gradient(code, x, weights)
        if not self.training or tokens == 0:
            return code
        values = code.values * per_entry(weights.norms(), code.latents)
        l0 = torch.tensor(len(code.values) / tokens, device=x.device)
        return code.requesting(self._requests(charge(values, self.penalty_form).sum(), l0, x, weights))

    def _requests(
        self, measure: Float[Tensor, ""], l0: Float[Tensor, ""], x: Float[Tensor, "tokens d_in"], weights: Weights
    ) -> AuxTerms:
        """Return the terms of a training batch, from its charged values and its L0."""
        measure = weights.shards.reduced(measure / (len(x) * weights.unit))
        l0 = weights.ranks.mean(weights.shards.sum(l0))
        penalty = self.penalty(measure, self.weight_now(), l0, self.target_l0, self.rising)
        return AuxTerms(penalties={"sparsity": penalty}, revival=self.revival(x.new_zeros(len(weights.W_enc))))

    def prepare_cuts(self, n_latents: int) -> None:
        pass

    def margins(self, scores: Scorer, weights: Weights) -> tuple[Scorer, Float[Tensor, " n_latents"] | None]:
        return scores, None

    @torch.no_grad()
    def raise_cuts(self, by: float, weights: Weights) -> None:
        assert weights.b_enc is not None
        weights.b_enc.sub_(by)


def charge(m: Float[Tensor, "*entries"], form: str) -> Float[Tensor, "*entries"]:
    """Return the penalty of every active latent; ``m`` are values times decoder norms."""
    if form == "log":
        return (m / EPS).log1p() / math.log1p(1 / EPS)
    return (m + EPS).sqrt() - math.sqrt(EPS) if form == "sqrt" else m
