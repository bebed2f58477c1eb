"""Interfaces of the compiled kernels, independent of the compiler: tensors in, tensors out.

``bounds`` are a code's starts followed by its number of entries. Entries grouped by latent are given by two tensors:
``firsts``, the first entry of each latent followed by the number of entries, and ``tokens``, the token of each entry.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int, Int8
from torch import Tensor


@dataclass(frozen=True)
class AdamStep:
    """Constants of one Adam step; the last three include the bias corrections of the moments.

    A weight moves by ``length`` times its first moment, divided by ``eps`` plus ``root`` times the square root of its second.
    """

    beta1: float
    beta2: float
    length: float
    root: float
    eps: float


class RowGrad(NamedTuple):
    """Gradient of a matrix by row: the weighted sum of its entries' token ``rows``, plus row ``dense_of[i]`` of ``dense``.

    Entries and their ``values`` are grouped by latent; a negative ``dense_of`` means no dense row.
    """

    firsts: Int[Tensor, " ends"]
    tokens: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    rows: Float[Tensor, "tokens d"]
    dense_of: Int[Tensor, " n_latents"]
    dense: Float[Tensor, "some d"]


class Kernels(ABC):
    """Arithmetic on sparse codes and on gradients made of their entries."""

    @abstractmethod
    def decode(
        self,
        bounds: Int[Tensor, " ends"],
        latents: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        atoms: Float[Tensor, "n_latents d"],
    ) -> Float[Tensor, "tokens d"]:
        """Return each token's sum of decoder directions, weighted by its values."""

    @abstractmethod
    def dots(
        self,
        bounds: Int[Tensor, " ends"],
        latents: Int[Tensor, " nnz"],
        left: Float[Tensor, "tokens d"],
        rows: Float[Tensor, "n_latents d"],
    ) -> Float[Tensor, " nnz"]:
        """Return for every entry the dot product of its token's row of ``left`` and its latent's row."""

    @abstractmethod
    def spread(
        self,
        firsts: Int[Tensor, " ends"],
        tokens: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        rows: Float[Tensor, "tokens d"],
        out: Float[Tensor, "n_latents d"] | None = None,
    ) -> Float[Tensor, "n_latents d"]:
        """Return per latent the sum of its tokens' rows, weighted by ``values`` in grouped order; in ``out`` if given."""

    @abstractmethod
    def squared_norms(self, weights: Float[Tensor, "n d"], unit: bool, gradient: RowGrad) -> Float[Tensor, " n"]:
        """Return the squared norm of every row of the gradient, of its tangential part only if rows are ``unit``."""

    @abstractmethod
    def adam_(
        self,
        weights: Float[Tensor, "n d"],
        unit: bool,
        gradient: RowGrad,
        mean: Float[Tensor, "n d"],
        square: Float[Tensor, "n d"],
        factor: Float[Tensor, ""],
        step: AdamStep,
    ) -> None:
        """Apply an Adam step to ``weights`` and both moments, in place, with the gradient multiplied by ``factor``."""


class SelectionKernels(Kernels, ABC):
    """Kernels that also select the largest scores, group entries, and quantize."""

    @abstractmethod
    def group(self, keys: Int[Tensor, " n"], count: int) -> tuple[Int[Tensor, " ends"], Int[Tensor, " n"]]:
        """Return ``(firsts, order)``: positions sorted by key (stable), key ``i`` at ``order[firsts[i]:firsts[i + 1]]``."""

    @abstractmethod
    def keep_largest_(
        self,
        scores: Float[Tensor, "tokens width"],
        offset: int,
        values: Float[Tensor, "tokens k"],
        latents: Int[Tensor, "tokens k"],
    ) -> None:
        """Merge the scores of a tile, whose first latent is ``offset``, into each token's largest scores, in place."""

    @abstractmethod
    def keep_largest_ragged(
        self, scores: Float[Tensor, "rows columns"], room: Int[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """Return the ``room[i]`` largest scores of every row, row after row, and their columns."""

    @abstractmethod
    def above(
        self, scores: Float[Tensor, "tokens width"], cut: Float[Tensor, " width"], offset: int
    ) -> tuple[Int[Tensor, " tokens"], Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """Return each token's number of scores above their latent's ``cut``, the scores, and their latents plus ``offset``."""

    @abstractmethod
    def quantize(
        self, rows: Float[Tensor, "rows d"], levels: int, least: float
    ) -> tuple[Int8[Tensor, "rows d"], Float[Tensor, " rows"]]:
        """Return int8 rows in ``levels`` of their largest entry, and their scales: at least ``least``, NaN for a NaN row."""

    @abstractmethod
    def rescale_(
        self,
        product: Int[Tensor, "tokens width"],
        scale: Float[Tensor, " width"],
        token_scale: Float[Tensor, " tokens"],
        shift: Float[Tensor, " width"],
        out: Float[Tensor, "tokens width"],
    ) -> None:
        """Write to ``out`` the scores of an integer product of quantized rows, divided by each token's scale."""
