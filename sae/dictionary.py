"""SparseDictionary: weights, encode and decode, common to everything that is learned here."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .batch_encoder import BatchWide
from .encoder import Encoder, Weights, scorer
from .files import sha256, write_json, write_tensors
from .metrics import Moments
from .penalised import Penalised, cut_for
from .pursuit import PURSUITS
from .row_norm import ROW_NORMS, NormedRows
from .rows import Rows, as_rows
from .screen import Screen
from .sparse_code import SparseCode
from .sparse_ops import decode
from .training_usage import TrainingUsage

FORMAT = "sparsary-dictionary"
FORMAT_VERSION = 1
WEIGHTS_FILE = "dictionary.safetensors"
CONFIG_FILE = "dictionary.json"


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
    sites has their activations side by side in one row, of equal width each, and a scale for every column.

    A kind says which weights it has (``blocks``, ``shift``, ``bypass``), how it chooses latents (``code_of``,
    ``calibrate``), and what rebuilds it (``arguments``). Everything else follows from these.

    Args:
        n_sites: Places of a model that it stands in for. The latents of block ``i`` read site ``i``, and write to it and
            maybe to later ones.
        row_norm: One of ``sae.row_norm.ROW_NORMS``, which brings every token to a scale of its own before it is centred;
            loaded dictionaries have that, trained ones do not.
    """

    # Whether a code's values take back what ``row_norm`` did to their token, because the output is of the input's kind.
    undoes_row_norm: ClassVar[bool] = False

    in_scale: Float[Tensor, "..."]
    out_scale: Float[Tensor, "..."]
    b_dec: Float[Tensor, " d_out"]

    def __init__(self, d_in: int, d_out: int, n_latents: int, encoder: Encoder, n_sites: int = 1, row_norm: str | None = None):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_out", d_out), ("n_latents", n_latents)):
            if size < 1:
                raise ValueError(f"dictionary.{name}: expected at least 1, got {size}.")
        if row_norm is not None and row_norm not in ROW_NORMS:
            raise ValueError(f"dictionary.row_norm: expected null or one of {', '.join(ROW_NORMS)}, got {row_norm!r}.")
        self.d_in, self.d_out, self.n_latents, self.n_sites, self.row_norm = d_in, d_out, n_latents, n_sites, row_norm
        self.encoder = encoder
        # Set by training, for training: a checkpoint knows nothing of it.
        self.screen: Screen | None = None
        # Set by training, for whoever loads the checkpoint.
        self.training_usage: TrainingUsage | None = None
        self.register_buffer("in_scale", torch.ones(()))
        self.register_buffer("out_scale", torch.ones(()))

    @property
    @abstractmethod
    def blocks(self) -> list[LatentBlock]:
        """The weights, by what they read and write. Row ``i`` of a block's matrices is its latent ``i``."""

    @property
    @abstractmethod
    def shift(self) -> Float[Tensor, " d_in"] | None:
        """The vector that normalised inputs are centred by; ``None`` leaves them as they are."""

    @abstractmethod
    def bypass(self, x: Float[Tensor, "..."] | None = None, site: int | None = None) -> Float[Tensor, "..."]:
        """Return the skip path and bias, which reach the output past the latents, in normalised units.

        Args:
            x: The raw input, ``(tokens, d_in)``, or what the site reads of it.
            site: Return the columns that this site writes, from its own input; by default all columns.

        Raises:
            ValueError: If the result depends on the input and there is no ``x``.
        """

    @abstractmethod
    def code_of(
        self,
        x: Float[Tensor, "tokens d"],
        grad: Float[Tensor, "tokens d_out"] | None = None,
        through: bool = False,
        site: int | None = None,
    ) -> SparseCode:
        """Return the code of normalised, centred inputs and of the normalised gradient at the output.

        Args:
            x: Inputs of all sites, or of one.
            grad: Read by encoders that need it.
            through: Let gradients reach what the inputs were made of, not the dictionary alone.
            site: The only site, whose latents are then numbered from 0. Nothing of other sites is read.
        """

    @abstractmethod
    def calibrate(self, inputs: Iterable[Float[Tensor, "tokens d_in"]]) -> bool:
        """Set the thresholds of ``eval()`` mode from raw inputs; return False if there are none to set."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return what ``dictionary.json`` must hold to rebuild the object, its encoder included."""

    @property
    def sites(self) -> list[Site]:
        """The places it stands in for, in the order in which a model comes to them."""
        reads, writes = self.d_in // self.n_sites, self.d_out // self.n_sites
        return [Site(slice(i * reads, (i + 1) * reads), slice(i * writes, (i + 1) * writes)) for i in range(self.n_sites)]

    @property
    def tied(self) -> bool:
        """Whether the encoder's rows are the atoms."""
        return any(block.weights.W_enc is block.weights.W_dec for block in self.blocks)

    @property
    def atoms(self) -> Float[Tensor, "n_latents d_out"]:
        """What every latent writes, in normalised units: zero where it does not write, as large as if all wrote everywhere."""
        written = [self._padded(block.weights.W_dec, block.writes) for block in self.blocks]
        return written[0] if len(written) == 1 else torch.cat(written)

    @property
    def device(self) -> torch.device:
        return self.in_scale.device

    @torch.no_grad()
    def centre_on(self, inputs: Float[Tensor, " d_in"], outputs: Float[Tensor, " d_out"]) -> None:
        """Start from these centres of the data, in normalised units."""
        if self.shift is not None and self.shift is not self.b_dec:
            self.shift.copy_(inputs)
        self.b_dec.copy_(outputs)

    def error_scale(self, moments: Moments) -> Float[Tensor, "..."]:
        """Return the normalizer that turns squared errors into fvu: predicting the mean of the targets has an error of 1.

        One number, the variance of the targets; with a scale for every column also one of these for every column.
        """
        if self.out_scale.ndim == 0:
            return torch.tensor(moments.variance())
        columns = torch.empty(self.d_out)
        for site in self.sites:
            # Divided by the number of sites the sum of their fvus is a mean, which compares with one site's.
            columns[site.writes] = float(moments.deviation[site.writes].sum()) / max(moments.count, 1) * self.n_sites
        return columns

    def encode(self, x: Rows, grad: Rows | None = None) -> SparseCode:
        """Return the sparse code of raw activations ``(tokens, d_in)``; ``grad`` is the loss's gradient at the output.

        Tensors and arrays of any precision are taken. Values are in normalised units: one unit is ``out_scale`` of output.

        Raises:
            ValueError: If ``x`` is not ``(tokens, d_in)``.
        """
        x = self.require_width(x, self.d_in)
        if grad is not None:
            grad = self._tensor(grad, "grad") * self.out_scale
        return self._in_output_units(self.code_of(self.normalised(x), grad, x.requires_grad), x)

    def encode_at(self, site: int, x: Rows) -> SparseCode:
        """Return the code of raw activations of one site ``(tokens, width)``, its latents numbered from 0.

        Reads nothing of other sites, so that a model can be run with the dictionary in place.
        """
        place = self.sites[site].reads
        x = self.require_width(x, place.stop - place.start)
        return self._in_output_units(self.code_of(self.normalised(x, site), None, x.requires_grad, site), x)

    def normalised(self, x: Float[Tensor, "tokens d"], site: int | None = None) -> Float[Tensor, "tokens d"]:
        """Return raw inputs, of all sites or of one, as the encoder sees them."""
        scale = self.in_scale if site is None or self.in_scale.ndim == 0 else self.in_scale[self.sites[site].reads]
        return self.centre(x.to(self.in_scale.dtype) / scale, site)

    def centre(self, x: Float[Tensor, "tokens d"], site: int | None = None) -> Float[Tensor, "tokens d"]:
        """Return the encoder's view of normalised inputs."""
        rows = x if self.row_norm is None else ROW_NORMS[self.row_norm](x).rows
        if self.shift is None:
            return rows
        return rows - (self.shift if site is None else self.shift[self.sites[site].reads])

    def normed_rows(self, x: Float[Tensor, "tokens d_in"]) -> NormedRows:
        """Return raw inputs as ``row_norm``, which there must be, leaves them."""
        assert self.row_norm is not None
        return ROW_NORMS[self.row_norm](x.to(self.in_scale.dtype) / self.in_scale)

    def decode(self, code: SparseCode | Rows, x: Rows | None = None) -> Float[Tensor, "tokens d_out"]:
        """Return the reconstruction of a code, in raw units. ``x`` is the raw input it came from.

        Args:
            code: As ``encode`` gives it, or dense, ``(tokens, n_latents)``.

        Raises:
            ValueError: If there is a path past the latents and no ``x``, or a dense code has another width.
        """
        if not isinstance(code, SparseCode):
            code = self._sparse(self._tensor(code, "code"))
        x = None if x is None else self._tensor(x)
        # Adding to slices in place would copy the whole gradient for every block.
        written = [self._padded(decode(part, block.weights.W_dec), block.writes) for block, part in self._parts(code)]
        total = written[0] if len(written) == 1 else torch.stack(written).sum(0)
        # In one pass: this is as large as the batch.
        return torch.addcmul(self.bypass(x) * self.out_scale, total, self.out_scale)

    def decode_at(self, site: int, codes: list[SparseCode], x: Rows | None = None) -> Float[Tensor, "..."]:
        """Return what a site is to write, in raw units, from the codes of all sites up to it and its own raw input."""
        x = None if x is None else self._tensor(x)
        if self.out_scale.ndim == 0:
            # One scale for all columns: there is one site.
            return self.decode(codes[site], x)
        place, total = self.sites[site].writes, self.bypass(x, site)
        for block, code in zip(self.blocks, codes[: site + 1], strict=False):
            there = slice(place.start - block.writes.start, place.stop - block.writes.start)
            total = total + decode(code, block.weights.W_dec[:, there].contiguous())
        return total * self.out_scale[place]

    def _parts(self, code: SparseCode) -> Iterator[tuple[LatentBlock, SparseCode]]:
        """Yield each block with its entries of a code, latents numbered from 0."""
        for block in self.blocks:
            first, last = block.latents.start, block.latents.stop
            if (first, last) == (0, self.n_latents):
                yield block, code
                continue
            part = code.where((code.latents >= first) & (code.latents < last))
            yield block, SparseCode(part.latents - first, part.values, part.starts)

    def _padded(self, columns: Tensor, writes: slice) -> Tensor:
        """Return columns of the output as the whole of it, zero elsewhere."""
        around = (writes.start, self.d_out - writes.stop)
        return F.pad(columns, around) if any(around) else columns

    def _in_output_units(self, code: SparseCode, x: Tensor) -> SparseCode:
        """Return a code whose values take back what ``row_norm`` did to their token, where they are to."""
        if self.row_norm is None or not self.undoes_row_norm:
            return code
        scale = self.normed_rows(x).scale.squeeze(1)[code.token_ids()]
        return replace(code, values=code.values * scale.to(code.values.dtype))

    def _tensor(self, values: Rows, name: str = "x") -> Float[Tensor, "..."]:
        """Return what a caller gave as a tensor; one that is a tensor keeps its precision and its gradient."""
        return values if isinstance(values, Tensor) else as_rows(values, name, self.device)

    def _sparse(self, dense: Float[Tensor, "..."]) -> SparseCode:
        """Return a dense code as a sparse one."""
        if dense.ndim != 2 or dense.shape[1] != self.n_latents:
            raise ValueError(
                f"code: expected a SparseCode, as encode gives it, or (tokens, {self.n_latents}), got {tuple(dense.shape)}."
            )
        cells = dense.detach().reshape(-1).nonzero().squeeze(1)
        values = dense.reshape(-1)[cells].to(self.out_scale.dtype)
        return SparseCode.from_cells(cells, values, len(dense), self.n_latents)

    def require_width(self, x: Rows, width: int, name: str = "x") -> Float[Tensor, "..."]:
        """Return ``x`` as a tensor; raise ``ValueError`` unless it is ``(tokens, width)``."""
        x = self._tensor(x, name)
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(
                f"{name}: expected (tokens, {width}), got {tuple(x.shape)}. Flatten batch and position into tokens, "
                "and check that the activations come from the hook this dictionary was trained on."
            )
        return x

    @torch.no_grad()
    def pursue(self, y: Rows, k: int, method: str) -> SparseCode:
        """The code of ``k`` latents that a pursuit finds for targets in raw units, in place of the encoder's own.

        ``method`` is one of ``sae.pursuit.PURSUITS``. Works for any dictionary: only atoms and bias are read.

        Raises:
            ValueError: If there is no such method, ``k`` is below 1, ``y`` is not ``(tokens, d_out)``, or what is to be written
                depends on the input too.
        """
        if method not in PURSUITS:
            raise ValueError(f"method: expected one of {', '.join(PURSUITS)}, got {method!r}.")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}.")
        y, atoms = self.require_width(y, self.d_out, "y"), self.atoms
        norms = atoms.norm(dim=-1).clamp_min(torch.finfo(atoms.dtype).tiny)
        code = PURSUITS[method](y.to(atoms.dtype) / self.out_scale - self.bypass(), atoms / norms[:, None], k)
        code = SparseCode.from_steps(code.latents.view(len(y), k), code.values.view(len(y), k))
        return SparseCode(code.latents, code.values / norms[code.latents], code.starts)

    def forward(self, x: Rows) -> Float[Tensor, "tokens d_out"]:
        """Encode, then decode."""
        x = self._tensor(x)
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
        """Write ``dictionary.safetensors`` and ``dictionary.json``, each whole or not at all; the weights go first.

        With a ``training_usage`` there is ``usage.safetensors`` besides.

        Raises:
            OSError: If the folder cannot be written; what it held stays as it was.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dictionary": self.arguments(),
            "provenance": provenance or {},
        }
        if self.training_usage is not None:
            config["training_usage"] = self.training_usage.about
        write_tensors(directory / WEIGHTS_FILE, self.state_dict(), {"config": json.dumps(config)})
        if self.training_usage is not None:
            self.training_usage.save(directory)
        digest = {"weights_sha256": sha256(directory / WEIGHTS_FILE)}
        write_json(directory / CONFIG_FILE, config | digest)


def required_input(x: Tensor | None, because: str) -> Tensor:
    """Return the raw input that decoding needs.

    Raises:
        ValueError: If there is none.
    """
    if x is None:
        raise ValueError(f"x: expected the raw input, because {because}, got none. Call decode(code, x).")
    return x


@torch.no_grad()
def calibrate_cuts(
    encoders: Sequence[Encoder],
    dictionary: SparseDictionary,
    inputs: Iterable[Float[Tensor, "tokens d_in"]],
    together: bool = False,
) -> bool:
    """Move the cuts of penalised encoders so that raw inputs have the target l0; return False if they have no target.

    Args:
        encoders: One for each of the dictionary's blocks.
        dictionary: Whose weights they read.
        inputs: Training tokens.
        together: Move all cuts by one number, for the target of all blocks together.

    Raises:
        ValueError: If there is no token.
    """
    penalised = [encoder for encoder in encoders if isinstance(encoder, Penalised)]
    target = penalised[0].target_l0 if penalised else None
    if target is None:
        return False
    blocks, tokens = dictionary.blocks, 0
    pools: list[list[Tensor]] = [[] for _ in blocks]
    for batch in inputs:
        x = dictionary.normalised(batch)
        tokens += len(x)
        for encoder, block, pool in zip(penalised, blocks, pools, strict=True):
            pool.append(encoder.largest_margins(scorer(x[:, block.reads], block.weights), block.weights))
    if not tokens:
        raise ValueError("encoder: expected tokens to calibrate the thresholds on, got none.")
    wanted = round(tokens * target)
    if together:
        moves = [cut_for(torch.cat([part for pool in pools for part in pool]), wanted * len(blocks))] * len(blocks)
    else:
        moves = [cut_for(torch.cat(pool), wanted) for pool in pools]
    for encoder, block, by in zip(penalised, blocks, moves, strict=True):
        encoder.raise_cuts(by, block.weights)
    return True


class OneSiteDictionary(SparseDictionary, ABC):
    """One matrix to read with and one to write with: what SAEs and transcoders share.

    Row ``i`` of ``W_enc`` and ``W_dec`` is latent ``i``. With ``tied`` the encoder reads with the atoms themselves.
    """

    def __init__(
        self, d_in: int, d_out: int, n_latents: int, encoder: Encoder, row_norm: str | None = None, tied: bool = False
    ):
        super().__init__(d_in, d_out, n_latents, encoder, row_norm=row_norm)
        encoder.prepare(n_latents)
        self.W_enc = None if tied else nn.Parameter(torch.empty(n_latents, d_in))
        # A pursuit has no use for a bias.
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
    def weights(self) -> Weights:
        """What the encoder may read."""
        screen = self.screen if self.training else None
        return Weights(self.W_dec if self.W_enc is None else self.W_enc, self.b_enc, self.W_dec, screen, self.shift)

    @property
    def blocks(self) -> list[LatentBlock]:
        return [LatentBlock(slice(0, self.n_latents), slice(0, self.d_in), slice(0, self.d_out), self.weights)]

    def code_of(
        self,
        x: Float[Tensor, "tokens d"],
        grad: Float[Tensor, "tokens d_out"] | None = None,
        through: bool = False,
        site: int | None = None,
    ) -> SparseCode:
        # The shift's gradient has a short cut, for which gradients end at x.
        weights = replace(self.weights, shift=None) if through else self.weights
        return self.encoder(x, weights, grad)

    @torch.no_grad()
    def calibrate(self, inputs: Iterable[Float[Tensor, "tokens d_in"]]) -> bool:
        if isinstance(self.encoder, BatchWide):
            self.encoder.calibrate(scorer(self.normalised(x), self.weights) for x in inputs)
            return True
        return calibrate_cuts([self.encoder], self, inputs)
