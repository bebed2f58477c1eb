"""Matching pursuit: sequential selection of latents, each by its correlation with the residual of the earlier ones."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..encoder import Encoder, Weights, require_argument
from ..pursuit import matching_pursuit
from ..sparse_code import SparseCode


class MatchingPursuit(Encoder):
    """Encoder that selects the direction best correlated with the residual and subtracts its projection, ``k`` times.

    The values of a latent selected repeatedly are added. In an SAE, encoder and decoder are one matrix. Its rows have norm
    1, or start so and are then free (``unit_norm=False``, as SAELens trains): a shorter one is selected less readily and
    subtracted by less than its projection. In a dictionary with different inputs and outputs, the pursuit uses the rows of
    ``W_enc``, normalized here. A token stops early once its residual's norm is at most ``tolerance`` times the input's. ``k``
    and ``tolerance`` may be changed on a trained dictionary, and its error falls with every further step as long as norms are
    below sqrt(2). ``k`` counts steps: with repeats the L0 is smaller. Source: Costa et al. 2025, arXiv:2506.03093.

    Args:
        k: Steps of the pursuit per token.
        tolerance: Residual norm, as a fraction of the input's, at which a token stops early.
        unit_norm: Keep decoder directions at norm 1 in training; a step then removes the whole projection. Free norms lower the
            error by 3 to 10 %, but recover planted features worse (docs/peers.md).
    """

    tied = True
    linear = False
    undivided = "every latent it chooses changes the scores of all others for the next"

    def __init__(self, k: int, tolerance: int | float = 0.0, unit_norm: bool = True):
        super().__init__()
        require_argument("k", k, 1, fix="Set the number of pursuit steps.")
        require_argument("tolerance", tolerance, 0.0, 1.0, fix="It is a share of the input's norm; 0 never stops early.")
        self.k, self.tolerance, self.unit_norm = k, tolerance, unit_norm
        self.unit_atoms = unit_norm

    def arguments(self) -> dict[str, Any]:
        # Stored only if not the default: it concerns training alone, and most checkpoints are of other programs.
        return {name: value for name, value in super().arguments().items() if name != "unit_norm" or not value}

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        atoms = weights.W_dec if weights.W_enc is weights.W_dec else F.normalize(weights.W_enc, dim=-1)
        code = matching_pursuit(x, atoms, self.k, self.tolerance)
        return SparseCode.from_steps(code.latents.view(len(x), self.k), code.values.view(len(x), self.k))

    def prepare(self, n_latents: int) -> None:
        # k may exceed the number of latents, because a latent may be selected repeatedly.
        pass
