"""Common base of dictionaries with one encoder matrix and one decoder matrix."""

from abc import ABC
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .batch_encoder import Calibrated
from .dictionary import LatentBlock, SparseDictionary
from .encoder import Encoder, Weights
from .ranks import ALONE
from .sparse_code import SparseCode
from .thresholds import calibrate_cuts


@dataclass(frozen=True)
class NormalisedInputs:
    """Raw inputs as a dictionary's encoder sees them; they can be passed over as often as the raw ones."""

    dictionary: SparseDictionary
    raw: Iterable[Float[Tensor, "tokens d_in"]]

    def __iter__(self) -> Iterator[Float[Tensor, "tokens d_in"]]:
        return map(self.dictionary.normalised, self.raw)


class OneBlockDictionary(SparseDictionary, ABC):
    """Dictionary with one encoder matrix and one decoder matrix: the common base of all but cross-layer transcoders.

    Row ``i`` of ``W_enc`` and ``W_dec`` is latent ``i``. With ``tied`` the encoder reads ``W_dec``. With the ``widths`` of
    several sites the columns of both matrices are those of all sites, concatenated.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_latents: int,
        encoder: Encoder,
        row_norm: str | None = None,
        tied: bool = False,
        widths: Sequence[tuple[int, int]] | None = None,
    ):
        super().__init__(d_in, d_out, n_latents, encoder, row_norm, widths)
        encoder.prepare(n_latents)
        self.W_enc = None if tied else nn.Parameter(torch.empty(n_latents, d_in))
        # Pursuits use no encoder bias.
        self.b_enc = None if encoder.tied else nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(torch.empty(n_latents, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        # Meta tensors hold no data, and initializing them would import torch's compiler.
        if not self.W_dec.is_meta:
            nn.init.normal_(self.W_dec)
            F.normalize(self.W_dec.data, dim=-1, out=self.W_dec.data)
            if self.W_enc is not None:
                nn.init.normal_(self.W_enc, std=d_in**-0.5)

    @property
    def weights(self) -> Weights:
        """Weights that the encoder may read."""
        screen = self.screen if self.training else None
        ranks = self.ranks if self.training else ALONE
        W_enc = self.W_dec if self.W_enc is None else self.W_enc
        shift = None if self.shift is None else self.shards.shared(self.shift)
        # The row norm is undone entry by entry.
        may_be_dense = self.training and self.row_norm is None
        norm_widths = self.widths_out if self.n_sites > 1 else ()
        return Weights(
            W_enc,
            self.b_enc,
            self.W_dec,
            screen,
            shift,
            norm_widths=norm_widths,
            ranks=ranks,
            shards=self.shards,
            may_be_dense=may_be_dense,
        )

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
        # The shortcut for the pre-encoder bias's gradient stops gradients at ``x``.
        weights = replace(self.weights, shift=None) if through else self.weights
        return self.encoder(x, weights, grad)

    @torch.no_grad()
    def calibrate(self, inputs: Iterable[Float[Tensor, "tokens d_in"]]) -> bool:
        if isinstance(self.encoder, Calibrated):
            if self.encoder.has_thresholds:
                self.encoder.calibrate_on(NormalisedInputs(self, inputs), self.weights)
            return self.encoder.has_thresholds
        return calibrate_cuts([self.encoder], self, inputs)
