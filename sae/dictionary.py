"""SparseDictionary: weights, encode and decode, common to everything that is learned here."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .batch_encoder import BatchWide
from .encoder import Encoder, Weights, scorer
from .files import sha256, write_json, write_tensors
from .metrics import Moments
from .pursuit import PURSUITS
from .row_norm import ROW_NORMS, NormedRows
from .screen import Screen
from .sparse_code import SparseCode
from .sparse_ops import decode


@dataclass(frozen=True)
class LatentBlock:
    """Latents that read the same columns of the input and write to the same columns of the output."""

    latents: slice
    reads: slice
    writes: slice
    weights: Weights


@dataclass(frozen=True)
class Site:
    """One place of a model that a dictionary stands in for: the columns it reads there, and those it is to reproduce."""

    reads: slice
    writes: slice


class SparseDictionary(nn.Module, ABC):
    """Latents that read from ``d_in`` and write to ``d_out``, some or all of either.

    Inputs and outputs are raw activations. Inside, both sides are divided by their scale (buffers, saved with the
    weights), so learning rates and losses mean the same on every model; atoms have unit norm there. A dictionary of several
    sites has their activations side by side in one row.
    """

    in_scale: Float[Tensor, "..."]
    out_scale: Float[Tensor, "..."]

    def __init__(self, d_in: int, d_out: int, n_latents: int, encoder: Encoder):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_out", d_out), ("n_latents", n_latents)):
            if size < 1:
                raise ValueError(f"dictionary.{name}: expected at least 1, got {size}.")
        self.d_in, self.d_out, self.n_latents = d_in, d_out, n_latents
        self.encoder = encoder
        # Set by training, for training: a checkpoint knows nothing of it.
        self.screen: Screen | None = None
        self.register_buffer("in_scale", torch.ones(()))
        self.register_buffer("out_scale", torch.ones(()))

    @property
    @abstractmethod
    def tied(self) -> bool:
        """Whether the encoder's rows are the atoms."""

    @property
    @abstractmethod
    def blocks(self) -> list[LatentBlock]:
        """The weights, by what they read and write. Row ``i`` of a block's matrices is its latent ``i``."""

    @property
    @abstractmethod
    def sites(self) -> list[Site]:
        """The places it stands in for, in the order in which a model comes to them."""

    @property
    @abstractmethod
    def atoms(self) -> Float[Tensor, "n_latents d_out"]:
        """What every latent writes, in normalised units."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What ``dictionary.json`` must hold to rebuild the object, its encoder included."""

    @abstractmethod
    def centre(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """The encoder's view of normalised inputs."""

    @abstractmethod
    def centre_on(self, inputs: Float[Tensor, " d_in"], outputs: Float[Tensor, " d_out"]) -> None:
        """Start from these centres of the data, in normalised units."""

    @abstractmethod
    def code_of(
        self, x: Float[Tensor, "tokens d_in"], grad: Float[Tensor, "tokens d_out"] | None, through: bool = False
    ) -> SparseCode:
        """The code of normalised, centred inputs and of the normalised gradient at the output.

        ``through`` says that gradients are to reach what the inputs were made of, not the dictionary alone.
        """

    @abstractmethod
    def encode_at(self, site: int, x: Float[Tensor, "..."]) -> SparseCode:
        """The code of raw activations of one site ``(tokens, width)``, its latents numbered from 0.

        Reads nothing of other sites, so that a model can be run with the dictionary in place.
        """

    @abstractmethod
    def decode_at(self, site: int, codes: list[SparseCode], x: Float[Tensor, "..."] | None = None) -> Float[Tensor, "..."]:
        """What a site is to write, in raw units, from the codes of all sites up to it and its own raw input."""

    @abstractmethod
    def rescaled(self, code: SparseCode, x: Float[Tensor, "tokens d_in"]) -> SparseCode:
        """A code in the output's units, where each token's inputs ``x`` were brought to a scale of their own."""

    @abstractmethod
    def decode(self, code: SparseCode, x: Float[Tensor, "tokens d_in"] | None = None) -> Float[Tensor, "tokens d_out"]:
        """The reconstruction of a code, in raw units. ``x`` is the raw input it came from.

        Raises:
            ValueError: If there is a path past the latents and no ``x``.
        """

    @abstractmethod
    def bypass(self, x: Float[Tensor, "tokens d_in"] | None = None) -> Float[Tensor, "... d_out"]:
        """What reaches the output past the latents, in normalised units: the bias, and whatever is linear in raw ``x``."""

    @abstractmethod
    def calibrate(self, inputs: Iterable[Float[Tensor, "tokens d_in"]]) -> bool:
        """Set from raw inputs what ``eval()`` mode has in place of the rest of a batch; False if there is nothing of it."""

    @abstractmethod
    def spread(self, moments: Moments) -> Float[Tensor, "..."]:
        """What squared errors are divided by so that the mean of the targets has an error of 1: a number, or one per column."""

    @property
    def device(self) -> torch.device:
        return self.in_scale.device

    def encode(self, x: Float[Tensor, "..."], grad: Float[Tensor, "tokens d_out"] | None = None) -> SparseCode:
        """The sparse code of raw activations ``(tokens, d_in)``; ``grad`` is the loss's gradient at the output.

        Values are in normalised units: one unit is ``out_scale`` of output.

        Raises:
            ValueError: If ``x`` is not ``(tokens, d_in)``.
        """
        self.require_width(x, self.d_in)
        if grad is not None:
            grad = grad * self.out_scale
        return self.rescaled(self.code_of(self.normalised(x), grad, x.requires_grad), x)

    def normalised(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """Raw inputs as the encoder sees them."""
        return self.centre(x.to(self.in_scale.dtype) / self.in_scale)

    def require_width(self, x: Float[Tensor, "..."], width: int) -> None:
        """Raise ``ValueError`` unless ``x`` is ``(tokens, width)``."""
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(
                f"x: expected (tokens, {width}), got {tuple(x.shape)}. Flatten batch and position into tokens, "
                "and check that the activations come from the hook this dictionary was trained on."
            )

    @torch.no_grad()
    def pursue(self, y: Float[Tensor, "tokens d_out"], k: int, method: str) -> SparseCode:
        """The code of ``k`` latents that a pursuit finds for targets in raw units, in place of the encoder's own.

        ``method`` is one of ``sae.pursuit.PURSUITS``. Works for any dictionary: only atoms and bias are read.

        Raises:
            ValueError: If there is no such method, ``k`` is below 1, or what is to be written depends on the input too.
        """
        if method not in PURSUITS:
            raise ValueError(f"method: expected one of {', '.join(PURSUITS)}, got {method!r}.")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}.")
        atoms = self.atoms
        norms = atoms.norm(dim=-1).clamp_min(torch.finfo(atoms.dtype).tiny)
        code = PURSUITS[method](y.to(atoms.dtype) / self.out_scale - self.bypass(), atoms / norms[:, None], k)
        return SparseCode(code.latents, code.values / norms[code.latents], code.starts)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "tokens d_out"]:
        """Encode, then decode."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def renormalize(self) -> None:
        """Bring every atom back to unit norm, where the encoder wants unit atoms."""
        if self.encoder.unit_atoms:
            for block in self.blocks:
                F.normalize(block.weights.W_dec, dim=-1, out=block.weights.W_dec)

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Bring free atoms to unit norm and let the encoder make up for it; the output stays the same.

        Only for encoders whose values scale with their rows, which those with free atoms are.
        """
        for W_enc, b_enc, W_dec in ((b.weights.W_enc, b.weights.b_enc, b.weights.W_dec) for b in self.blocks):
            norms = W_dec.norm(dim=-1).clamp_min(torch.finfo(W_dec.dtype).tiny)
            W_dec.div_(norms[:, None])
            if b_enc is not None:
                W_enc.mul_(norms[:, None])
                b_enc.mul_(norms)

    @torch.no_grad()
    def project_grad(self) -> None:
        """Remove from each atom's gradient the part along the atom, which renormalising would undo anyway."""
        for W_dec in (block.weights.W_dec for block in self.blocks):
            if W_dec.grad is not None and self.encoder.unit_atoms:
                along = (W_dec.grad * W_dec).sum(-1, keepdim=True)
                W_dec.grad.addcmul_(along, W_dec, value=-1.0)

    def save(self, directory: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write ``dictionary.safetensors`` and ``dictionary.json``; see ``sae.checkpoint``."""
        # Imported here because checkpoint.py rebuilds dictionaries and so imports this module.
        from .dictionary import save_dictionary

        save_dictionary(self, directory, provenance)


class OneSiteDictionary(SparseDictionary, ABC):
    """One matrix to read with and one to write with: what SAEs and transcoders share.

    Row ``i`` of ``W_enc`` and ``W_dec`` is latent ``i``. ``row_norm``, one of ``sae.row_norm.ROW_NORMS``, brings every
    token to a scale of its own before the encoder centres it; loaded dictionaries have that, trained ones do not.
    """

    def __init__(self, d_in: int, d_out: int, n_latents: int, encoder: Encoder, row_norm: str | None = None):
        super().__init__(d_in, d_out, n_latents, encoder)
        if row_norm is not None and row_norm not in ROW_NORMS:
            raise ValueError(f"dictionary.row_norm: expected null or one of {', '.join(ROW_NORMS)}, got {row_norm!r}.")
        self.row_norm = row_norm
        encoder.prepare(n_latents)
        # A tied encoder reads with the atoms themselves, or pursues what it reads with; it has no use for a bias.
        self.W_enc = None if self.tied else nn.Parameter(torch.empty(n_latents, d_in))
        self.b_enc = None if encoder.tied else nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(torch.empty(n_latents, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        # On the meta device there are no numbers, and drawing them there would first import torch's compiler.
        if not self.W_dec.is_meta:
            nn.init.normal_(self.W_dec)
            F.normalize(self.W_dec.data, dim=-1, out=self.W_dec.data)
            if self.W_enc is not None:
                nn.init.normal_(self.W_enc, std=d_in**-0.5)

    @property
    @abstractmethod
    def shift(self) -> Tensor | None:
        """What ``centre`` subtracts."""

    def centre(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        rows = x if self.row_norm is None else ROW_NORMS[self.row_norm](x).rows
        return rows if self.shift is None else rows - self.shift

    def normed_rows(self, x: Float[Tensor, "tokens d_in"]) -> NormedRows:
        """Raw inputs as ``row_norm``, which there must be, leaves them."""
        assert self.row_norm is not None
        return ROW_NORMS[self.row_norm](x.to(self.in_scale.dtype) / self.in_scale)

    @property
    def weights(self) -> Weights:
        """What the encoder may read."""
        screen = self.screen if self.training else None
        return Weights(self.W_dec if self.W_enc is None else self.W_enc, self.b_enc, self.W_dec, screen, self.shift)

    @property
    def blocks(self) -> list[LatentBlock]:
        return [LatentBlock(slice(0, self.n_latents), slice(0, self.d_in), slice(0, self.d_out), self.weights)]

    @property
    def sites(self) -> list[Site]:
        return [Site(slice(0, self.d_in), slice(0, self.d_out))]

    @property
    def atoms(self) -> Float[Tensor, "n_latents d_out"]:
        return self.W_dec

    def code_of(
        self, x: Float[Tensor, "tokens d_in"], grad: Float[Tensor, "tokens d_out"] | None, through: bool = False
    ) -> SparseCode:
        # The shift's gradient has a short cut, for which gradients end at x.
        weights = replace(self.weights, shift=None) if through else self.weights
        return self.encoder(x, weights, grad)

    def encode_at(self, site: int, x: Float[Tensor, "..."]) -> SparseCode:
        return self.encode(x)

    def decode(self, code: SparseCode, x: Float[Tensor, "tokens d_in"] | None = None) -> Float[Tensor, "tokens d_out"]:
        # In one pass: this is as large as the batch.
        return torch.addcmul(self.bypass(x) * self.out_scale, decode(code, self.W_dec), self.out_scale)

    def decode_at(self, site: int, codes: list[SparseCode], x: Float[Tensor, "..."] | None = None) -> Float[Tensor, "..."]:
        return self.decode(codes[site], x)

    @torch.no_grad()
    def calibrate(self, inputs: Iterable[Float[Tensor, "tokens d_in"]]) -> bool:
        if not isinstance(self.encoder, BatchWide):
            return False
        self.encoder.calibrate(scorer(self.normalised(x), self.weights) for x in inputs)
        return True

    def spread(self, moments: Moments) -> Float[Tensor, "..."]:
        return torch.tensor(moments.variance())


FORMAT = "sparsary-dictionary"
FORMAT_VERSION = 1
WEIGHTS_FILE = "dictionary.safetensors"
CONFIG_FILE = "dictionary.json"


def save_dictionary(dictionary: SparseDictionary, directory: str | Path, provenance: dict[str, Any] | None = None) -> None:
    """Write both files, each whole or not at all; the weights go first.

    Raises:
        OSError: If the folder cannot be written; what it held stays as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dictionary": dictionary.arguments(),
        "provenance": provenance or {},
    }
    write_tensors(directory / WEIGHTS_FILE, dictionary.state_dict(), {"config": json.dumps(config)})
    digest = {"weights_sha256": sha256(directory / WEIGHTS_FILE)}
    write_json(directory / CONFIG_FILE, config | digest)
