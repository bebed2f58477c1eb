"""SparseDictionary: weights, encode and decode, common to everything that is learned here."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .code import SparseCode
from .encoder import Encoder, Weights
from .pursuit import PURSUITS
from .screen import Screen
from .sparse_ops import decode


class SparseDictionary(nn.Module, ABC):
    """Latents that read from ``d_in`` and write to ``d_out``; row ``i`` of ``W_enc`` and ``W_dec`` is latent ``i``.

    Inputs and outputs are raw activations. Inside, both sides are divided by their scale (buffers, saved with the
    weights), so learning rates and losses mean the same on every model; atoms have unit norm there.
    """

    in_scale: Float[Tensor, ""]
    out_scale: Float[Tensor, ""]

    def __init__(self, d_in: int, d_out: int, n_latents: int, encoder: Encoder):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_out", d_out), ("n_latents", n_latents)):
            if size < 1:
                raise ValueError(f"dictionary.{name}: expected at least 1, got {size}.")
        encoder.prepare(n_latents)
        self.d_in, self.d_out, self.n_latents = d_in, d_out, n_latents
        self.encoder = encoder
        # A tied encoder reads with the atoms themselves.
        self.W_enc = None if self.tied else nn.Parameter(torch.empty(n_latents, d_in))
        self.b_enc = None if self.tied else nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(torch.empty(n_latents, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("in_scale", torch.ones(()))
        self.register_buffer("out_scale", torch.ones(()))
        # Set by training, for training: a checkpoint knows nothing of it.
        self.screen: Screen | None = None
        # On the meta device there are no numbers, and drawing them there would first import torch's compiler.
        if not self.W_dec.is_meta:
            nn.init.normal_(self.W_dec)
            F.normalize(self.W_dec.data, dim=-1, out=self.W_dec.data)
            if self.W_enc is not None:
                nn.init.normal_(self.W_enc, std=d_in**-0.5)

    @property
    @abstractmethod
    def tied(self) -> bool:
        """Whether the encoder's rows are the atoms."""

    @abstractmethod
    def centre(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """The encoder's view of normalised inputs."""

    @property
    @abstractmethod
    def shift(self) -> Tensor | None:
        """What ``centre`` subtracts, if that is all it does."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What ``dictionary.json`` must hold to rebuild the object, its encoder included."""

    @property
    def weights(self) -> Weights:
        screen = self.screen if self.training else None
        return Weights(self.W_dec if self.W_enc is None else self.W_enc, self.b_enc, self.W_dec, screen, self.shift)

    def encode(self, x: Float[Tensor, "..."], grad: Float[Tensor, "tokens d_in"] | None = None) -> SparseCode:
        """The sparse code of raw activations ``(tokens, d_in)``.

        Values are in normalised units: one unit is ``out_scale`` of output.

        Raises:
            ValueError: If ``x`` is not ``(tokens, d_in)``.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(
                f"x: expected (tokens, {self.d_in}), got {tuple(x.shape)}. Flatten batch and position into tokens, "
                "and check that the activations come from the hook this dictionary was trained on."
            )
        if grad is not None:
            grad = grad * self.in_scale
        x = x.to(self.W_dec.dtype) / self.in_scale
        return self.encoder(self.centre(x), self.weights, grad)

    @torch.no_grad()
    def pursue(self, y: Float[Tensor, "tokens d_out"], k: int, method: str) -> SparseCode:
        """The code of ``k`` latents that a pursuit finds for targets in raw units, in place of the encoder's own.

        ``method`` is one of ``sae.pursuit.PURSUITS``. Works for any dictionary: only the atoms are read.

        Raises:
            ValueError: If there is no such method, or ``k`` is below 1.
        """
        if method not in PURSUITS:
            raise ValueError(f"method: expected one of {', '.join(PURSUITS)}, got {method!r}.")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}.")
        norms = self.W_dec.norm(dim=-1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        code = PURSUITS[method](y.to(self.W_dec.dtype) / self.out_scale - self.b_dec, self.W_dec / norms[:, None], k)
        return SparseCode(code.latents, code.values / norms[code.latents], code.starts)

    def decode(self, code: SparseCode) -> Float[Tensor, "tokens d_out"]:
        """The reconstruction of a code, in raw units."""
        # In one pass: this is as large as the batch.
        return torch.addcmul(self.b_dec * self.out_scale, decode(code, self.W_dec), self.out_scale)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "tokens d_out"]:
        """Encode, then decode."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def renormalize(self) -> None:
        """Bring every atom back to unit norm, where the encoder wants unit atoms."""
        if self.encoder.unit_atoms:
            F.normalize(self.W_dec, dim=-1, out=self.W_dec)

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Bring free atoms to unit norm and let the encoder make up for it; the output stays the same.

        Only for encoders whose values scale with their rows, which those with free atoms are.
        """
        norms = self.W_dec.norm(dim=-1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec.div_(norms[:, None])
        if self.W_enc is not None and self.b_enc is not None:
            self.W_enc.mul_(norms[:, None])
            self.b_enc.mul_(norms)

    @torch.no_grad()
    def project_grad(self) -> None:
        """Remove from each atom's gradient the part along the atom, which renormalising would undo anyway."""
        if self.W_dec.grad is not None and self.encoder.unit_atoms:
            along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1.0)

    def save(self, directory: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write ``dictionary.safetensors`` and ``dictionary.json``; see ``sae.checkpoint``."""
        # Imported here because checkpoint.py rebuilds dictionaries and so imports this module.
        from .checkpoint import save_dictionary

        save_dictionary(self, directory, provenance)
