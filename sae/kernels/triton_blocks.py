"""Kernels for the GPU at hand, compiled by Triton at first use and kept on disk. Tensors in, tensors changed in place.

A program owns the numbers it writes, and adds up in an order that the shapes fix: nothing is atomic, and a result does not
depend on the hardware's timing. Sums are in float32 whatever the tensors are. Rows are read in blocks of ``BLOCK`` columns,
those of ``SOME`` entries at once, because a single row would leave the memory idle while it is waited for. Offsets are
64 bits wide: matrices have more than 2 ** 31 numbers.
"""

# Triton declares that its sums may be tuples.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _add_entries(first, last, columns, d, members, values, rows, SOME: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of the sum over entries ``first`` to ``last`` of their members' rows, weighted by their values."""
    total = tl.zeros((SOME, BLOCK), tl.float32)
    for start in range(first, last, SOME):
        places = start + tl.arange(0, SOME)
        there = places < last
        value = tl.load(values + places, mask=there, other=0.0).to(tl.float32)
        member = tl.load(members + places, mask=there, other=0).to(tl.int64)
        # Silent entries are common, and need not be read.
        wanted = (value != 0)[:, None] & (columns < d)[None, :]
        row = tl.load(rows + member[:, None] * d + columns[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += value[:, None] * row
    return tl.sum(total, 0)


@triton.jit
def _segment(
    i, columns, d, firsts, members, values, rows, heads, chunks, length,
    SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of the sum over segment ``i``: if it is split, what its whole chunks came to, then the entries behind."""
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
    """``out[q]``: the weighted sum over the ``length`` entries from ``begins[q]`` on, unless that is negative."""
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
    """``out[i]``: the sum of segment ``i``'s members' rows, weighted by their values.

    Programs of the same columns follow one another: that part of ``rows`` is small enough to stay in the cache.
    """
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _segment(i, columns, d, firsts, members, values, rows, heads, chunks, length, SPLIT, SOME, BLOCK)
    tl.store(out + i * d + columns, total, mask=columns < d)


@triton.jit
def dots_block(bounds, latents, left, rows, d, out, SOME: tl.constexpr, BLOCK: tl.constexpr):
    """``out[e]``: the product of an entry's token row of ``left`` with its latent's row.

    The token's row is read for ``SOME`` entries at once, after the first time from the cache: it may be of any length.
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
    """Some columns of row ``i``."""
    return tl.load(matrix + i * d + columns, mask=columns < d, other=0.0).to(tl.float32)


@triton.jit
def _gradient(
    i, columns, d, firsts, members, values, rows, dense_of, dense, heads, chunks, length,
    SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of row ``i`` of a gradient: its entries, and row ``dense_of[i]`` of ``dense`` unless that is negative."""
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
    """The product of row ``i`` of a gradient with the weights' row."""
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
    """``out[i]``: squared length of row ``i`` of the gradient, without its part along the weights' row if ``UNIT``.

    If ``WHOLE``, a block holds the row; otherwise a ``UNIT`` row's gradient is added up twice, for want of room to keep it.
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
    """Some columns of a row one step on; their moments are brought up to date."""
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
    """Adam's step on row ``i``, whose gradient, times ``factor``, is never written out; ``UNIT`` rows end at norm 1.

    Weights and moments are read and written once if ``WHOLE``; otherwise ``UNIT`` rows are rescaled once they are written.
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
            # torch's own normalize divides by no less.
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
            # All threads must see what the others wrote.
            tl.debug_barrier()
            norm = tl.maximum(tl.sqrt(total), 1e-12)
            for start in range(0, d, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(weights + i * d + columns, _row(weights, i, columns, d) / norm, mask=columns < d)
