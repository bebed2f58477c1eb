"""Transcoder: the dictionary that maps what a part of a model reads to what it writes."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..sae.dictionary import OneSiteDictionary, required_input
from ..sae.encoder import Encoder
from ..sae.encoders import encoder_spec


class Transcoder(OneSiteDictionary):
    """``y_hat = W_dec^T code(x - in_centre) + W_skip (x - in_centre) + b_dec``, the skip only where it is asked for.

    It takes the place of a part of the model, usually an MLP, where an SAE only puts a tensor into other words. ``x`` and
    ``y`` are normalised each by its own scale. ``in_centre`` is the data's centre, set once: that it is subtracted before
    the encoder could be folded into ``b_enc`` and ``b_dec``, but pursuits need it, and a linear path learns faster.
    ``W_skip`` starts at zero. A loaded one may have a ``row_norm``, for the encoder alone: the skip reads raw inputs, and the
    output, another tensor than the input, is left as it comes.

    Sources: Dunefsky, Chlenski and Nanda 2024, arXiv:2406.11944; the skip, Paulo, Shabalin and Belrose 2025,
    arXiv:2501.18823.
    """

    in_centre: Float[Tensor, " d_in"]

    def __init__(
        self, d_in: int, d_out: int, n_latents: int, encoder: Encoder, skip: bool = False, row_norm: str | None = None
    ):
        super().__init__(d_in, d_out, n_latents, encoder, row_norm)
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in)) if skip else None
        self.register_buffer("in_centre", torch.zeros(d_in))

    @property
    def shift(self) -> Tensor:
        return self.in_centre

    def bypass(self, x: Float[Tensor, "..."] | None = None, site: int | None = None) -> Float[Tensor, "..."]:
        if self.W_skip is None:
            return self.b_dec
        inputs = required_input(x, "this transcoder has a skip path from it").to(self.in_scale.dtype) / self.in_scale
        return F.linear(inputs - self.in_centre, self.W_skip, self.b_dec)

    def arguments(self) -> dict[str, Any]:
        sizes = {"d_in": self.d_in, "d_out": self.d_out, "n_latents": self.n_latents}
        rare = {} if self.row_norm is None else {"row_norm": self.row_norm}
        skip = self.W_skip is not None
        return {"kind": "transcoder", **sizes, "skip": skip, **rare, "encoder": encoder_spec(self.encoder)}
