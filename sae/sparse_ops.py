"""Operations on sparse codes: decoding, and gradients that touch only active entries.

A step needs one dense product, that of the encoder. Its backward pass, like that of decoding, is a product with a sparse matrix
of the code's entries. It runs in compiled kernels if they support the tensors (``sae.kernels``), otherwise in torch with CSR
matrices, or in chunks where CSR is missing (no MKL, low precision). All are tested against the plain reference below. If a
``SparseGrad`` is attached to a matrix, its gradient goes there and is not materialized.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .break_even import break_even
from .dense_code import DenseCode
from .kept_memory import kept_memory
from .kernels import backend
from .sparse_code import SparseCode, bounds
from .sparse_grad import Product, SparseGrad, ledger_of
from .threshold_window import Window, columns_of

# Codes with fewer entries never take dense products: they are not worth the check.
DENSE_ENTRIES = 1 << 18
# Trial that finds the density above which dense products are faster: one entry in so many, and tokens.
TRIAL_EVERY = 16
TRIAL_TOKENS = 128
# Tokens, and latents, of the sample that estimates a density.
SAMPLE = 512


def decode(code: SparseCode, atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "tokens d_out"]:
    """Return the sum of each token's decoder directions, weighted by its values, reading active directions only.

    Codes with many entries use a dense product. Differentiable in ``atoms`` and in ``code.values``.
    """
    if isinstance(code, DenseCode):
        return code.decode(atoms)
    # Under autocast the values have lower precision than the decoder.
    values, theta = code.values.to(atoms.dtype), None if code.window is None else code.window.theta
    return _Decode.apply(values, atoms, code.latents, code.starts, ledger_of(atoms), theta, code.window)  # pyright: ignore[reportReturnType]


def entries(
    x: Float[Tensor, "tokens d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"] | None,
    values: Float[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    starts: Int[Tensor, " tokens"],
    shift: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, " nnz"]:
    """Return precomputed entries of ``W x + b``, made differentiable in ``x``, ``W`` and ``b``.

    If ``x`` is constant data minus a ``shift``, pass the shift to differentiate it instead of ``x``: entry gradients are then
    summed over tokens first and multiplied by ``W`` once. Source: the training code of Gao et al. 2024, arXiv:2406.04093.
    """
    if shift is not None:
        x = x.detach()
    return _Entries.apply(x, W, b, shift, values, latents, starts, ledger_of(W))  # pyright: ignore[reportReturnType]


def decode_plain(code: SparseCode, atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "tokens d_out"]:
    """Reference for ``decode``: torch's embedding bag with its own gradients."""
    return F.embedding_bag(code.latents, atoms, code.starts, mode="sum", per_sample_weights=code.values.to(atoms.dtype))


def entries_plain(
    x: Float[Tensor, "tokens d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"] | None,
    latents: Int[Tensor, " nnz"],
    starts: Int[Tensor, " tokens"],
) -> Float[Tensor, " nnz"]:
    """Reference for ``entries``: the dense ``W x + b``, indexed at the entries."""
    tokens = SparseCode(latents, torch.empty(latents.shape[0]), starts).token_ids()
    return F.linear(x, W, b)[tokens, latents]


def per_entry(values: Float[Tensor, " n_latents"], latents: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
    """Return the value of each entry's latent.

    Equals ``values[latents]``, but the gradient of that adds up in arbitrary thread order, so training would not be
    reproducible.
    """
    return values.index_select(0, latents)


def row_norms(W: Float[Tensor, "n_latents d"], widths: Sequence[int] = ()) -> Float[Tensor, " n_latents"]:
    """Return the norm of every row; its gradient goes to the matrix's ``SparseGrad`` if it has one.

    With ``widths`` the columns are those of several sites, and the result is the sum of the norms at each.
    """
    return _RowNorms.apply(W, ledger_of(W), tuple(widths) or (W.shape[1],))  # pyright: ignore[reportReturnType]


def some_rows(W: Float[Tensor, "n_latents d"], latents: Int[Tensor, " some"]) -> Float[Tensor, "some d"]:
    """Return ``W[latents]`` for distinct latents; the gradient goes to the matrix's ``SparseGrad`` if it has one."""
    return _SomeRows.apply(W, latents, ledger_of(W))  # pyright: ignore[reportReturnType]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        atoms: Tensor,
        latents: Tensor,
        starts: Tensor,
        ledger: SparseGrad | None,
        theta: Tensor | None,
        window: Window | None,
    ) -> Tensor:
        ctx.save_for_backward(values, atoms, latents, starts)
        ctx.ledger, ctx.window = ledger, window
        return _gather(values, atoms, latents, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, atoms, latents, starts = ctx.saved_tensors
        to_values = to_theta = None
        if ctx.window is not None:
            # The gradient of all values that a latent might have.
            every = torch.mm(grads[0], atoms.T, out=kept_memory.take(len(grads[0]), len(atoms), atoms))
            sums = [ctx.window.sums(every[:, some], some) for some in columns_of(every)]
            to_theta = ctx.window.to_theta(torch.cat(sums), None)
            tokens = SparseCode(latents, values, starts).token_ids()
            to_values = every.view(-1).index_select(0, tokens * len(atoms) + latents)
        elif ctx.needs_input_grad[0]:
            to_values = dots(grads[0], atoms, latents, starts)
        to_atoms = _to_matrix(values, grads[0], latents, starts, atoms, ctx.ledger) if ctx.needs_input_grad[1] else None
        return to_values, to_atoms, None, None, None, to_theta, None


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        shift: Tensor | None,
        values: Tensor,
        latents: Tensor,
        starts: Tensor,
        ledger: SparseGrad | None,
    ) -> Tensor:
        ctx.save_for_backward(x, W, latents, starts)
        ctx.ledger = ledger
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, latents, starts = ctx.saved_tensors
        wants_x, wants_W, wants_b, wants_shift = ctx.needs_input_grad[:4]
        to_x = _gather(grads[0], W, latents, starts).to(x.dtype) if wants_x else None
        to_W = _to_matrix(grads[0], x, latents, starts, W, ctx.ledger) if wants_W else None
        to_b = to_shift = None
        if wants_b or wants_shift:
            to_b = torch.zeros(W.shape[0], dtype=W.dtype, device=W.device).index_add_(0, latents, grads[0].to(W.dtype))
            to_shift = -(to_b @ W) if wants_shift else None
        return to_x, to_W, to_b if wants_b else None, to_shift, None, None, None, None


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, ledger: SparseGrad | None, widths: tuple[int, ...]) -> Tensor:
        norms = [part.norm(dim=-1) for part in W.split(widths, dim=1)]
        ctx.save_for_backward(W, *norms)
        ctx.ledger, ctx.widths = ledger, widths
        return norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        W, *norms = ctx.saved_tensors
        # As in torch, a row of zeros has the gradient 0.
        scales = [(grads[0] / each).masked_fill(each == 0, 0.0)[:, None] for each in norms]
        whole, begun = (torch.empty_like(W), 0) if ctx.ledger is None else ctx.ledger.open_whole(W)
        for into, part, scale in zip(whole.split(ctx.widths, 1), W.split(ctx.widths, 1), scales, strict=True):
            if begun:
                into.addcmul_(part, scale)
            else:
                torch.mul(part, scale, out=into)
        return (whole if ctx.ledger is None else None), None, None


class _SomeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, latents: Tensor, ledger: SparseGrad | None) -> Tensor:
        ctx.save_for_backward(W, latents)
        ctx.ledger = ledger
        return W[latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        W, latents = ctx.saved_tensors
        if ctx.ledger is None:
            return torch.zeros_like(W).index_copy_(0, latents, grads[0]), None, None
        ctx.ledger.rows.append((latents, grads[0]))
        return None, None, None


def _to_matrix(
    values: Tensor, rows: Tensor, latents: Tensor, starts: Tensor, like: Tensor, ledger: SparseGrad | None
) -> Tensor | None:
    """Return the dense gradient of a matrix from a code's entries, or append it to a ``SparseGrad`` and return ``None``."""
    if ledger is None or _crowded(latents, starts, like):
        return spread(values, rows, latents, starts, like)
    code = SparseCode(latents, values.to(like.dtype), starts)
    ledger.products.append(Product(code, rows.to(like.dtype).contiguous()))
    return None


def _gather(values: Tensor, rows: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    """Return per token the sum of its latents' rows weighted by the entries: (tokens, d)."""
    values = values.to(rows.dtype).contiguous()
    if _crowded(latents, starts, rows):
        return SparseCode(latents, values, starts).to_dense(rows.shape[0]) @ rows
    return _gather_entries(values, rows, latents, starts)


def _gather_entries(values: Tensor, rows: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    kernels = backend(values, rows)
    if kernels is not None:
        return kernels.decode(bounds(latents, starts), latents, values, rows)
    return F.embedding_bag(latents, rows, starts, mode="sum", per_sample_weights=values)


def spread(values: Tensor, rows: Tensor, latents: Tensor, starts: Tensor, like: Tensor) -> Tensor:
    """Return per latent the sum of its tokens' rows weighted by the entries: (n_latents, d), like ``like``."""
    values, rows = values.to(like.dtype).contiguous(), rows.to(like.dtype).contiguous()
    tokens, n_latents = starts.shape[0], like.shape[0]
    code = SparseCode(latents, values, starts)
    if _crowded(latents, starts, like):
        return code.to_dense(n_latents).T @ rows
    kernels = backend(values, rows)
    if kernels is not None:
        group = code.by_latent(n_latents)
        return kernels.spread(group.firsts, group.tokens, values.index_select(0, group.order), rows)
    if not _has_csr(like):
        by_entry = torch.zeros_like(like)
        # In chunks: the rows of all entries at once would be k times the input.
        for some in torch.arange(latents.shape[0], device=latents.device).split(1 << 14):
            by_entry.index_add_(0, latents[some], values[some, None] * rows[code.token_ids()[some]])
        return by_entry
    group = code.by_latent(n_latents)
    return _csr(group.firsts, group.tokens, values.index_select(0, group.order), (n_latents, tokens)) @ rows


def dots(left: Tensor, rows: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    """Return for every entry the dot product of its token's row of ``left`` and its latent's row: (nnz,). No gradient."""
    code = SparseCode(latents, torch.empty(latents.shape[0]), starts)
    left = left.contiguous()
    if _crowded(latents, starts, rows):
        return (left @ rows.T)[code.token_ids(), latents]
    return _entry_dots(left, rows, latents, starts)


def _entry_dots(left: Tensor, rows: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    code = SparseCode(latents, torch.empty(latents.shape[0]), starts)
    kernels = backend(left, rows)
    if kernels is not None:
        return kernels.dots(bounds(latents, starts), latents, left, rows)
    # Repeated latents can give more entries than cells, which torch's CSR matrices do not allow.
    if not _has_csr(rows) or not 0 < latents.shape[0] <= starts.shape[0] * rows.shape[0]:
        picked = [
            (left[code.token_ids()[some]] * rows[latents[some]]).sum(-1)
            for some in torch.arange(latents.shape[0], device=latents.device).split(1 << 14)
        ]
        return torch.cat(picked) if picked else rows.new_zeros(0)
    pattern = _csr(bounds(latents, starts), latents, rows.new_zeros(latents.shape[0]), (starts.shape[0], rows.shape[0]))
    return torch.sparse.sampled_addmm(pattern, left, rows.T, beta=0.0).values()


def _crowded(latents: Tensor, starts: Tensor, rows: Tensor) -> bool:
    """Return True if the code has so many entries that dense products are faster."""
    found = latents.shape[0]
    return found >= DENSE_ENTRIES and found >= dense_share(rows) * starts.shape[0] * rows.shape[0]


@torch.no_grad()
def dense_share(rows: Float[Tensor, "n_latents d"]) -> float:
    """Return the density above which dense products with a matrix like this are faster, measured at first use."""
    n_latents, d = rows.shape
    name = f"{rows.device.type} {rows.dtype} {n_latents} {d} {torch.get_num_threads()}"

    def trial() -> tuple[Callable[[], object], Callable[[], object], float]:
        numbers = torch.Generator().manual_seed(0)
        matrix, tokens = torch.randn(n_latents, d, generator=numbers).to(rows), TRIAL_TOKENS
        k = -(-n_latents // TRIAL_EVERY)
        latents = torch.arange(k) * TRIAL_EVERY + torch.randint(TRIAL_EVERY, (tokens, k), generator=numbers)
        code = SparseCode.from_rows(
            latents.clamp_(max=n_latents - 1).to(rows.device), torch.rand(tokens, k, generator=numbers).to(rows)
        )
        x, dense = torch.randn(tokens, d, generator=numbers).to(rows), code.to_dense(n_latents)
        products = torch.empty_like(dense), torch.empty_like(x)

        def by_entries() -> None:
            _gather_entries(code.values, matrix, code.latents, code.starts)
            _entry_dots(x, matrix, code.latents, code.starts)

        def by_products() -> None:
            torch.mm(dense, matrix, out=products[1])
            torch.mm(x, matrix.T, out=products[0])

        return by_entries, by_products, k / n_latents

    return break_even(name, trial, rows.device)


@torch.no_grad()
def shares_above(
    x: Float[Tensor, "tokens d_in"], W: Float[Tensor, "n_latents d_in"], b: Tensor | None, cuts: Sequence[Tensor]
) -> list[float]:
    """Estimate from some tokens and latents the fractions of all numbers ``W x + b`` that exceed cuts, one per latent."""
    tokens, latents = (slice(None, None, max(1, size // SAMPLE)) for size in (len(x), len(W)))
    some = F.linear(x[tokens], W[latents], None if b is None else b[latents])
    return [float((some > cut.expand(len(W))[latents]).double().mean()) for cut in cuts]


def are_crowded(x: Tensor, W: Tensor, b: Tensor | None, cuts: Sequence[Tensor]) -> list[bool]:
    """Return for each cut True if the scores above it are so many that a dense code is faster; autocast prevents that."""
    cells = len(x) * len(W)
    if cells < DENSE_ENTRIES or x.dtype != W.dtype or torch.is_autocast_enabled(x.device.type):
        return [False] * len(cuts)
    shares = shares_above(x.detach(), W.detach(), None if b is None else b.detach(), cuts)
    return [share * cells >= DENSE_ENTRIES and share >= dense_share(W) for share in shares]


def _has_csr(rows: Tensor) -> bool:
    """Return True if torch multiplies CSR matrices of this dtype and device."""
    return rows.dtype in (torch.float32, torch.float64) and (rows.is_cuda or torch.backends.mkl.is_available())


def _csr(firsts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # torch warns once per process that CSR is in beta.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(firsts, columns, values, shape, check_invariants=False)
