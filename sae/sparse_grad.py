"""Ledger: a weight matrix's gradient, kept as the entries it is made of until an optimizer uses them up.

A step's gradient of ``W`` is a sum over the code's entries of a number times a row. Written out it is as large as ``W``, and
would be read at once by clipping and by Adam. An optimizer that can work from the entries gives the matrix a ledger; backward
passes then write there instead of into ``W.grad``. Without a ledger nothing changes.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .sparse_code import SparseCode


@dataclass(frozen=True)
class Product:
    """One sum over a code's entries, for every latent: the entry's value times the row of its token."""

    code: SparseCode
    rows: Float[Tensor, "tokens d"]


@dataclass
class SparseGrad:
    """What backward passes have added up since the last ``clear``: products, and gradients of some rows."""

    products: list[Product] = field(default_factory=list)
    rows: list[tuple[Int[Tensor, " some"], Float[Tensor, "some d"]]] = field(default_factory=list)

    def clear(self) -> None:
        self.products.clear()
        self.rows.clear()

    def product(self, like: Float[Tensor, "n_latents d"]) -> Product:
        """All products as one, whose tokens follow on one another."""
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
        """Which of the dense rows belongs to each latent, or -1, and those rows; ``like.grad`` is among them."""
        n_latents = like.shape[0]
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
    """Give a weight matrix a ledger: from now on backward passes write there."""
    ledger = SparseGrad()
    weights.ledger = ledger  # pyright: ignore[reportAttributeAccessIssue]
    return ledger


def drop_ledger(weights: Tensor) -> None:
    """Let backward passes write a matrix's gradient out again."""
    if ledger_of(weights) is not None:
        del weights.ledger  # pyright: ignore[reportAttributeAccessIssue]


def ledger_of(weights: Any) -> SparseGrad | None:
    """The ledger of a weight matrix, if an optimizer keeps one."""
    return getattr(weights, "ledger", None)
