"""Interfaces of the compiled kernels: tensors in, tensors out, whatever compiled them.

``bounds`` are a code's starts with its end. Entries grouped by latent are two tensors: ``firsts``, where each latent's
entries begin, with the end of the last, and ``tokens``, their tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int, Int8
from torch import Tensor


@dataclass(frozen=True)
class AdamStep:
    """Numbers of a step of Adam. The corrections for the moments' start at zero are in the last three.

    A weight moves by ``length`` times its first moment over ``eps`` plus ``root`` times the root of its second.
    """

    beta1: float
    beta2: float
    length: float
    root: float
    eps: float


class RowGrad(NamedTuple):
    """A matrix's gradient, row by row: the sum of the entries' tokens' ``rows``, and row ``dense_of[i]`` of ``dense``.

    Entries are grouped by latent, ``values`` in that order; a negative ``dense_of`` is no row.
    """

    firsts: Int[Tensor, " ends"]
    tokens: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    rows: Float[Tensor, "tokens d"]
    dense_of: Int[Tensor, " n_latents"]
    dense: Float[Tensor, "some d"]


class Kernels(ABC):
    """Arithmetic of sparse codes and of gradients made of their entries."""

    @abstractmethod
    def decode(
        self,
        bounds: Int[Tensor, " ends"],
        latents: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        atoms: Float[Tensor, "n_latents d"],
    ) -> Float[Tensor, "tokens d"]:
        """Return the sum of every token's atoms, weighted by its values."""

    @abstractmethod
    def dots(
        self,
        bounds: Int[Tensor, " ends"],
        latents: Int[Tensor, " nnz"],
        left: Float[Tensor, "tokens d"],
        rows: Float[Tensor, "n_latents d"],
    ) -> Float[Tensor, " nnz"]:
        """Return for every entry the product of its token's row of ``left`` with its latent's row."""

    @abstractmethod
    def spread(
        self,
        firsts: Int[Tensor, " ends"],
        tokens: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        rows: Float[Tensor, "tokens d"],
    ) -> Float[Tensor, "n_latents d"]:
        """Return per latent the sum of its tokens' rows, weighted by ``values``, which stand in grouped order."""

    @abstractmethod
    def squared_norms(self, weights: Float[Tensor, "n d"], unit: bool, gradient: RowGrad) -> Float[Tensor, " n"]:
        """Return the squared length of every row of the gradient; where rows are ``unit``, of its tangential part."""

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
        """Take Adam's step on ``weights`` and its two moments, in place, with the gradient times ``factor``."""


class SelectionKernels(Kernels, ABC):
    """Kernels that also choose among scores, and group and round for choosing."""

    @property
    @abstractmethod
    def kept_most(self) -> int:
        """The largest number of kept scores for which these kernels beat sorting."""

    @abstractmethod
    def group(self, keys: Int[Tensor, " n"], count: int) -> tuple[Int[Tensor, " ends"], Int[Tensor, " n"]]:
        """Return where each of ``count`` keys' places begin and end in the second tensor, and all places by key, ascending."""

    @abstractmethod
    def keep_largest_(
        self,
        scores: Float[Tensor, "tokens width"],
        offset: int,
        values: Float[Tensor, "tokens k"],
        latents: Int[Tensor, "tokens k"],
    ) -> None:
        """Bring the largest scores of a tile whose first latent is ``offset`` into each token's kept ones, in place."""

    @abstractmethod
    def keep_largest_ragged(
        self, scores: Float[Tensor, "rows columns"], room: Int[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """Return the ``room[i]`` largest scores of every row, one row after the other, and the columns they stand in."""

    @abstractmethod
    def above(
        self, scores: Float[Tensor, "tokens width"], cut: Float[Tensor, " width"], offset: int
    ) -> tuple[Int[Tensor, " tokens"], Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """Return how many scores of each token exceed their latent's ``cut``, these, and their latents from ``offset``."""

    @abstractmethod
    def quantize(
        self, rows: Float[Tensor, "rows d"], levels: int, least: float
    ) -> tuple[Int8[Tensor, "rows d"], Float[Tensor, " rows"]]:
        """Return int8 rows in ``levels`` of their largest entry, and each one's scale, at least ``least``; NaN if one is."""

    @abstractmethod
    def rescale_(
        self,
        product: Int[Tensor, "tokens width"],
        scale: Float[Tensor, " width"],
        token_scale: Float[Tensor, " tokens"],
        shift: Float[Tensor, " width"],
        out: Float[Tensor, "tokens width"],
    ) -> None:
        """Write the scores that an integer product of quantised rows stands for, each token's divided by its scale."""
