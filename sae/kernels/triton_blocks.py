"""Kernels for the GPU, compiled by Triton at first use and cached on disk. Tensors in, tensors changed in place.

A program owns the numbers it writes and adds in an order fixed by the shapes: there are no atomics, and results do not depend
on the hardware's timing. Sums are in float32 regardless of dtype. Rows are read in blocks of ``BLOCK`` columns, for ``SOME``
entries at once, because waiting for a single row would leave memory bandwidth idle. Offsets are 64-bit: matrices have more than
2 ** 31 numbers.
"""

# Triton's annotations allow sums to be tuples.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _add_entries(first, last, columns, d, members, values, rows, SOME: tl.constexpr, BLOCK: tl.constexpr):
    """Return some columns of the sum over entries ``first`` to ``last`` of their members' rows, weighted by their values."""
    total = tl.zeros((SOME, BLOCK), tl.float32)
    for start in range(first, last, SOME):
        places = start + tl.arange(0, SOME)
        there = places < last
        value = tl.load(values + places, mask=there, other=0.0).to(tl.float32)
        member = tl.load(members + places, mask=there, other=0).to(tl.int64)
        # Entries of value zero are common and their rows need not be read.
        wanted = (value != 0)[:, None] & (columns < d)[None, :]
        row = tl.load(rows + member[:, None] * d + columns[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += value[:, None] * row
    return tl.sum(total, 0)


@triton.jit
def _segment(
    i, columns, d, firsts, members, values, rows, heads, chunks, length,
    SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return some columns of the sum over segment ``i``: its precomputed chunks if it is split, plus the remaining entries."""
    first = tl.load(firsts + i)
    total = tl.zeros((BLOCK,), tl.float32)
    if SPLIT:
        head = tl.load(heads + i)
        end = tl.load(heads + i + 1)
        for q in range(head, end):
            total += tl.load(chunks + q * d + columns, mask=columns < d, other=0.0)
        first += (end - head) * length
    return total + _add_entries(first, tl.load(firsts + i + 1), columns, d, members, values, rows, SOME, BLOCK)


@triton.jit
def sum_chunks_block(begins, length, members, values, rows, d, out, SOME: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``out[q]``: the weighted sum over the ``length`` entries from ``begins[q]`` on, unless that is negative."""
    q = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(begins + q)
    if first >= 0:
        total = _add_entries(first, first + length, columns, d, members, values, rows, SOME, BLOCK)
        tl.store(out + q * d + columns, total, mask=columns < d)


@triton.jit
def sum_segments_block(
    firsts, members, values, rows, heads, chunks, length, d, out,
    SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``out[i]``: the sum of the rows of segment ``i``'s members, weighted by their values.

    Programs of the same columns are consecutive, because that part of ``rows`` is small enough to stay in cache.
    """
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _segment(i, columns, d, firsts, members, values, rows, heads, chunks, length, SPLIT, SOME, BLOCK)
    tl.store(out + i * d + columns, total, mask=columns < d)


@triton.jit
def dots_block(bounds, latents, left, rows, d, out, SOME: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``out[e]``: the dot product of an entry's token row of ``left`` and its latent's row.

    The token's row, which may have any length, is read once per ``SOME`` entries, after the first time from cache.
    """
    t = tl.program_id(0).to(tl.int64)
    last = tl.load(bounds + t + 1)
    for start in range(tl.load(bounds + t), last, SOME):
        places = start + tl.arange(0, SOME)
        there = places < last
        latent = tl.load(latents + places, mask=there, other=0).to(tl.int64)
        total = tl.zeros((SOME, BLOCK), tl.float32)
        for column in range(0, d, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            mine = tl.load(left + t * d + columns, mask=columns < d, other=0.0).to(tl.float32)
            wanted = there[:, None] & (columns < d)[None, :]
            row = tl.load(rows + latent[:, None] * d + columns[None, :], mask=wanted, other=0.0).to(tl.float32)
            total += mine[None, :] * row
        tl.store(out + places, tl.sum(total, 1), mask=there)


@triton.jit
def _row(matrix, i, columns, d):
    """Return some columns of row ``i``."""
    return tl.load(matrix + i * d + columns, mask=columns < d, other=0.0).to(tl.float32)


@triton.jit
def _gradient(
    i, columns, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length,
    SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return some columns of row ``i`` of a gradient: its entries, plus row ``dense_of[i]`` of ``dense`` unless negative."""
    gradient = _segment(i, columns, d, firsts, members, values, rows, heads, chunks, length, SPLIT, SOME, BLOCK)
    place = tl.load(dense_of + i)
    if place >= 0:
        gradient += _row(dense, place, columns, d)
    return gradient


@triton.jit
def _along(
    i, weights, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length,
    SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the dot product of row ``i`` of a gradient and of the weights."""
    along = 0.0
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        gradient = _gradient(
            i, columns, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, SPLIT, SOME, BLOCK
        )
        along += tl.sum(gradient * _row(weights, i, columns, d))
    return along


@triton.jit
def squared_norms_block(
    weights, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, out,
    UNIT: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``out[i]``: squared norm of row ``i`` of the gradient, without its part along the weights' row if ``UNIT``.

    If ``WHOLE``, one block holds the row; otherwise the gradient of a ``UNIT`` row is computed twice, as it cannot be kept.
    """
    i = tl.program_id(0).to(tl.int64)
    if WHOLE:
        columns = tl.arange(0, BLOCK)
        gradient = _gradient(
            i, columns, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, SPLIT, SOME, BLOCK
        )
        if UNIT:
            row = _row(weights, i, columns, d)
            gradient -= tl.sum(gradient * row) * row
        tl.store(out + i, tl.sum(gradient * gradient))
    else:
        along = 0.0
        if UNIT:
            along = _along(
                i, weights, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, SPLIT, SOME, BLOCK
            )
        total = 0.0
        for start in range(0, d, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            gradient = _gradient(
                i, columns, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, SPLIT, SOME, BLOCK
            )
            if UNIT:
                gradient -= along * _row(weights, i, columns, d)
            total += tl.sum(gradient * gradient)
        tl.store(out + i, total)


@triton.jit
def _move(row, gradient, mean, square, i, columns, d, new, keep, fresh, step, root, eps):
    """Apply Adam to some columns of a row: update the moments and return the new values."""
    m = _row(mean, i, columns, d)
    m += (gradient - m) * new
    tl.store(mean + i * d + columns, m, mask=columns < d)
    v = _row(square, i, columns, d) * keep + gradient * gradient * fresh
    tl.store(square + i * d + columns, v, mask=columns < d)
    return row - step * m / (tl.sqrt(v) * root + eps)


@triton.jit
def adam_block(
    weights, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, mean, square, factor,
    new, keep, fresh, step, root, eps,
    UNIT: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply an Adam step to row ``i`` with its gradient times ``factor``, never materialized; ``UNIT`` rows end at norm 1.

    Weights and moments are read and written once if ``WHOLE``; otherwise ``UNIT`` rows are rescaled after they are written.
    """
    i = tl.program_id(0).to(tl.int64)
    scale = tl.load(factor).to(tl.float32)
    if WHOLE:
        columns = tl.arange(0, BLOCK)
        gradient = _gradient(
            i, columns, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, SPLIT, SOME, BLOCK
        )
        row = _row(weights, i, columns, d)
        if UNIT:
            gradient -= tl.sum(gradient * row) * row
        row = _move(row, gradient * scale, mean, square, i, columns, d, new, keep, fresh, step, root, eps)
        if UNIT:
            # Lower bound as in ``torch.nn.functional.normalize``.
            row /= tl.maximum(tl.sqrt(tl.sum(row * row)), 1e-12)
        tl.store(weights + i * d + columns, row, mask=columns < d)
    else:
        along = 0.0
        if UNIT:
            along = _along(
                i, weights, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, SPLIT, SOME, BLOCK
            )
        total = 0.0
        for start in range(0, d, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            gradient = _gradient(
                i, columns, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length, SPLIT, SOME, BLOCK
            )
            row = _row(weights, i, columns, d)
            if UNIT:
                gradient -= along * row
            row = _move(row, gradient * scale, mean, square, i, columns, d, new, keep, fresh, step, root, eps)
            total += tl.sum(row * row)
            tl.store(weights + i * d + columns, row, mask=columns < d)
        if UNIT:
            # All threads must see the values written by the others.
            tl.debug_barrier()
            norm = tl.maximum(tl.sqrt(total), 1e-12)
            for start in range(0, d, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(weights + i * d + columns, _row(weights, i, columns, d) / norm, mask=columns < d)
