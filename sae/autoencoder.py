"""SAE: the dictionary that maps an activation to itself."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .dictionary import OneSiteDictionary
from .encoder import Encoder
from .encoders import encoder_spec


class SAE(OneSiteDictionary):
    """Sparse autoencoder: ``x_hat = W_dec^T code(x - b_dec) + b_dec``, with one bias on both sides.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """

    def __init__(self, d_in: int, n_latents: int, encoder: Encoder):
        super().__init__(d_in, d_in, n_latents, encoder)
        if not self.W_dec.is_meta:
            self.copy_atoms_to_encoder()

    @property
    def tied(self) -> bool:
        return self.encoder.tied

    @property
    def shift(self) -> Tensor:
        return self.b_dec

    def bypass(self, x: Float[Tensor, "tokens d_in"] | None = None) -> Float[Tensor, "... d_out"]:
        return self.b_dec

    @torch.no_grad()
    def centre_on(self, inputs: Float[Tensor, " d_in"], outputs: Float[Tensor, " d_out"]) -> None:
        self.b_dec.copy_(outputs)

    def arguments(self) -> dict[str, Any]:
        return {"kind": "sae", "d_in": self.d_in, "n_latents": self.n_latents, "encoder": encoder_spec(self.encoder)}

    @torch.no_grad()
    def copy_atoms_to_encoder(self) -> None:
        """Start the encoder as a copy of the atoms, which keeps latents alive early on (Gao et al. 2024, section 2)."""
        if self.W_enc is not None:
            self.W_enc.copy_(self.W_dec)
