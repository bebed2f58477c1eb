"""Transcoder: dictionary that maps the input of a model component, usually an MLP, to its output."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..sae.dictionary import required_input
from ..sae.encoder import Encoder
from ..sae.encoders import encoder_spec
from ..sae.one_site import OneSiteDictionary


class Transcoder(OneSiteDictionary):
    """Transcoder: ``y_hat = W_dec^T code(x - in_centre) + W_skip (x - in_centre) + b_dec``, with an optional skip path.

    It replaces a component of the model, usually an MLP, whereas an SAE only re-expresses one activation. ``x`` and ``y`` are
    normalized by their own scales. ``in_centre`` is the data mean, set once: it could be folded into ``b_enc`` and ``b_dec``,
    but pursuits need it, and the linear skip path learns faster with it. ``W_skip`` starts at zero. Loaded transcoders may have
    a ``row_norm``, which applies to the encoder only: the skip path reads inputs without it, and it is not undone in the
    output, which is a different activation.

    >>> import torch
    >>> from sparsary import ENCODERS, Transcoder
    >>> transcoder = Transcoder(d_in=8, d_out=6, n_latents=32, encoder=ENCODERS["topk"](k=4), skip=True)
    >>> x = torch.randn(10, 8)
    >>> transcoder.decode(transcoder.encode(x), x).shape
    torch.Size([10, 6])

    Sources: Dunefsky, Chlenski and Nanda 2024, arXiv:2406.11944; for the skip path, Paulo, Shabalin and Belrose 2025,
    arXiv:2501.18823.
    """

    in_centre: Float[Tensor, " d_in"]

    def __init__(
        self, d_in: int, d_out: int, n_latents: int, encoder: Encoder, skip: bool = False, row_norm: str | None = None
    ):
        if encoder.for_saes:
            name = encoder_spec(encoder)["name"]
            raise ValueError(f"dictionary.kind: expected sae with encoder {name}, because {encoder.for_saes}, got transcoder.")
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
