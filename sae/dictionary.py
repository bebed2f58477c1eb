"""Base classes of SAEs, transcoders, and cross-layer transcoders."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .checkpoint_files import FORMAT, FORMAT_VERSION, write_dictionary_files
from .encoder import Encoder, Weights
from .inspection import Inspection
from .kernels import loops_together
from .metrics import Moments
from .pursuit import PURSUITS
from .ranks import ALONE, UNDIVIDED
from .row_norm import ROW_NORMS, NormedRows
from .rows import Rows, as_rows
from .screen import Screen
from .sites import Site, added_at_columns, columns_by_site, concatenated, in_form_of
from .sparse_code import SparseCode
from .sparse_ops import decode
from .training_usage import TrainingUsage


@dataclass(frozen=True)
class LatentBlock:
    """Latents that read the same input columns and write to the same output columns, with their weights."""

    latents: slice
    reads: slice
    writes: slice
    weights: Weights


class SparseDictionary(Inspection, nn.Module, ABC):
    """Sparse dictionary: latents that read from an input of width ``d_in`` and write to an output of width ``d_out``.

    Inputs and outputs are raw activations. Internally both are divided by their scales (buffers saved with the weights), so
    learning rates and losses mean the same for every model; trained decoder directions have unit norm in these normalized
    units. A dictionary of several sites takes their activations concatenated along the feature axis, as a list with one tensor
    per site, or, with equal widths, as ``(..., sites, width)``; it has one scale per column.

    Subclasses define the weights (``blocks``, ``shift``, ``bypass``), the selection of latents (``code_of``, ``calibrate``),
    and the constructor arguments stored in checkpoints (``arguments``). All other methods build on these.

    >>> import torch
    >>> from sparsary import ENCODERS, SAE, SparseDictionary
    >>> dictionary = SAE(d_in=8, n_latents=32, encoder=ENCODERS["topk"](k=4))
    >>> isinstance(dictionary, SparseDictionary)
    True
    >>> dictionary.pursue(torch.randn(10, 8), k=4, method="orthogonal_matching_pursuit").n_tokens
    10

    Args:
        widths: Widths of the model locations to reconstruct, on both sides, if there are several: ``(reads, writes)`` of each.
            With one block per site, latents of block ``i`` read site ``i`` and write to it and possibly to later sites; with
            one block for all, latents read and write every site.
        row_norm: One of ``sae.row_norm.ROW_NORMS``, a per-token normalization applied before centering. Only loaded
            dictionaries use it, trained ones do not.
    """

    # True if the code's values undo ``row_norm``, because output and input are the same activation.
    undoes_row_norm: ClassVar[bool] = False

    in_scale: Float[Tensor, "..."]
    out_scale: Float[Tensor, "..."]
    b_dec: Float[Tensor, " d_out"]

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_latents: int,
        encoder: Encoder,
        row_norm: str | None = None,
        widths: Sequence[tuple[int, int]] | None = None,
    ):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_out", d_out), ("n_latents", n_latents)):
            if size < 1:
                raise ValueError(f"dictionary.{name}: expected at least 1, got {size}.")
        if row_norm is not None and row_norm not in ROW_NORMS:
            raise ValueError(f"dictionary.row_norm: expected null or one of {', '.join(ROW_NORMS)}, got {row_norm!r}.")
        self.d_in, self.d_out, self.n_latents, self.row_norm = d_in, d_out, n_latents, row_norm
        self.widths_in, self.widths_out = zip(*(widths or [(d_in, d_out)]), strict=True)
        self.n_sites = len(self.widths_in)
        self.encoder = encoder
        # Set by the trainer, used only in training, never saved.
        self.screen: Screen | None = None
        # Processes that share a training batch; set by the trainer, used only in training.
        self.ranks = ALONE
        # Processes that hold the other latents of the same dictionary, of which this one has ``n_latents``.
        self.shards = UNDIVIDED
        # Set by the trainer and saved with the checkpoint.
        self.training_usage: TrainingUsage | None = None
        self.provenance: dict[str, Any] = {}
        self.register_buffer("in_scale", torch.ones(()))
        self.register_buffer("out_scale", torch.ones(()))

    @property
    @abstractmethod
    def blocks(self) -> list[LatentBlock]:
        """Weights grouped by the columns they read and write; row ``i`` of a block's matrices is its latent ``i``."""

    @property
    @abstractmethod
    def shift(self) -> Float[Tensor, " d_in"] | None:
        """Pre-encoder bias, subtracted from normalized inputs, or ``None``."""

    @abstractmethod
    def bypass(self, x: Float[Tensor, "..."] | None = None, site: int | None = None) -> Float[Tensor, "..."]:
        """Return the skip path and bias of the output, in normalized units.

        Args:
            x: Raw input, ``(tokens, d_in)``, or the columns that the site reads.
            site: Return only the columns this site writes, computed from its own input; by default all columns.

        Raises:
            ValueError: If the result depends on the input and ``x`` is missing.
        """

    @abstractmethod
    def code_of(
        self,
        x: Float[Tensor, "tokens d"],
        grad: Float[Tensor, "tokens d_out"] | None = None,
        through: bool = False,
        site: int | None = None,
    ) -> SparseCode:
        """Return the code of normalized, centered inputs.

        Args:
            x: Inputs of all sites, or of one.
            grad: Normalized loss gradient at the output, for encoders that need it.
            through: Let gradients flow back through the inputs, not only to the dictionary's weights.
            site: Encode this site only, with latents numbered from 0 and without reading other sites.
        """

    @abstractmethod
    def calibrate(self, inputs: Iterable[Float[Tensor, "tokens d_in"]]) -> bool:
        """Set the thresholds of ``eval()`` mode from raw inputs; return False if there are none to set."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments, including the encoder's, as stored in ``dictionary.json``."""

    @property
    def sites(self) -> list[Site]:
        """Model locations that the dictionary reconstructs, in the order of the forward pass."""
        return [Site(*both) for both in zip(columns_by_site(self.widths_in), columns_by_site(self.widths_out), strict=True)]

    @property
    def shares_code(self) -> bool:
        """Return True if one code serves several sites, so that encoding needs the activations of all of them."""
        return self.n_sites > 1 and len(self.blocks) == 1

    @property
    def tied(self) -> bool:
        """Return True if the encoder is tied to the decoder (``W_enc is W_dec``)."""
        return any(block.weights.W_enc is block.weights.W_dec for block in self.blocks)

    @property
    def atoms(self) -> Float[Tensor, "n_latents d_out"]:
        """Decoder directions at full output width, in normalized units, zero at outputs that a latent does not write to."""
        written = [self._padded(block.weights.W_dec, block.writes) for block in self.blocks]
        return written[0] if len(written) == 1 else torch.cat(written)

    @property
    def device(self) -> torch.device:
        return self.in_scale.device

    @torch.no_grad()
    def centre_on(self, inputs: Float[Tensor, " d_in"], outputs: Float[Tensor, " d_out"]) -> None:
        """Initialize the pre-encoder bias and ``b_dec`` to the data means, in normalized units."""
        if self.shift is not None and self.shift is not self.b_dec:
            self.shift.copy_(inputs)
        self.b_dec.copy_(outputs)

    def error_scale(self, moments: Moments) -> Float[Tensor, "..."]:
        """Return the normalizer that turns squared errors into FVU: predicting the target mean then gives an error of 1.

        It is the total variance of the targets (a scalar), or one value per output column if every column has its own scale.
        """
        if self.out_scale.ndim == 0:
            return torch.tensor(moments.variance())
        columns = torch.empty(self.d_out)
        for site in self.sites:
            # Scaled by the number of sites, so that the total is the mean FVU over sites and comparable with a single site.
            columns[site.writes] = float(moments.deviation[site.writes].sum()) / max(moments.count, 1) * self.n_sites
        return columns

    def encode(self, x: Rows, grad: Rows | None = None) -> SparseCode:
        """Return the sparse code of raw activations ``(tokens, d_in)`` or ``(batch, position, d_in)``.

        Accepts tensors and arrays of any precision. Values are in normalized units: a value of 1 adds ``out_scale`` times the
        decoder direction to the output.

        Args:
            grad: Loss gradient at the output, for encoders that use it.

        Raises:
            ValueError: If the last axis of ``x`` is not ``d_in`` wide.
        """
        x = self._concatenated(x)
        shape = x.shape[:-1] if x.ndim > 2 else ()
        x = self.require_width(x.flatten(0, -2) if shape else x, self.d_in)
        if grad is not None:
            grad = concatenated(grad, self.widths_out, "grad", self.device) * self.out_scale
            grad = grad.flatten(0, -2) if shape else grad
        code = self._in_output_units(self.code_of(self.normalised(x), grad, x.requires_grad), x)
        return code.shaped(tuple(shape)) if shape else code

    def encode_at(self, site: int, x: Rows) -> SparseCode:
        """Return the code of one site's raw activations ``(tokens, width)``, with latents numbered from 0.

        Reads no other site, so the model can run with the dictionary in place.

        Raises:
            ValueError: If the width is another, or one code serves all sites.
        """
        if self.shares_code:
            raise ValueError(f"site: one code serves all {self.n_sites} sites. Give encode() the activations of all of them.")
        place = self.sites[site].reads
        x = self.require_width(x, place.stop - place.start)
        return self._in_output_units(self.code_of(self.normalised(x, site), None, x.requires_grad, site), x)

    def normalised(self, x: Float[Tensor, "tokens d"], site: int | None = None) -> Float[Tensor, "tokens d"]:
        """Return the encoder's inputs: raw activations of all sites or one, scaled, row-normalized, and centered."""
        scale = self.in_scale if site is None or self.in_scale.ndim == 0 else self.in_scale[self.sites[site].reads]
        return self.centre(x.to(self.in_scale.dtype) / scale, site)

    def centre(self, x: Float[Tensor, "tokens d"], site: int | None = None) -> Float[Tensor, "tokens d"]:
        """Apply ``row_norm`` to scaled inputs and subtract the pre-encoder bias."""
        rows = x if self.row_norm is None else ROW_NORMS[self.row_norm](x).rows
        if self.shift is None:
            return rows
        return rows - (self.shift if site is None else self.shift[self.sites[site].reads])

    def normed_rows(self, x: Float[Tensor, "tokens d_in"]) -> NormedRows:
        """Return raw inputs scaled and normalized by ``row_norm``, which must be set."""
        assert self.row_norm is not None
        return ROW_NORMS[self.row_norm](x.to(self.in_scale.dtype) / self.in_scale)

    def decode(self, code: SparseCode | Rows, x: Rows | None = None) -> Float[Tensor, "... d_out"]:
        """Return the reconstruction of a code, in raw units and in the shape of what was encoded.

        Args:
            code: Result of ``encode``, or a dense tensor ``(tokens, n_latents)`` or ``(batch, position, n_latents)``.
            x: Raw input of the code, needed if the output depends on it directly (skip path, undone ``row_norm``).

        Raises:
            ValueError: If ``x`` is needed and missing, or a dense code has the wrong width.
        """
        if not isinstance(code, SparseCode):
            code = self._sparse(self._tensor(code, "code"))
        x = None if x is None else self._concatenated(x)
        x = x.flatten(0, -2) if x is not None and x.ndim > 2 else x
        parts = list(self._parts(code))
        with loops_together():
            written = [(block.writes, decode(part, block.weights.W_dec)) for block, part in parts]
        total = self.shards.reduced(written[0][1] if len(written) == 1 else added_at_columns(written, self.d_out))
        # Fused, because this tensor is as large as the batch.
        y_hat = torch.addcmul(self.bypass(x) * self.out_scale, total, self.out_scale)
        return y_hat.unflatten(0, code.batch_shape) if code.batch_shape else y_hat

    def decode_at(self, site: int, codes: list[SparseCode], x: Rows | None = None) -> Float[Tensor, "..."]:
        """Return one site's output, in raw units, from the codes of all sites up to it and its own raw input.

        Where one code serves all sites, it is the only one in ``codes``.
        """
        x = None if x is None else self._tensor(x)
        if self.out_scale.ndim == 0:
            # A scalar scale means a single site.
            return self.decode(codes[site], x)
        place, total = self.sites[site].writes, self.bypass(x, site)
        for block, code in zip(self.blocks, codes[: site + 1], strict=False):
            there = slice(place.start - block.writes.start, place.stop - block.writes.start)
            total = total + decode(code, block.weights.W_dec[:, there].contiguous())
        return total * self.out_scale[place]

    def _parts(self, code: SparseCode) -> Iterator[tuple[LatentBlock, SparseCode]]:
        """Yield each block with its part of a code, latents numbered from 0."""
        if code.parts:
            yield from zip(self.blocks, code.parts, strict=True)
            return
        for block in self.blocks:
            first, last = block.latents.start, block.latents.stop
            if (first, last) == (0, self.n_latents):
                yield block, code
                continue
            part = code.where((code.latents >= first) & (code.latents < last))
            yield block, SparseCode(part.latents - first, part.values, part.starts)

    def _padded(self, columns: Tensor, writes: slice) -> Tensor:
        """Return output columns zero-padded to the full output width."""
        around = (writes.start, self.d_out - writes.stop)
        return F.pad(columns, around) if any(around) else columns

    def _in_output_units(self, code: SparseCode, x: Tensor) -> SparseCode:
        """Return the code with each token's ``row_norm`` undone in its values, if ``undoes_row_norm``."""
        if self.row_norm is None or not self.undoes_row_norm:
            return code
        scale = self.normed_rows(x).scale.squeeze(1)[code.token_ids()]
        return replace(code, values=code.values * scale.to(code.values.dtype))

    def _concatenated(self, x: Rows) -> Float[Tensor, "..."]:
        """Return the activations of all sites as one tensor, whichever form they were given in."""
        return concatenated(x, self.widths_in, device=self.device)

    def _tensor(self, values: Rows, name: str = "x") -> Float[Tensor, "..."]:
        """Return the values as a tensor; tensors keep their precision and gradient."""
        return values if isinstance(values, Tensor) else as_rows(values, name, self.device)

    def _sparse(self, dense: Float[Tensor, "..."]) -> SparseCode:
        if dense.ndim < 2 or dense.shape[-1] != self.n_latents:
            raise ValueError(
                f"code: expected a SparseCode, as encode gives it, or (tokens, {self.n_latents}), got {tuple(dense.shape)}."
            )
        cells = dense.detach().reshape(-1).nonzero().squeeze(1)
        values = dense.reshape(-1)[cells].to(self.out_scale.dtype)
        code = SparseCode.from_cells(cells, values, dense.shape[:-1].numel(), self.n_latents)
        return replace(code, batch_shape=tuple(dense.shape[:-1])) if dense.ndim > 2 else code

    def require_width(self, x: Rows, width: int, name: str = "x") -> Float[Tensor, "..."]:
        """Return ``x`` as a tensor; raise ``ValueError`` unless it is ``(tokens, width)``."""
        x = self._tensor(x, name)
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(
                f"{name}: expected (tokens, {width}), got {tuple(x.shape)}. Check that the activations come "
                "from the hook this dictionary was trained on."
            )
        return x

    @torch.no_grad()
    def pursue(self, y: Rows, k: int, method: str) -> SparseCode:
        """Return the code of ``k`` latents per token that a pursuit, not the encoder, finds for targets in raw units.

        Works with any encoder: only decoder directions and bias are used.

        Args:
            method: One of ``sae.pursuit.PURSUITS``.

        Raises:
            ValueError: If the method is unknown, ``k`` is below 1, ``y`` is not ``(tokens, d_out)``, or the output also depends
                directly on the input.
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

    def forward(self, x: Rows) -> Float[Tensor, "... d_out"] | list[Tensor]:
        """Return the reconstruction of raw inputs; of several sites, in the form in which the inputs are given."""
        rows = self._concatenated(x)
        return in_form_of(x, self.decode(self.encode(rows), rows), self.widths_out)

    @torch.no_grad()
    def renormalize(self) -> None:
        """Rescale decoder directions to unit norm if the encoder needs a unit-norm decoder."""
        if self.encoder.unit_atoms:
            for block in self.blocks:
                F.normalize(block.weights.W_dec, dim=-1, out=block.weights.W_dec)

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Rescale decoder directions to unit norm and fold their norms into the encoder; the output is unchanged.

        Valid only for encoders whose values scale with their rows, which holds for those without a unit-norm decoder.
        """
        for W_enc, b_enc, W_dec in ((b.weights.W_enc, b.weights.b_enc, b.weights.W_dec) for b in self.blocks):
            norms = W_dec.norm(dim=-1).clamp_min(torch.finfo(W_dec.dtype).tiny)
            W_dec.div_(norms[:, None])
            if b_enc is not None:
                W_enc.mul_(norms[:, None])
                b_enc.mul_(norms)

    @torch.no_grad()
    def project_grad(self) -> None:
        """Remove the component of each decoder gradient along its direction, which renormalizing would undo anyway."""
        for W_dec in (block.weights.W_dec for block in self.blocks):
            if W_dec.grad is not None and self.encoder.unit_atoms:
                along = (W_dec.grad * W_dec).sum(-1, keepdim=True)
                W_dec.grad.addcmul_(along, W_dec, value=-1.0)

    def save(self, directory: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write ``dictionary.safetensors``, then ``dictionary.json``, each atomically.

        If ``training_usage`` is set, ``usage.safetensors`` is written too. The provenance is by default the dictionary's own.

        Raises:
            OSError: If the folder cannot be written; existing files stay unchanged.
        """
        provenance = self.provenance if provenance is None else provenance
        write_dictionary_files(directory, self.state_dict(), self.config(provenance), self.training_usage)

    def config(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of ``dictionary.json``, without the checksum of the weights."""
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dictionary": self.arguments(),
            "provenance": provenance,
        }
        return config if self.training_usage is None else config | {"training_usage": self.training_usage.about}


def required_input(x: Tensor | None, because: str) -> Tensor:
    """Return the raw input that decoding needs.

    Raises:
        ValueError: If it is missing.
    """
    if x is None:
        raise ValueError(f"x: expected the raw input, because {because}, got none. Call decode(code, x).")
    return x
