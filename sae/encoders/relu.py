"""ReLU with an L1 penalty: every positive pre-activation is kept, and paid for."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, require_argument, scorer, with_gradient
from ..sparse_code import AuxTerms, SparseCode
from ..sparsity_penalty import SparsityPenalty
from ..tiled_scores import above


class ReLU(Encoder):
    """Keep every positive pre-activation; the loss charges ``sparsity`` for each value times its atom's norm.

    Weighing by the norm makes the penalty blind to rescaling a latent, so atoms need no constraint; they are brought to unit
    norm, with their values, when training ends. The penalty is a sum over latents divided by ``d_out``: in units of fvu, as
    the reconstruction term. ``target_l0`` steers the penalty's weight until that many latents fire per token, starting from
    ``sparsity``; the schedule then depends on the data, which a comparison must say.
    Source: the April 2024 update of Anthropic's Transformer Circuits thread.
    """

    unit_atoms = False

    def __init__(self, sparsity: int | float = 0.1, target_l0: int | float | None = None):
        super().__init__()
        require_argument("sparsity", sparsity, 0.0, fix="0 is no penalty.")
        self.sparsity, self.target_l0 = sparsity, target_l0
        self.penalty = SparsityPenalty(target_l0)

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        tokens, n_latents = x.shape[0], weights.W_enc.shape[0]
        code = above(scorer(x, weights).tiles(), x.new_zeros(()), tokens, n_latents)
        code = with_gradient(code, x, weights)
        if not self.training or tokens == 0:
            return code
        norms = weights.W_dec.norm(dim=-1)
        measure = (code.values * norms[code.latents]).sum() / (tokens * weights.W_dec.shape[1])
        l0 = torch.tensor(len(code.values) / tokens, device=x.device)
        penalties = {"sparsity": self.penalty(measure, self.sparsity, l0, self.target_l0)}
        return SparseCode(code.latents, code.values, code.starts, AuxTerms(penalties=penalties))

    def prepare(self, n_latents: int) -> None:
        if self.target_l0 is not None:
            require_argument("target_l0", self.target_l0, 1, n_latents, "It cannot exceed dictionary.n_latents.")
