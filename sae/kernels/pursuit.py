"""Pursuit kernels for the CPU, compiled by numba: ``kernel(first, last, *arrays)`` for ``parallel.over_rows``.

``sae.pursuit`` has the reference implementation; these select the same latents, ties included, with equal values up to
rounding.
"""

import numpy as np

from .compiling import njit

# Number of running maxima, one per lane, merged at the end: the compiler can vectorize such a loop. Each lane also stores the
# round of its maximum, so that the position needs no second pass.
LANES = 128
# Only optimizations that preserve infinities and NaN: reordered sums and fused products.
FUSED, REORDERED = {"contract"}, {"contract", "reassoc"}


@njit(nogil=True)
def _copy(source, to):
    """Copy a row. For ``to[:] = source`` numba compiles the text of an error about shapes as well, which takes seconds."""
    for place in range(source.shape[0]):
        to[place] = source[place]


@njit(nogil=True)
def _reset(best, at):
    best[:] = -np.inf
    at[:] = 0


@njit(nogil=True)
def _look(corr, best, at):
    """Compute the lanes' maxima of ``corr``, up to its last full round."""
    _reset(best, at)
    for turn in range(corr.shape[0] // LANES):
        for lane in range(LANES):
            value = corr[turn * LANES + lane]
            larger = value > best[lane]
            best[lane] = value if larger else best[lane]
            at[lane] = turn if larger else at[lane]


@njit(nogil=True, fastmath=FUSED)
def _update_and_look(corr, value, row, best, at):
    """Subtract ``value * row`` from ``corr`` and compute the lanes' maxima, as ``_look`` does."""
    _reset(best, at)
    for turn in range(corr.shape[0] // LANES):
        for lane in range(LANES):
            place = turn * LANES + lane
            left = corr[place] - value * row[place]
            corr[place] = left
            larger = left > best[lane]
            best[lane] = left if larger else best[lane]
            at[lane] = turn if larger else at[lane]
    for place in range(corr.shape[0] // LANES * LANES, corr.shape[0]):
        corr[place] -= value * row[place]


@njit(nogil=True)
def _first_largest(corr, best, at):
    """Return value and position of the maximum, the first on ties, from the lanes and positions after the last full round."""
    value, latent = best[0], at[0] * LANES
    for lane in range(1, LANES):
        place = at[lane] * LANES + lane
        if best[lane] > value or (best[lane] == value and place < latent):
            value, latent = best[lane], place
    for place in range(corr.shape[0] // LANES * LANES, corr.shape[0]):
        if corr[place] > value:
            value, latent = corr[place], place
    return value, latent


@njit(nogil=True, fastmath=REORDERED)
def _subtract(residual, value, atom):
    """Subtract ``value * atom`` from ``residual`` and return the norm of the result."""
    energy = residual[0] * 0
    for i in range(residual.shape[0]):
        left = residual[i] - value * atom[i]
        residual[i] = left
        energy += left * left
    return np.sqrt(energy)


@njit(nogil=True)
def match_by_gram(first, last, corr, gram, x, atoms, norms, floors, tolerance, latents, values):
    """Run all steps of matching pursuit, one token at a time: its row of ``corr`` stays in cache and is overwritten."""
    best, at, residual = np.empty(LANES, corr.dtype), np.empty(LANES, np.int32), np.empty_like(x[0])
    steps = values.shape[1]
    for token in range(first, last):
        norm = norms[token]
        if tolerance > 0:
            _copy(x[token], residual)
        _look(corr[token], best, at)
        for t in range(steps):
            value, latent = _first_largest(corr[token], best, at)
            if not value > floors[token] or (tolerance > 0 and not norm > tolerance * norms[token]):
                break
            latents[token, t], values[token, t] = latent, value
            if t + 1 < steps:
                if tolerance > 0:
                    norm = _subtract(residual, value, atoms[latent])
                _update_and_look(corr[token], value, gram[latent], best, at)


@njit(nogil=True)
def match_once(first, last, corr, residual, atoms, norms, floors, tolerance, left, t, latents, values):
    """Run step ``t`` of matching pursuit on newly computed correlations. ``left`` is the norm of every token's residual."""
    best, at = np.empty(LANES, corr.dtype), np.empty(LANES, np.int32)
    for token in range(first, last):
        _look(corr[token], best, at)
        value, latent = _first_largest(corr[token], best, at)
        if value > floors[token] and (tolerance == 0 or left[token] > tolerance * norms[token]):
            latents[token, t], values[token, t] = latent, value
            left[token] = _subtract(residual[token], value, atoms[latent])


@njit(nogil=True, fastmath=REORDERED)
def match_back(first, last, atoms, latents, values, dv, q, dx):
    """Compute ``q_t = dv_t - w_t . sum_{s>t} q_s w_s`` from the values' gradients ``dv``, and ``dx``, the complete sum."""
    for token in range(first, last):
        later = dx[token]
        later[:] = 0
        for t in range(values.shape[1] - 1, -1, -1):
            if not values[token, t] > 0:
                q[token, t] = 0
                continue
            atom, weight = atoms[latents[token, t]], dv[token, t]
            for i in range(later.shape[0]):
                weight -= atom[i] * later[i]
            q[token, t] = weight
            for i in range(later.shape[0]):
                later[i] += weight * atom[i]


@njit(nogil=True, fastmath=FUSED)
def match_back_to_atoms(first, last, width, x, dx, atoms, latents, values, q, d_atoms):
    """Add ``q_t r_t - v_t sum_{s>t} q_s w_s`` to the gradient of every entry's atom, in column blocks ``first`` to ``last``.

    Blocks have ``width`` columns. Residual and sum are updated step by step, so no entry's row is stored.
    """
    residual, later = np.empty(width, x.dtype), np.empty(width, x.dtype)
    for block in range(first, last):
        start = block * width
        columns = min(width, x.shape[1] - start)
        for token in range(x.shape[0]):
            for i in range(columns):
                residual[i], later[i] = x[token, start + i], dx[token, start + i]
            for t in range(values.shape[1]):
                value, weight, latent = values[token, t], q[token, t], latents[token, t]
                if not value > 0:
                    break
                atom, total = atoms[latent, start : start + columns], d_atoms[latent, start : start + columns]
                for i in range(columns):
                    later[i] -= weight * atom[i]
                    total[i] += weight * residual[i] - value * later[i]
                    residual[i] -= value * atom[i]


@njit(nogil=True, fastmath=FUSED)
def _correlate(corr, latents, values, gram, left):
    """Compute ``left = corr - values @ gram[latents]``, four rows at a time."""
    _copy(corr, left)
    for t in range(0, values.shape[0], 4):
        # Past the end, rows are repeated with weight 0.
        t1, t2, t3 = min(t + 1, values.shape[0] - 1), min(t + 2, values.shape[0] - 1), min(t + 3, values.shape[0] - 1)
        v0, v1, v2, v3 = values[t], values[t1], values[t2], values[t3]
        v1, v2, v3 = v1 if t1 > t else v1 * 0, v2 if t2 > t1 else v2 * 0, v3 if t3 > t2 else v3 * 0
        g0, g1, g2, g3 = gram[latents[t]], gram[latents[t1]], gram[latents[t2]], gram[latents[t3]]
        for place in range(left.shape[0]):
            left[place] = left[place] - v0 * g0[place] - v1 * g1[place] - v2 * g2[place] - v3 * g3[place]


@njit(nogil=True, fastmath=REORDERED)
def _dot(a, b):
    total = a[0] * 0
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(nogil=True, fastmath=REORDERED)
def _descend(value, latent, t, x, atoms, latents, values, added, direction, moved, residual):
    """Run step ``t`` of gradient pursuit on one token whose largest correlation is ``value``, at ``latent``."""
    known = False
    for s in range(t):
        known |= added[s] and latents[s] == latent
    if not known and value > 0:
        latents[t], added[t] = latent, True
    moved[:] = 0
    for s in range(t + 1):
        if added[s]:
            atom = atoms[latents[s]]
            direction[s] = _dot(atom, residual)
            for i in range(moved.shape[0]):
                moved[i] += direction[s] * atom[i]
    length = _dot(moved, moved)
    # A residual orthogonal to all added atoms has no descent direction; without this, 0/0 would enter the code.
    step = _dot(moved, residual) / length if length > 0 else length * 0
    _copy(x, residual)
    for s in range(t + 1):
        if added[s]:
            values[s] = max(values[s] + step * direction[s], values[s] * 0)
            atom = atoms[latents[s]]
            for i in range(residual.shape[0]):
                residual[i] -= values[s] * atom[i]


@njit(nogil=True)
def descend_by_gram(first, last, corr, gram, x, atoms, steps, added, latents, values):
    """Run all steps of gradient pursuit, one token at a time: the rows of ``gram`` that it rereads stay in cache."""
    best, at, left = np.empty(LANES, corr.dtype), np.empty(LANES, np.int32), np.empty_like(corr[0])
    direction, moved, residual = np.empty_like(values[0]), np.empty_like(x[0]), np.empty_like(x[0])
    for token in range(first, last):
        _copy(x[token], residual)
        _copy(corr[token], left)
        _look(left, best, at)
        for t in range(steps[token]):
            value, latent = _first_largest(left, best, at)
            entries = latents[token], values[token], added[token]
            _descend(value, latent, t, x[token], atoms, *entries, direction, moved, residual)
            if t + 1 < steps[token]:
                _correlate(corr[token], latents[token, : t + 1], values[token, : t + 1], gram, left)
                _look(left, best, at)


@njit(nogil=True)
def descend_once(first, last, corr, x, residual, atoms, steps, t, added, latents, values):
    """Run step ``t`` of gradient pursuit on newly computed correlations."""
    best, at = np.empty(LANES, corr.dtype), np.empty(LANES, np.int32)
    direction, moved = np.empty_like(values[0]), np.empty_like(x[0])
    for token in range(first, last):
        if t < steps[token]:
            _look(corr[token], best, at)
            value, latent = _first_largest(corr[token], best, at)
            entries = latents[token], values[token], added[token]
            _descend(value, latent, t, x[token], atoms, *entries, direction, moved, residual[token])
