"""TopK: a fixed number of latents per token."""

from jaxtyping import Float
from torch import Tensor

from ..code import SparseCode
from ..encoder import Encoder, Weights, pre_activations


class TopK(Encoder):
    """Keep the k largest pre-activations of every token, then drop the negative ones.

    Gradient reaches the kept entries only. A token with fewer than ``k`` positive pre-activations has fewer than ``k``
    firing latents. Source: Gao et al. 2024, arXiv:2406.04093.
    """

    def __init__(self, k: int):
        super().__init__()
        if k < 1:
            raise ValueError(f"dictionary.encoder.k: expected at least 1, got {k}. Set how many latents fire per token.")
        self.k = k

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_in"] | None = None
    ) -> SparseCode:
        # sorted=False: the order within a token means nothing, and sorting costs.
        values, latents = pre_activations(x, weights).topk(self.k, dim=-1, sorted=False)
        return SparseCode.from_rows(latents, values.relu())

    def validate(self, n_latents: int) -> None:
        if self.k > n_latents:
            raise ValueError(
                f"dictionary.encoder.k: expected at most n_latents = {n_latents}, got {self.k}. "
                "Lower k or raise dictionary.n_latents."
            )
