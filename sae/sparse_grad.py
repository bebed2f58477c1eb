"""Sparse gradient accumulator for weight matrices.

The gradient of ``W`` is a sum of outer products ``value * row``, one per entry of the code. Materializing it costs as much
memory as ``W``, and clipping and Adam read it back immediately. If an optimizer attaches a ``SparseGrad`` to a matrix, backward
passes append these terms there instead of writing ``W.grad``; otherwise autograd behaves as usual.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .kept_memory import kept_memory
from .sparse_code import SparseCode


@dataclass(frozen=True)
class Product:
    """Gradient term: for every latent, the sum over its entries of the entry's value times the row of its token."""

    code: SparseCode
    rows: Float[Tensor, "tokens d"]


@dataclass
class SparseGrad:
    """Terms accumulated by backward passes since the last ``clear``.

    They are products, dense gradients of some rows, and ``whole``, the dense gradient from codes that are not sparse.
    """

    products: list[Product] = field(default_factory=list)
    rows: list[tuple[Int[Tensor, " some"], Float[Tensor, "some d"]]] = field(default_factory=list)
    whole: Float[Tensor, "n_latents d"] | None = None

    @property
    def empty(self) -> bool:
        return not self.products and not self.rows and self.whole is None

    def clear(self) -> None:
        self.products.clear()
        self.rows.clear()
        self.whole = None

    def open_whole(self, like: Float[Tensor, "n_latents d"]) -> tuple[Float[Tensor, "n_latents d"], int]:
        """Return the memory of ``whole``, and 1 if it holds a gradient to add to, 0 if it is uninitialized."""
        if self.whole is not None:
            return self.whole, 1
        self.whole = whole = kept_memory.take(like.shape[0], like.shape[1], like)
        return whole, 0

    def product(self, like: Float[Tensor, "n_latents d"]) -> Product:
        """Return all products as one, with their tokens concatenated."""
        if len(self.products) == 1:
            return self.products[0]
        if not self.products:
            none = torch.empty(0, dtype=torch.long, device=like.device)
            return Product(SparseCode(none, like.new_empty(0), none), like.new_empty(0, like.shape[1]))
        before, starts = 0, []
        for part in self.products:
            starts.append(part.code.starts + before)
            before += part.code.latents.shape[0]
        latents = torch.cat([part.code.latents for part in self.products])
        values = torch.cat([part.code.values for part in self.products])
        return Product(SparseCode(latents, values, torch.cat(starts)), torch.cat([part.rows for part in self.products]))

    def dense(self, like: Float[Tensor, "n_latents d"]) -> tuple[Int[Tensor, " n_latents"], Float[Tensor, "some d"]]:
        """Return each latent's index into the dense gradient rows, or -1, and those rows; ``like.grad`` is included."""
        n_latents = like.shape[0]
        if self.whole is not None:
            if like.grad is not None:
                self.whole += like.grad
                like.grad = None
            for latents, gradients in self.rows:
                self.whole.index_add_(0, latents, gradients)
            self.rows.clear()
            return torch.arange(n_latents, device=like.device), self.whole
        if like.grad is not None:
            whole = like.grad
            for latents, gradients in self.rows:
                whole = whole.index_add(0, latents, gradients)
            return torch.arange(n_latents, device=like.device), whole
        dense_of = torch.full((n_latents,), -1, device=like.device)
        if not self.rows:
            return dense_of, like.new_empty(0, like.shape[1])
        latents, gradients = self.rows[0]
        if len(self.rows) > 1:
            latents, place = torch.cat([latents for latents, _ in self.rows]).unique(return_inverse=True)
            gradients = like.new_zeros(len(latents), like.shape[1])
            gradients.index_add_(0, place, torch.cat([part for _, part in self.rows]))
        dense_of[latents] = torch.arange(len(latents), device=like.device)
        return dense_of, gradients


def keep_ledger(weights: Tensor) -> SparseGrad:
    """Attach a ``SparseGrad`` to a weight matrix; backward passes then append to it."""
    ledger = SparseGrad()
    weights.ledger = ledger  # pyright: ignore[reportAttributeAccessIssue]
    return ledger


def drop_ledger(weights: Tensor) -> None:
    """Detach a matrix's ``SparseGrad``; backward passes then write its dense gradient again."""
    if ledger_of(weights) is not None:
        del weights.ledger  # pyright: ignore[reportAttributeAccessIssue]


def ledger_of(weights: Any) -> SparseGrad | None:
    """Return the ``SparseGrad`` of a weight matrix, or ``None``."""
    return getattr(weights, "ledger", None)
