"""Dense codes: codes of a training batch in which so many latents fire that dense products are faster than entries.

A dense code holds the value of every latent on every token, most of them nonzero. Forward and backward passes are matrix
products and in-place passes over memory that is kept from step to step. The largest tensor is the code; its gradient exists
only in tiles: decoding does not compute it but leaves its two factors (``Owed``) for the encoder's backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kept_memory import kept_memory
from .sparse_code import AuxTerms, SparseCode
from .sparse_grad import SparseGrad, ledger_of
from .threshold_window import LEAST_WIDTH, TILE_NUMBERS


@dataclass
class Owed:
    """Factors of a dense code's gradient: each product of a gradient at the output with decoder directions is a term of it."""

    factors: list[tuple[Float[Tensor, "tokens d_out"], Float[Tensor, "n_latents d_out"]]] = field(default_factory=list)

    def add_(self, columns: slice, out: Float[Tensor, "tokens width"], beta: int = 1) -> None:
        """Add some columns of the gradient to ``out``, or with ``beta`` 0 write them to it."""
        for rows, atoms in self.factors:
            out.addmm_(rows, atoms[columns].T, beta=beta)
            beta = 1
        if not beta:
            out.zero_()


class DenseCode(SparseCode):
    """Code with an entry for every latent of every token.

    It has the interface of a ``SparseCode``, whose flat tensors are made when asked for; ``matrix`` holds the values. Gradients
    flow back through ``decode`` and through ``matrix`` or ``values``; only the latter appear as gradients of ``matrix``.

    Args:
        matrix: Values.
        fired: Number of tokens on which each latent fires.
        token: Scalar through which autograd reaches the encoder from ``decode``.
        owed: Gradients that ``decode`` leaves for the encoder.
        requests: Auxiliary loss terms.
        batch_shape: Shape in which the tokens stood.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "tokens n_latents"],
        fired: Float[Tensor, " n_latents"],
        token: Float[Tensor, ""],
        owed: Owed,
        requests: AuxTerms | None = None,
        batch_shape: tuple[int, ...] = (),
    ):
        own = {"matrix": matrix, "fired": fired, "token": token, "owed": owed}
        for name, value in (own | {"requests": requests or AuxTerms(), "batch_shape": batch_shape}).items():
            # The base class is frozen.
            object.__setattr__(self, name, value)

    matrix: Float[Tensor, "tokens n_latents"]
    fired: Float[Tensor, " n_latents"]
    token: Float[Tensor, ""]
    owed: Owed

    @property
    def latents(self) -> Int[Tensor, " nnz"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        tokens, n_latents = self.matrix.shape
        return torch.arange(n_latents, device=self.matrix.device).repeat(tokens)

    @property
    def values(self) -> Float[Tensor, " nnz"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.matrix.view(-1)

    @property
    def starts(self) -> Int[Tensor, " tokens"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        tokens, n_latents = self.matrix.shape
        return torch.arange(tokens, device=self.matrix.device) * n_latents

    @property
    def n_tokens(self) -> int:
        return self.matrix.shape[0]

    def requesting(self, requests: AuxTerms) -> "DenseCode":
        return DenseCode(self.matrix, self.fired, self.token, self.owed, requests, self.batch_shape)

    def shaped(self, batch_shape: tuple[int, ...]) -> "DenseCode":
        return DenseCode(self.matrix, self.fired, self.token, self.owed, self.requests, batch_shape)

    def l0(self) -> Int[Tensor, " tokens"]:
        return (self.matrix != 0).sum(1)

    def firings(self, n_latents: int) -> Int[Tensor, " n_latents"]:
        return self.fired.detach().long()

    def to_dense(self, n_latents: int) -> Float[Tensor, "tokens n_latents"]:
        return self.matrix

    def decode(self, atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "tokens d_out"]:
        """Return the sum of each token's decoder directions, weighted by its values."""
        matrix = self.matrix.detach()
        return _Decode.apply(self.token, atoms, matrix, self.owed, ledger_of(atoms))  # pyright: ignore[reportReturnType]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, atoms: Tensor, matrix: Tensor, owed: Owed, ledger: SparseGrad | None) -> Tensor:
        ctx.save_for_backward(atoms, matrix)
        ctx.owed, ctx.ledger = owed, ledger
        return matrix @ atoms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        atoms, matrix = ctx.saved_tensors
        rows = grads[0].contiguous()
        token = to_atoms = None
        if ctx.needs_input_grad[0]:
            ctx.owed.factors.append((rows, atoms))
            token = rows.new_zeros(())
        if ctx.needs_input_grad[1]:
            to_atoms = _MatrixGrad(atoms, ctx.ledger)
            to_atoms.add(slice(0, len(atoms)), matrix, rows)
            to_atoms = to_atoms.result()
        return token, to_atoms, None, None, None


class _MatrixGrad:
    """Dense gradient of a weight matrix, written to its ``SparseGrad`` if it has one."""

    def __init__(self, like: Tensor, ledger: SparseGrad | None):
        self.kept = ledger is not None
        self.whole, self.beta = (torch.empty_like(like), 0) if ledger is None else ledger.open_whole(like)

    def add(self, some: slice, columns: Tensor, rows: Tensor) -> None:
        """Add ``columns.T @ rows`` to some rows of the gradient; every row must be given once."""
        self.whole[some].addmm_(columns.T, rows, beta=self.beta)

    def result(self) -> Tensor | None:
        """Return the gradient for autograd, ``None`` if the ``SparseGrad`` has it."""
        return None if self.kept else self.whole


class PreActivationGrad:
    """Backward pass of ``W x + b``, which takes the gradient of the pre-activations tile by tile."""

    def __init__(self, ctx: Any):
        self.x, self.W = ctx.saved_tensors[:2]
        self.wants_x, wants_W, self.wants_b, self.wants_shift = ctx.needs_input_grad[:4]
        self.to_W = _MatrixGrad(self.W, ctx.ledger) if wants_W else None
        self.to_b = self.W.new_empty(len(self.W))
        self.to_x: Tensor | None = None

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns of every tile, and memory for its gradient."""
        tokens, n_latents = len(self.x), len(self.W)
        width = min(n_latents, max(LEAST_WIDTH, TILE_NUMBERS // max(tokens, 1)))
        room = kept_memory.take(tokens, width, self.W).view(-1)
        for first in range(0, n_latents, width):
            some = slice(first, min(first + width, n_latents))
            yield some, room[: tokens * (some.stop - first)].view(tokens, -1)

    def take(self, some: slice, gradient: Float[Tensor, "tokens width"]) -> None:
        """Add what the gradient of some columns gives to the weights."""
        self.to_b[some] = gradient.sum(0)
        if self.to_W is not None:
            self.to_W.add(some, gradient, self.x)
        if self.wants_x:
            part = gradient @ self.W[some]
            self.to_x = part if self.to_x is None else self.to_x.add_(part)

    def results(self, biased: Float[Tensor, " n_latents"] | None = None) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``W``, ``b`` and ``shift``; ``biased`` is added to that of ``b``."""
        to_shift = -(self.to_b @ self.W) if self.wants_shift else None
        to_b = self.to_b if biased is None else self.to_b + biased
        return self.to_x, None if self.to_W is None else self.to_W.result(), to_b if self.wants_b else None, to_shift


@dataclass(frozen=True)
class DenseInputs:
    """Inputs of ``W x + b``, to be differentiated; with ``shift``, as in ``sparse_ops.entries``, ``x`` gets no gradient."""

    x: Float[Tensor, "tokens d_in"]
    W: Float[Tensor, "n_latents d_in"]
    b: Float[Tensor, " n_latents"] | None
    shift: Float[Tensor, " d_in"] | None = None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self.x if self.shift is None else self.x.detach(), self.W, self.b, self.shift


@torch.no_grad()
def kept_scores(
    x: Float[Tensor, "tokens d_in"], W: Float[Tensor, "n_latents d_in"], b: Float[Tensor, " n_latents"] | None
) -> Float[Tensor, "tokens n_latents"]:
    """Return ``W x + b`` in kept memory, without gradient."""
    out = kept_memory.take(len(x), len(W), W)
    return torch.mm(x, W.T, out=out) if b is None else torch.addmm(b, x, W.T, out=out)


def mask_(gradient: Tensor, values: Tensor) -> Tensor:
    """Set the gradient to zero where the value is not positive, in place."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, values, 0, grad_input=gradient)


def add_columns_(gradient: Tensor, some: slice, whole: Tensor | None, per_latent: Tensor | None) -> None:
    """Add some columns of a matrix, and of a row that is the same for all tokens, to a tile of a gradient."""
    if whole is not None:
        gradient += whole[:, some]
    if per_latent is not None:
        gradient += per_latent[some]
