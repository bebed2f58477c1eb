"""Residual pursuit: matching pursuit with the stopping rules of SAELens. For loaded dictionaries, not for training."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, require_argument
from ..sparse_code import SparseCode


class ResidualPursuit(Encoder):
    """Encoder that selects the row most correlated with the residual and subtracts its part, up to ``max_steps`` times.

    A token stops once its residual's norm is below ``residual_norm``, in units of normalized inputs (0 disables this), or, with
    ``stop_on_repeat``, after a step that adds no new latent; that step still counts. Rows keep their norms. For
    training use ``matching_pursuit``, which stops at a fraction of the input's norm and may select a latent repeatedly. Source:
    ``MatchingPursuitSAE`` of SAELens 6, after Costa et al. 2025, arXiv:2506.03093.
    """

    tied = True
    linear = False

    def __init__(self, max_steps: int, residual_norm: int | float = 0.0, stop_on_repeat: bool = True):
        super().__init__()
        require_argument("max_steps", max_steps, 1, fix="Set the largest number of pursuit steps.")
        require_argument("residual_norm", residual_norm, 0.0, fix="0 never stops for it.")
        self.max_steps, self.residual_norm, self.stop_on_repeat = max_steps, residual_norm, stop_on_repeat

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        atoms = weights.W_enc
        tokens, n_latents = len(x), len(atoms)
        going = torch.ones(tokens, dtype=torch.bool, device=x.device)
        fires = torch.zeros(tokens, n_latents, dtype=torch.bool, device=x.device)
        residual, every = x, torch.arange(tokens, device=x.device)
        latents, values = [], []
        for _ in range(self.max_steps):
            if not bool(going.any()):
                break
            latent = (residual.detach() @ atoms.detach().T).relu().argmax(dim=1) if tokens else every
            atom = atoms[latent]
            value = (residual * atom).sum(-1).relu() * going
            residual = residual - value[:, None] * atom
            latents.append(latent)
            values.append(value)
            if self.stop_on_repeat:
                # A step of value zero adds no new latent either.
                going = going & ~fires[every, latent] & (value > 0)
                fires[every, latent] |= value > 0
            if self.residual_norm > 0:
                going = going & ~(residual.norm(dim=-1) < self.residual_norm)
        if not latents:
            return SparseCode.from_rows(every.new_empty(tokens, 0), x.new_empty(tokens, 0))
        return SparseCode.from_steps(torch.stack(latents, dim=1), torch.stack(values, dim=1))

    def prepare(self, n_latents: int) -> None:
        # max_steps may exceed the number of latents, because a latent may be selected repeatedly.
        pass
