"""Gated: one path decides which latents fire, another how strongly."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..encoder import Encoder, Weights, require_argument, scorer, with_gradient
from ..sparse_code import AuxTerms, SparseCode
from ..sparsity_penalty import SparsityPenalty
from ..tiled_scores import above


class Gated(Encoder):
    """A latent fires where the gate ``W_enc x + b_enc`` is positive, with ``relu(exp(r_mag) W_enc x + b_mag)``.

    The penalty is on the rectified gate, so magnitudes are not shrunk by it; so that the gate stays meaningful, its own
    values must reconstruct the target from atoms that this term may not move. ``sparsity`` and ``target_l0`` are those of
    ``relu``. Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
    """

    def __init__(self, sparsity: int | float = 0.1, target_l0: int | float | None = None):
        super().__init__()
        require_argument("sparsity", sparsity, 0.0, fix="0 is no penalty.")
        self.sparsity, self.target_l0 = sparsity, target_l0
        self.penalty = SparsityPenalty(target_l0)

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        tokens, n_latents = x.shape[0], weights.W_enc.shape[0]
        open_ = above(scorer(x, weights).tiles(), x.new_zeros(()), tokens, n_latents)
        gate, latents = with_gradient(open_, x, weights).values, open_.latents
        bias = 0.0 if weights.b_enc is None else weights.b_enc[latents]
        magnitudes = (self.r_mag.exp()[latents] * (gate - bias) + self.b_mag[latents]).relu()
        code = SparseCode(latents, magnitudes, open_.starts)
        if not self.training or tokens == 0:
            return code
        measure = gate.sum() / (tokens * weights.W_dec.shape[1])
        l0 = (magnitudes.detach() > 0).sum() / tokens
        requests = AuxTerms(
            penalties={"sparsity": self.penalty(measure, self.sparsity, l0, self.target_l0)},
            frozen=SparseCode(code.latents, gate, code.starts),
        )
        return SparseCode(code.latents, code.values, code.starts, requests)

    def prepare(self, n_latents: int) -> None:
        if self.target_l0 is not None:
            require_argument("target_l0", self.target_l0, 1, n_latents, "It cannot exceed dictionary.n_latents.")
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.b_mag = nn.Parameter(torch.zeros(n_latents))
