"""SAE: sparse autoencoder, which reconstructs its own input."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .dictionary import required_input
from .encoder import Encoder
from .encoders import encoder_spec
from .one_site import OneSiteDictionary


class SAE(OneSiteDictionary):
    """Sparse autoencoder: ``x_hat = W_dec^T code(x - b_dec) + b_dec``, with one bias for encoder and decoder.

    Published SAEs come in two more forms. With ``apply_b_dec_to_input=False`` nothing is subtracted from the input. With a
    ``row_norm`` each token is first normalized by its own scale; the code's values and ``bypass`` undo this, so decoding stays
    linear in the code with the same decoder directions for every token, and ``bypass`` needs the input.

    >>> import torch
    >>> from sparsary import ENCODERS, SAE
    >>> sae = SAE(d_in=8, n_latents=32, encoder=ENCODERS["topk"](k=4))
    >>> x = torch.randn(10, 8)
    >>> code = sae.encode(x)
    >>> sae.decode(code).shape, bool((code.l0() <= 4).all())
    (torch.Size([10, 8]), True)

    Source: Gao et al. 2024, arXiv:2406.04093.
    """

    undoes_row_norm = True

    def __init__(
        self, d_in: int, n_latents: int, encoder: Encoder, apply_b_dec_to_input: bool = True, row_norm: str | None = None
    ):
        super().__init__(d_in, d_in, n_latents, encoder, row_norm, tied=encoder.tied)
        self.apply_b_dec_to_input = apply_b_dec_to_input
        if not self.W_dec.is_meta:
            self.copy_atoms_to_encoder()

    @property
    def shift(self) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    def bypass(self, x: Float[Tensor, "..."] | None = None, site: int | None = None) -> Float[Tensor, "..."]:
        if self.row_norm is None:
            return self.b_dec
        normed = self.normed_rows(required_input(x, "this SAE undoes each token's own normalisation"))
        return torch.addcmul(normed.mean, normed.scale, self.b_dec)

    def arguments(self) -> dict[str, Any]:
        # Stored only if not the default, so that checkpoints of trained SAEs do not change.
        rare = {} if self.apply_b_dec_to_input else {"apply_b_dec_to_input": False}
        rare |= {} if self.row_norm is None else {"row_norm": self.row_norm}
        sizes = {"kind": "sae", "d_in": self.d_in, "n_latents": self.n_latents}
        return {**sizes, **rare, "encoder": encoder_spec(self.encoder)}

    @torch.no_grad()
    def copy_atoms_to_encoder(self) -> None:
        """Initialize the encoder to the decoder, which keeps latents alive early on (Gao et al. 2024, section 2)."""
        if self.W_enc is not None:
            self.W_enc.copy_(self.W_dec)
