"""Arithmetic on sparse codes: decoding, and gradients that touch only the entries that occur.

One dense product is needed in a step, that of the encoder. Its backward pass, like that of decoding, is a product with a
matrix that has only the code's entries: (tokens, n_latents) in CSR form, or its transpose. Where torch has no such product
(no MKL, low precision) the plain reference below does the same; it is what the fast path is checked against.
"""

import threading
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .code import SparseCode

# From one entry in sixteen on the dense product is faster, as measured on two CPU cores for widths 1024 to 12288: encoders
# without a budget begin with every second latent on. Small codes are not worth the question.
DENSE_SHARE = 1 / 16
DENSE_ENTRIES = 1 << 18
_FILTERS = threading.Lock()


def decode(code: SparseCode, atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "tokens d_out"]:
    """Sum of each token's atoms, weighted by its values; touches only the atoms that occur, unless nearly all do.

    Differentiable in ``atoms`` and in ``code.values``.
    """
    # Under autocast the values come in a lower precision than the atoms.
    values = code.values.to(atoms.dtype)
    return _Decode.apply(values, atoms, code.latents, code.starts)  # pyright: ignore[reportReturnType]


def entries(
    x: Float[Tensor, "tokens d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"] | None,
    values: Float[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    starts: Int[Tensor, " tokens"],
) -> Float[Tensor, " nnz"]:
    """Entries of ``W x + b`` that were computed without gradient, made differentiable in ``x``, ``W`` and ``b``."""
    return _Entries.apply(x, W, b, values, latents, starts)  # pyright: ignore[reportReturnType]


def decode_plain(code: SparseCode, atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "tokens d_out"]:
    """The reference for ``decode``: torch's own bag of embeddings, with its own gradients."""
    return F.embedding_bag(code.latents, atoms, code.starts, mode="sum", per_sample_weights=code.values.to(atoms.dtype))


def entries_plain(
    x: Float[Tensor, "tokens d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"] | None,
    latents: Int[Tensor, " nnz"],
    starts: Int[Tensor, " tokens"],
) -> Float[Tensor, " nnz"]:
    """The reference for ``entries``: all of ``W x + b``, then the wanted ones."""
    tokens = SparseCode(latents, torch.empty(latents.shape[0]), starts).token_ids()
    return F.linear(x, W, b)[tokens, latents]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, atoms: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(values, atoms, latents, starts)
        if _crowded(latents, starts, atoms):
            return SparseCode(latents, values, starts).to_dense(atoms.shape[0]) @ atoms
        return F.embedding_bag(latents, atoms, starts, mode="sum", per_sample_weights=values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, atoms, latents, starts = ctx.saved_tensors
        to_values = _dots(grads[0], atoms, latents, starts) if ctx.needs_input_grad[0] else None
        to_atoms = _spread(values, grads[0], latents, starts, atoms) if ctx.needs_input_grad[1] else None
        return to_values, to_atoms, None, None


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, latents, starts)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, latents, starts = ctx.saved_tensors
        to_x = _gather(grads[0], W, latents, starts).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_W = _spread(grads[0], x, latents, starts, W) if ctx.needs_input_grad[1] else None
        to_b = None
        if ctx.needs_input_grad[2]:
            to_b = torch.zeros(W.shape[0], dtype=W.dtype, device=W.device).index_add_(0, latents, grads[0].to(W.dtype))
        return to_x, to_W, to_b, None, None, None


def _gather(values: Tensor, rows: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    """Per token, the sum of its latents' rows weighted by the entries: (tokens, d)."""
    values = values.to(rows.dtype)
    if _crowded(latents, starts, rows):
        return SparseCode(latents, values, starts).to_dense(rows.shape[0]) @ rows
    return F.embedding_bag(latents, rows, starts, mode="sum", per_sample_weights=values)


def _spread(values: Tensor, rows: Tensor, latents: Tensor, starts: Tensor, like: Tensor) -> Tensor:
    """Per latent, the sum of its tokens' rows weighted by the entries: (n_latents, d), as ``like``."""
    values, rows = values.to(like.dtype), rows.to(like.dtype)
    tokens, n_latents = starts.shape[0], like.shape[0]
    code = SparseCode(latents, values, starts)
    if _crowded(latents, starts, like):
        return code.to_dense(n_latents).T @ rows
    if not _has_csr(like):
        by_entry = torch.zeros_like(like)
        # In pieces: all entries' rows at once would be k times the input.
        for some in torch.arange(latents.shape[0], device=latents.device).split(1 << 14):
            by_entry.index_add_(0, latents[some], values[some, None] * rows[code.token_ids()[some]])
        return by_entry
    order = latents.argsort(stable=True)
    firsts = torch.zeros(n_latents + 1, dtype=torch.long, device=latents.device)
    torch.cumsum(torch.bincount(latents, minlength=n_latents), 0, out=firsts[1:])
    return _csr(firsts, code.token_ids()[order], values[order], (n_latents, tokens)) @ rows


def _dots(left: Tensor, rows: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    """For every entry the product of its token's row of ``left`` with its latent's row: (nnz,)."""
    code = SparseCode(latents, torch.empty(latents.shape[0]), starts)
    if _crowded(latents, starts, rows):
        return (left @ rows.T)[code.token_ids(), latents]
    # More entries than cells, by repetition, is more than torch takes for a CSR matrix.
    if not _has_csr(rows) or not 0 < latents.shape[0] <= starts.shape[0] * rows.shape[0]:
        picked = [
            (left[code.token_ids()[some]] * rows[latents[some]]).sum(-1)
            for some in torch.arange(latents.shape[0], device=latents.device).split(1 << 14)
        ]
        return torch.cat(picked) if picked else rows.new_zeros(0)
    ends = torch.cat([starts, starts.new_tensor([latents.shape[0]])])
    pattern = _csr(ends, latents, rows.new_zeros(latents.shape[0]), (starts.shape[0], rows.shape[0]))
    return torch.sparse.sampled_addmm(pattern, left, rows.T, beta=0.0).values()


def _crowded(latents: Tensor, starts: Tensor, rows: Tensor) -> bool:
    """Whether so many entries occur that dense products are faster."""
    found = latents.shape[0]
    return found >= DENSE_ENTRIES and found >= DENSE_SHARE * starts.shape[0] * rows.shape[0]


def _has_csr(rows: Tensor) -> bool:
    """Whether torch multiplies CSR matrices of this kind."""
    return rows.dtype in (torch.float32, torch.float64) and (rows.is_cuda or torch.backends.mkl.is_available())


def _csr(firsts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # Filters are the whole process's: two threads would put back each other's.
    with _FILTERS, warnings.catch_warnings():
        # torch says once per process that CSR is in beta.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(firsts, columns, values, shape, check_invariants=False)
