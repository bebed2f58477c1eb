"""Crosscoder: one sparse code for several activations of the same token."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..sae.encoder import Encoder
from ..sae.encoders import encoder_spec
from ..sae.one_block import OneBlockDictionary


class Crosscoder(OneBlockDictionary):
    """Crosscoder: one code for the activations ``x^s`` of a token at several sites, which may be layers or models.

    ``z = code(sum over s of W_enc^s (x^s - c^s) + b_enc)`` and ``x_hat^s = W_dec^s z + b_dec^s``. The centre ``c^s`` is
    ``b_dec^s``, or 0 with ``apply_b_dec_to_input=False``, as in most published crosscoders. Sites may differ in width. Each is
    divided by its own scale, so that a layer with large activations counts no more than others, and the training loss is the
    mean of the sites' FVUs.

    A latent's decoder row over all sites together has unit norm, so encoders that select the largest values compare
    contributions to all sites. A penalty that weights values by decoder norms (``relu``, and ``jumprelu`` with ``tanh``) uses
    the sum over sites of the norms at each, ``sum over i of z_i sum over s of |W_dec_i^s|``, divided by the total width: a sum
    charges a latent that writes to two sites more than one that writes as much to a single site.

    **Inputs** are a list with one tensor ``(..., d_s)`` per site, or ``(..., sites, d)`` if all widths are equal, or all sites
    concatenated, ``(..., d_in)``. Calling the crosscoder returns reconstructions in the same form; ``decode`` returns them
    concatenated, and ``split`` divides them.

    **Attributes** for sites ``s = 0, 1, ...`` and latents ``i``:

    - ``names``, ``widths``: name and width of every site. Recipes name sites by their hooks, with two models ``base/HOOK`` and
      ``tuned/HOOK``;
    - ``sites[s].reads``: slice of the site's columns in concatenated activations, and in ``W_enc``, ``W_dec``, ``b_dec``;
    - ``W_enc (n_latents, d_in)``, ``b_enc (n_latents,)``, ``W_dec (n_latents, d_in)``, ``b_dec (d_in,)``: parameters for
      normalized activations (each site divided by its scale), with the sites' columns concatenated;
    - ``scales (sites,)``: the scale of every site. ``in_scale`` and ``out_scale`` repeat it for every column;
    - ``decoder(s) (n_latents, d_s)``, ``reader(s) (n_latents, d_s)``, ``bias(s) (d_s,)``: decoder rows, encoder rows, and bias
      of one site, in raw units: ``x_hat^s = z @ decoder(s) + bias(s)``, with ``z`` from ``encode``;
    - ``decoder_norms() (n_latents, sites)``: norms of decoder rows at each site, in normalized units, so that sites compare;
    - ``relative_norms() (n_latents, sites)``: the same per square root of a site's width, divided by their sum over sites. For
      ``[base, tuned]``, column 1 is
      ``|d_tuned| / (|d_base| + |d_tuned|)``: 0 for latents of the base model alone, 1 for those of the tuned one.

    >>> import torch
    >>> from sparsary import ENCODERS, Crosscoder
    >>> crosscoder = Crosscoder([8, 6], n_latents=32, encoder=ENCODERS["topk"](k=4), names=["layer 1", "layer 2"])
    >>> x = [torch.randn(10, 8), torch.randn(10, 6)]
    >>> code = crosscoder.encode(x)
    >>> [tuple(x_hat.shape) for x_hat in crosscoder(x)], tuple(crosscoder.relative_norms().shape)
    ([(10, 8), (10, 6)], (32, 2))

    Sources: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"; for selection by batch in
    place of a penalty, Minder et al. 2025, arXiv:2504.02922.

    Args:
        widths: Width of every site.
        names: Name of every site, by default their numbers.
    """

    def __init__(
        self,
        widths: Sequence[int],
        n_latents: int,
        encoder: Encoder,
        names: Sequence[str] | None = None,
        apply_b_dec_to_input: bool = True,
    ):
        widths, names = list(widths), list(map(str, range(len(widths))) if names is None else names)
        if len(widths) < 2 or not all(isinstance(width, int) and width > 0 for width in widths):
            raise ValueError(f"dictionary.widths: expected two or more sites of width 1 or more, got {widths}.")
        if len(names) != len(widths) or len(set(names)) < len(names):
            raise ValueError(f"dictionary.names: expected {len(widths)} names, one per site, all different, got {names}.")
        self._refuse(encoder, apply_b_dec_to_input)
        d = sum(widths)
        super().__init__(d, d, n_latents, encoder, tied=encoder.tied, widths=[(width, width) for width in widths])
        self.names, self.widths, self.apply_b_dec_to_input = tuple(names), tuple(widths), apply_b_dec_to_input
        self.register_buffer("in_scale", torch.ones(d))
        self.register_buffer("out_scale", torch.ones(d))
        if self.W_enc is not None and not self.W_dec.is_meta:
            with torch.no_grad():
                self.W_enc.copy_(self.W_dec)

    @staticmethod
    def _refuse(encoder: Encoder, centred: bool) -> None:
        """Raise ``ValueError`` if the encoder compares reconstructions with inputs that have another centre."""
        if (encoder.for_saes or encoder.tied) and not centred:
            name = encoder_spec(encoder)["name"]
            raise ValueError(f"dictionary.apply_b_dec_to_input: expected true with encoder {name}, got false.")

    @property
    def shift(self) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    def bypass(self, x: Float[Tensor, "..."] | None = None, site: int | None = None) -> Float[Tensor, "..."]:
        return self.b_dec if site is None else self.b_dec[self.sites[site].writes]

    def arguments(self) -> dict[str, Any]:
        rare = {} if self.apply_b_dec_to_input else {"apply_b_dec_to_input": False}
        sizes = {"widths": list(self.widths), "n_latents": self.n_latents, "names": list(self.names)}
        return {"kind": "crosscoder", **sizes, **rare, "encoder": encoder_spec(self.encoder)}

    @property
    def scales(self) -> Float[Tensor, " sites"]:
        """Scale of every site, by which its activations are divided."""
        return torch.stack([self.in_scale[site.reads.start] for site in self.sites])

    def split(self, y: Float[Tensor, "... d_in"]) -> list[Tensor]:
        """Return concatenated activations as one tensor per site."""
        return list(y.split(list(self.widths), dim=-1))

    def decoder(self, site: int | str) -> Float[Tensor, "n_latents d_site"]:
        """Return the decoder rows of one site, named or numbered, in raw units."""
        here = self.sites[self.number(site)].writes
        return self.W_dec[:, here] * self.out_scale[here]

    def reader(self, site: int | str) -> Float[Tensor, "n_latents d_site"]:
        """Return the encoder rows of one site: pre-activations are the sum over sites of ``reader(s) x^s``, plus a constant."""
        here = self.sites[self.number(site)].reads
        return self.weights.W_enc[:, here] / self.in_scale[here]

    def bias(self, site: int | str) -> Float[Tensor, " d_site"]:
        """Return the decoder bias of one site, in raw units."""
        here = self.sites[self.number(site)].writes
        return self.b_dec[here] * self.out_scale[here]

    def decoder_norms(self) -> Float[Tensor, "n_latents sites"]:
        """Return the norm of every latent's decoder row at every site, in normalized units."""
        return torch.stack([part.norm(dim=-1) for part in self.split(self.W_dec)], dim=-1)

    def relative_norms(self) -> Float[Tensor, "n_latents sites"]:
        """Return every latent's decoder norms divided by their sum over sites; equal shares where all are 0.

        Norms are root mean squares over a site's columns, so that a wide site counts no more than a narrow one.
        """
        norms = self.decoder_norms() / torch.tensor(self.widths, device=self.device).sqrt()
        total = norms.sum(-1, keepdim=True)
        return torch.where(total > 0, F.normalize(norms, p=1, dim=-1), torch.full_like(norms, 1 / len(self.widths)))

    def number(self, site: int | str) -> int:
        """Return the number of a site.

        Raises:
            ValueError: If there is no such site.
        """
        found = self.names.index(site) if isinstance(site, str) and site in self.names else site
        if not isinstance(found, int) or not 0 <= found < len(self.names):
            raise ValueError(f"site: expected one of {', '.join(self.names)}, or its number, got {site!r}.")
        return found
