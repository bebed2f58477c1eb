"""Pursuits: sparse codes built by selecting one atom at a time from the residual. Pure functions of inputs and atoms."""

import math
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.parallel import has_numba, over_rows
from .sparse_code import SparseCode

# Maximum size of the atoms' Gram matrix: 16,384 latents in float32.
GRAM_BYTES_LIMIT = 2**30
# Operations in the time that one byte takes from main memory. CPUs and GPUs lie between 5 and 20 in float32.
FLOPS_PER_BYTE = 10
# Operations in the time that one number takes from a matrix row used a step ago, measured on rows of 16 KB.
FLOPS_PER_CACHED_NUMBER = 5
# Transfers of the Gram matrix to or from memory while it is built: for the product, and for copying one triangle to the other.
GRAM_PASSES = 4
# Gram matrices up to this size reuse the memory of the last one. Fresh memory is mapped page by page and zeroed, which at 4096
# latents takes a fourth of the matrix's time.
GRAM_BYTES_KEPT = 2**28
# Correlations below this many rounding errors of ||x|| are noise: after k steps their error is about eps sqrt(k) ||x||.
ROUNDINGS = 8
# An atom whose squared distance from the span of the others is below this many rounding errors is treated as lying in it.
DEPENDENT_ROUNDINGS = 256
# Numbers processed at once: on a CPU they should stay in its caches, on an accelerator they only need to fit.
CHUNK_NUMBERS_CPU = 2**22
CHUNK_NUMBERS_ACCELERATOR = 2**27
# Matrix products with fewer rows read the atoms too often.
MIN_TOKENS_GRAM = 64
MIN_TOKENS_NAIVE = 256
# torch vectorizes max but not argmax on a CPU, so the block with the largest value is found first, then the position in it.
ARGMAX_BLOCK = 128
# Columns of atoms whose gradients one thread accumulates; fewer would be less than one contiguous memory read.
MIN_COLUMNS = 64
GRAM_BLOCK = 512


def matching_pursuit(
    x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n_latents d"], k: int, tolerance: int | float = 0.0
) -> SparseCode:
    """Return ``k`` steps of matching pursuit per token: select the best-correlated atom, then subtract its projection.

    An atom of norm 1 is subtracted up to its projection, a shorter one by less than that and a longer one by more, and longer
    atoms are selected more readily; above a norm of sqrt(2) a step raises the error. A token's entries are in order of
    selection; an atom selected again gets another entry. A token stops for good, and its remaining entries are zeros of latent
    0, once no correlation is positive (up to rounding of ``||x||``), or once ``||r|| <= tolerance ||x||`` before a step;
    tolerance 0 disables the second rule.

    The selection is a constant of differentiation; the values have exact gradients to ``x`` and ``atoms`` through all earlier
    steps. Correlations and values are computed in at least float32, also under autocast. Source: Mallat & Zhang 1993; as an
    encoder, Costa et al. 2025, arXiv:2506.03093.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, atoms = _at_least_float32(x), _at_least_float32(atoms)
        (tokens, d), n_latents = x.shape, atoms.shape[0]
        use_gram = gram_is_cheaper(tokens, d, n_latents, k, x.element_size())
        latents, values = selected_atoms(x, atoms, k, tolerance, use_gram)
        return SparseCode.from_rows(latents, cast(Tensor, _PursuitValues.apply(x, atoms, latents, values)))


def gram_is_cheaper(tokens: int, d: int, n_latents: int, k: int, bytes_per_number: int = 4) -> bool:
    """Return True if looking correlations up in the atoms' Gram matrix is cheaper than computing them from the residual.

    The cost of either method is its operations plus ``FLOPS_PER_BYTE`` times the bytes it takes from main memory. Naive: one
    product per step, which reads the atoms once for each chunk. Gram: the matrix (half of it computed, then copied), one
    product, then one row of the matrix per token and step. A matrix above ``GRAM_BYTES_LIMIT`` is never built.
    """
    lookups = tokens * n_latents * (2 + FLOPS_PER_BYTE * bytes_per_number)
    return _gram_pays(tokens, d, n_latents, k, bytes_per_number, k * lookups)


def descends_by_gram(tokens: int, d: int, n_latents: int, k: int, bytes_per_number: int = 4) -> bool:
    """Return True if the Gram matrix is cheaper for gradient pursuit, whose steps need the rows of all atoms added so far.

    One of these rows comes from main memory, the others from a nearer cache.
    """
    lookups = tokens * n_latents * (2 + FLOPS_PER_BYTE * bytes_per_number + FLOPS_PER_CACHED_NUMBER * (k - 1) / 2)
    return _gram_pays(tokens, d, n_latents, k, bytes_per_number, k * lookups)


def _gram_pays(tokens: int, d: int, n_latents: int, k: int, bytes_per_number: int, lookups: int | float) -> bool:
    gram_bytes, atom_bytes = n_latents**2 * bytes_per_number, n_latents * d * bytes_per_number
    product = 2 * tokens * d * n_latents + FLOPS_PER_BYTE * atom_bytes * math.ceil(tokens / MIN_TOKENS_NAIVE)
    gram = n_latents**2 * d + GRAM_PASSES * FLOPS_PER_BYTE * gram_bytes + product + lookups
    return gram_bytes <= GRAM_BYTES_LIMIT and gram < k * product


@torch.no_grad()
def selected_atoms(
    x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n_latents d"], k: int, tolerance: int | float, use_gram: bool
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Return latents and values of matching pursuit, by one of two methods that differ only by rounding.

    With ``use_gram`` the correlations are computed once and then updated with rows of ``atoms @ atoms.T``. In float32 the error
    does not accumulate enough to require recomputing them: at k = 64 it measures below 4e-7 ``||x||``, compared with 3e-7 for
    the naive method.
    """
    if (kernels := _kernels(x, atoms)) is not None:
        return _select_compiled(kernels, x, atoms.contiguous(), k, tolerance, use_gram)
    latents = torch.zeros(x.shape[0], k, dtype=torch.long, device=x.device)
    values = x.new_zeros(x.shape[0], k)
    padded = _pad_to_blocks(atoms)
    gram = _gram(padded) if use_gram else None
    n = padded.shape[0]
    for rows in _chunks(x.shape[0], 2 * n, MIN_TOKENS_GRAM if use_gram else MIN_TOKENS_NAIVE, x.device):
        residual = x[rows].clone()
        norm = residual.norm(dim=1)
        corr = residual @ padded.T
        looked_up = torch.empty_like(corr) if use_gram else None
        for t in range(k):
            value, latent = _largest(corr)
            fires = value > ROUNDINGS * torch.finfo(x.dtype).eps * norm
            if tolerance > 0:
                fires &= residual.norm(dim=1) > tolerance * norm
            latent, value = latent.where(fires, 0), value.where(fires, 0)
            latents[rows, t], values[rows, t] = latent, value
            if t == k - 1 or (tolerance > 0 and not fires.any()):
                break
            if gram is None or tolerance > 0:
                residual.addcmul_(atoms.index_select(0, latent), value[:, None], value=-1)
            if gram is None:
                torch.mm(residual, padded.T, out=corr)
            else:
                corr.addcmul_(torch.index_select(gram, 0, latent, out=looked_up), value[:, None], value=-1)
    return latents, values


def _select_compiled(
    kernels: ModuleType,
    x: Float[Tensor, "tokens d"],
    atoms: Float[Tensor, "n_latents d"],
    k: int,
    tolerance: int | float,
    use_gram: bool,
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Compute ``selected_atoms`` in compiled loops, without further work on tokens that have stopped."""
    tokens, n = x.shape[0], atoms.shape[0]
    latents, values = torch.zeros(tokens, k, dtype=torch.long), x.new_zeros(tokens, k)
    gram = _gram(atoms) if use_gram else None
    norms = x.norm(dim=1)
    floors = ROUNDINGS * torch.finfo(x.dtype).eps * norms
    corr = None
    for rows in _chunks(tokens, 2 * n, MIN_TOKENS_GRAM if use_gram else MIN_TOKENS_NAIVE, x.device):
        some = x[rows].contiguous() if use_gram else x[rows].clone(memory_format=torch.contiguous_format)
        # Reused, because the system maps fresh memory page by page and zeroes each page.
        corr = x.new_empty(some.shape[0], n) if corr is None else corr[: some.shape[0]]
        torch.mm(some, atoms.T, out=corr)
        stops, found = (norms[rows], floors[rows], float(tolerance)), (latents[rows], values[rows])
        if gram is not None:
            over_rows(kernels.match_by_gram, some.shape[0], corr, gram, some, atoms, *stops, *found)
            continue
        left = norms[rows].clone()
        for t in range(k):
            if t > 0:
                torch.mm(some, atoms.T, out=corr)
            over_rows(kernels.match_once, some.shape[0], corr, some, atoms, *stops, left, t, *found)
            if tolerance > 0 and not found[1][:, t].any():
                break
    return latents, values


class _PursuitValues(torch.autograd.Function):
    """Values of a pursuit as a function of inputs and atoms, for a fixed selection.

    With the selected atoms as rows of ``W`` and ``A = W W^T``, the values ``v`` solve ``(I + tril(A, -1)) v = W x``. For
    incoming ``dv`` let ``(I + triu(A, 1)) q = dv``. Then ``dx = W^T q`` and, with ``r_t`` the residual before step ``t``,
    ``dw_t = q_t r_t - v_t sum_{s>t} q_s w_s = q_t x - (M W)_t`` with ``M = N + N^T``, ``N = tril(q v^T, -1)``. Entries of value
    0 contribute nothing; since all later entries are 0 too, setting their ``dv`` to 0 is sufficient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens d"],
        atoms: Float[Tensor, "n_latents d"],
        latents: Int[Tensor, "tokens k"],
        values: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens k"]:
        ctx.save_for_backward(x, atoms, latents, values)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Float[Tensor, "tokens k"]
    ) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "n_latents d"], None, None]:
        x, atoms, latents, values = ctx.saved_tensors
        (tokens, k), d = latents.shape, x.shape[1]
        if (kernels := _kernels(x, atoms)) is not None:
            return (
                *_back_compiled(kernels, x.contiguous(), atoms.contiguous(), latents, values, grads[0].contiguous()),
                None,
                None,
            )
        dv = grads[0].where(values > 0, 0)
        dx, d_atoms = torch.zeros_like(x), torch.zeros_like(atoms)
        for rows in _chunks(tokens, 2 * k * d, 1, x.device):
            chosen = atoms.index_select(0, latents[rows].flatten()).view(-1, k, d)
            products = torch.bmm(chosen, chosen.mT)
            q = torch.linalg.solve_triangular(products, dv[rows, :, None], upper=True, unitriangular=True)
            dx[rows] = torch.bmm(q.mT, chosen).squeeze(1)
            mixing = (q * values[rows, None, :]).tril(-1)
            per_entry = torch.baddbmm(q * x[rows, None, :], mixing + mixing.mT, chosen, alpha=-1)
            d_atoms.index_add_(0, latents[rows].flatten(), per_entry.flatten(0, 1))
        return dx, d_atoms, None, None


def _back_compiled(
    kernels: ModuleType,
    x: Float[Tensor, "tokens d"],
    atoms: Float[Tensor, "n_latents d"],
    latents: Int[Tensor, "tokens k"],
    values: Float[Tensor, "tokens k"],
    dv: Float[Tensor, "tokens k"],
) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "n_latents d"]]:
    """Return gradients to inputs and atoms, updating the sums over earlier and later steps instead of multiplying them out."""
    q, dx, d_atoms = torch.empty_like(values), torch.empty_like(x), torch.zeros_like(atoms)
    over_rows(kernels.match_back, x.shape[0], atoms, latents, values, dv, q, dx)
    # Each thread accumulates its own columns, so the sums do not depend on the number of threads.
    width = max(MIN_COLUMNS, -(-x.shape[1] // torch.get_num_threads()))
    over_rows(kernels.match_back_to_atoms, -(-x.shape[1] // width), width, x, dx, atoms, latents, values, q, d_atoms)
    return dx, d_atoms


@torch.no_grad()
def orthogonal_matching_pursuit(
    x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n_latents d"], k: int, tolerance: int | float = 0.0
) -> SparseCode:
    """Return the code of matching pursuit with a least-squares refit of all values after each selection.

    For inference only; atoms may have any norm. The residual is orthogonal to all selected atoms, so none is selected twice. An
    atom is selected for the largest positive correlation (at norm 1), but its value may turn negative as others join. Entries
    that are negative at the end are dropped and the rest refitted until none is negative: dropped entries become zeros, and the
    residual stays orthogonal to the remaining atoms. A token stops as in ``matching_pursuit``, or at an atom in the span of
    those selected. Source: Pati et al. 1993; the progressive Cholesky factor is from Batch-OMP, Rubinstein et al. 2008.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, atoms = _at_least_float32(x), _at_least_float32(atoms)
        norms = atoms.norm(dim=1)
        unit = _pad_to_blocks(atoms / norms.clamp_min(torch.finfo(x.dtype).tiny)[:, None])
        latents = torch.zeros(x.shape[0], k, dtype=torch.long, device=x.device)
        values = x.new_zeros(x.shape[0], k)
        for rows in _chunks(x.shape[0], unit.shape[0] + k * (x.shape[1] + k), 1, x.device):
            latents[rows], values[rows] = _orthogonal_chunk(x[rows], unit, k, tolerance)
        return SparseCode.from_rows(latents, (values / norms[latents]).where(values > 0, 0))


@torch.no_grad()
def gradient_pursuit(
    x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n_latents d"], k: int | Int[Tensor, " tokens"]
) -> SparseCode:
    """Return the code of gradient pursuit: each step adds the best-correlated atom, then updates the values of all added atoms.

    The update is one gradient step of optimal length for the residual, after which values are clipped at zero. For inference
    only; atoms may have any norm. ``k`` is the number of steps, for all tokens or per token, and bounds the number of active
    entries. A step whose best atom was already added, or correlates with nothing, adds none and leaves a zero entry. Source:
    Blumensath & Davies 2008, Gradient Pursuits.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, atoms = _at_least_float32(x), _at_least_float32(atoms)
        steps = k if isinstance(k, Tensor) else torch.full_like(x[:, 0], k, dtype=torch.long)
        most = int(steps.max()) if steps.numel() else 0
        if (kernels := _kernels(x, atoms)) is not None:
            use_gram = descends_by_gram(x.shape[0], x.shape[1], atoms.shape[0], most, x.element_size())
            return SparseCode.from_rows(*_descend_compiled(kernels, x, atoms.contiguous(), steps, most, use_gram))
        padded = _pad_to_blocks(atoms)
        latents = torch.zeros(x.shape[0], most, dtype=torch.long, device=x.device)
        values = x.new_zeros(x.shape[0], most)
        for rows in _chunks(x.shape[0], padded.shape[0] + most * x.shape[1], 1, x.device):
            latents[rows], values[rows] = _gradient_chunk(x[rows], padded, steps[rows], most)
        return SparseCode.from_rows(latents, values)


def _descend_compiled(
    kernels: ModuleType,
    x: Float[Tensor, "tokens d"],
    atoms: Float[Tensor, "n_latents d"],
    steps: Int[Tensor, " tokens"],
    most: int,
    use_gram: bool,
) -> tuple[Int[Tensor, "tokens most"], Float[Tensor, "tokens most"]]:
    """Run gradient pursuit in compiled loops; the Gram matrix only selects atoms, values are computed from the atoms."""
    tokens, n = x.shape[0], atoms.shape[0]
    latents, values = torch.zeros(tokens, most, dtype=torch.long), x.new_zeros(tokens, most)
    added, steps = torch.zeros(tokens, most, dtype=torch.bool), steps.contiguous()
    gram = _gram(atoms) if use_gram else None
    corr = None
    for rows in _chunks(tokens, 2 * n, MIN_TOKENS_GRAM if use_gram else MIN_TOKENS_NAIVE, x.device):
        some = x[rows].contiguous()
        corr = x.new_empty(some.shape[0], n) if corr is None else corr[: some.shape[0]]
        torch.mm(some, atoms.T, out=corr)
        found = (added[rows], latents[rows], values[rows])
        if gram is not None:
            over_rows(kernels.descend_by_gram, some.shape[0], corr, gram, some, atoms, steps[rows], *found)
            continue
        residual = some.clone()
        for t in range(most):
            if t > 0:
                torch.mm(residual, atoms.T, out=corr)
            over_rows(kernels.descend_once, some.shape[0], corr, some, residual, atoms, steps[rows], t, *found)
    return latents, values


def _orthogonal_chunk(
    x: Float[Tensor, "tokens d"], unit: Float[Tensor, "n_padded d"], k: int, tolerance: int | float
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Return latents of all tokens at once, with the values of unit-norm atoms."""
    (tokens, d), eps = x.shape, torch.finfo(x.dtype).eps
    latents = torch.zeros(tokens, k, dtype=torch.long, device=x.device)
    kept = torch.zeros(tokens, k, dtype=torch.bool, device=x.device)
    chosen, values, rotated = x.new_zeros(tokens, k, d), x.new_zeros(tokens, k), x.new_zeros(tokens, k, 1)
    # Lower Cholesky factor of the selected atoms' products; unselected entries have a row of the identity.
    factor = torch.eye(k, dtype=x.dtype, device=x.device).repeat(tokens, 1, 1)
    residual, norm, alive = x, x.norm(dim=1), torch.ones(tokens, dtype=torch.bool, device=x.device)
    for t in range(k):
        value, latent = _largest(residual @ unit.T)
        alive = alive & (value > ROUNDINGS * eps * norm) & ((residual.norm(dim=1) > tolerance * norm) | (tolerance == 0))
        atom = unit[latent]
        products = torch.bmm(chosen[:, :t], atom[:, :, None])
        row = torch.linalg.solve_triangular(factor[:, :t, :t], products, upper=False).squeeze(-1)
        distance = 1 - row.pow(2).sum(1)
        alive = alive & (distance > DEPENDENT_ROUNDINGS * eps)
        pivot = distance.where(alive, 1).sqrt()
        factor[:, t, :t], factor[:, t, t] = row.where(alive[:, None], 0), pivot
        latents[:, t], kept[:, t] = latent.where(alive, 0), alive
        chosen[:, t] = atom.where(alive[:, None], 0)
        # The residual is orthogonal to the earlier atoms, so its product with the new atom is the new right-hand side.
        rotated[:, t, 0] = value.where(alive, 0) / pivot
        fit = torch.linalg.solve_triangular(factor[:, : t + 1, : t + 1].mT, rotated[:, : t + 1], upper=True)
        values[:, : t + 1] = fit.squeeze(-1)
        residual = x - torch.bmm(fit.mT, chosen[:, : t + 1]).squeeze(1)
    while (refit := (values < 0).any(1)).any():
        kept[refit] &= values[refit] > 0
        values[refit] = _least_squares(x[refit], chosen[refit], kept[refit])
    return latents, values


def _least_squares(
    x: Float[Tensor, "tokens d"], chosen: Float[Tensor, "tokens k d"], kept: Bool[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """Return the least-squares values of the kept atoms, zero elsewhere."""
    chosen = chosen * kept[:, :, None]
    products = torch.bmm(chosen, chosen.mT) + torch.diag_embed((~kept).to(x.dtype))
    return torch.cholesky_solve(torch.bmm(chosen, x[:, :, None]), torch.linalg.cholesky(products)).squeeze(-1)


def _gradient_chunk(
    x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n_padded d"], steps: Int[Tensor, " tokens"], most: int
) -> tuple[Int[Tensor, "tokens most"], Float[Tensor, "tokens most"]]:
    latents = torch.zeros(x.shape[0], most, dtype=torch.long, device=x.device)
    added = torch.zeros_like(latents, dtype=torch.bool)
    values, chosen = x.new_zeros(x.shape[0], most), x.new_zeros(x.shape[0], most, x.shape[1])
    residual = x
    for t in range(most):
        value, latent = _largest(residual @ atoms.T)
        known = ((latents[:, :t] == latent[:, None]) & added[:, :t]).any(1)
        added[:, t] = ~known & (value > 0)
        latents[:, t] = latent.where(added[:, t], 0)
        chosen[:, t] = atoms[latents[:, t]] * added[:, t, None]
        direction = torch.bmm(chosen, residual[:, :, None])
        moved = torch.bmm(direction.mT, chosen).squeeze(1)
        length = moved.pow(2).sum(1)
        # A residual orthogonal to all added atoms has no descent direction; without this, 0/0 would enter the code.
        step = ((moved * residual).sum(1) / length.where(length > 0, 1)).where(t < steps, 0)
        values = (values + step[:, None] * direction.squeeze(-1)).relu()
        residual = x - torch.bmm(values[:, None, :], chosen).squeeze(1)
    return latents, values


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """Return the compiled loops if numba is available and supports these tensors."""
    compiled = (torch.float32, torch.float64)
    if not has_numba() or any(tensor.device.type != "cpu" or tensor.dtype not in compiled for tensor in tensors):
        return None
    from .kernels import pursuit

    return pursuit


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _chunks(tokens: int, numbers_per_token: int, at_least: int, device: torch.device) -> list[slice]:
    """Return the chunks of tokens to process together."""
    budget = CHUNK_NUMBERS_CPU if device.type == "cpu" else CHUNK_NUMBERS_ACCELERATOR
    size = max(at_least, budget // max(numbers_per_token, 1))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _pad_to_blocks(atoms: Float[Tensor, "n_latents d"]) -> Float[Tensor, "n_padded d"]:
    """Return the atoms padded with zeros to whole blocks; zero atoms correlate with nothing and are never selected."""
    return F.pad(atoms, (0, 0, 0, -atoms.shape[0] % ARGMAX_BLOCK))


class _Kept(threading.local):
    """Memory of each thread's last Gram matrix; the matrix itself is valid only during the call that built it."""

    numbers: Tensor | None = None


_kept = _Kept()


def _gram(atoms: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Return ``atoms @ atoms.T``, computing one triangle and copying the other. Valid until the thread's next call."""
    n = atoms.shape[0]
    numbers, _kept.numbers = _kept.numbers, None
    if numbers is None or numbers.numel() != n * n or numbers.dtype != atoms.dtype or numbers.device != atoms.device:
        numbers = atoms.new_empty(n * n)
    # Accelerators have caching allocators. Tensors created in inference mode cannot be written outside it.
    if atoms.device.type == "cpu" and n * n * atoms.element_size() <= GRAM_BYTES_KEPT and not numbers.is_inference():
        _kept.numbers = numbers
    gram = numbers.view(n, n)
    for start in range(0, n, GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        torch.mm(atoms[start:stop], atoms[start:].T, out=gram[start:stop, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def _largest(corr: Float[Tensor, "tokens n_padded"]) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Return value and position of each row's maximum, the first on ties."""
    if corr.device.type != "cpu":
        return corr.max(dim=1)
    blocks = corr.view(corr.shape[0], -1, ARGMAX_BLOCK)
    block = blocks.amax(-1).argmax(1)
    best = blocks[torch.arange(corr.shape[0]), block]
    value, place = best.max(dim=1)
    return value, block * ARGMAX_BLOCK + place


PURSUITS: dict[str, Callable[[Tensor, Tensor, int], SparseCode]] = {
    "matching_pursuit": matching_pursuit,
    "orthogonal_matching_pursuit": orthogonal_matching_pursuit,
    "gradient_pursuit": gradient_pursuit,
}
