"""Kernels for the CPU at hand, compiled by numba at first use and kept on disk. Arrays in, arrays changed in place.

Every kernel works on rows ``first`` to ``last`` of its output and touches no others; ``over_rows`` shares them out.
"""

import numpy as np

from .compiling import njit

# Sums may be reordered, which lets them run in vector registers; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
# Scores looked at together: few enough that one which exceeds the smallest kept is soon found.
BLOCK = 128


compiled = njit(nogil=True, fastmath=FAST, error_model="numpy")
# Minima run in vector registers if no number is NaN; with one the result means nothing. Where that must not be so,
# and wherever a place to write to depends on a comparison, ``compiled`` is needed.
ranked = njit(nogil=True, fastmath=FAST | {"nnan"}, error_model="numpy")


@compiled
def decode_loop(first, last, bounds, latents, values, atoms, out):
    """``out[t]``: the sum of token ``t``'s atoms, weighted by its values."""
    d = atoms.shape[1]
    for t in range(first, last):
        row = out[t]
        row[:] = 0
        for e in range(bounds[t], bounds[t + 1]):
            value, atom = values[e], atoms[latents[e]]
            if value != 0:
                for c in range(d):
                    row[c] += value * atom[c]


@compiled
def dots_loop(first, last, bounds, latents, left, rows, out):
    """``out[e]``: the product of an entry's token row of ``left`` with its latent's row."""
    d = rows.shape[1]
    for t in range(first, last):
        mine = left[t]
        for e in range(bounds[t], bounds[t + 1]):
            row = rows[latents[e]]
            total = rows.dtype.type(0)
            for c in range(d):
                total += mine[c] * row[c]
            out[e] = total


@compiled
def group_loop(keys, firsts, order):
    """Counting sort: ``order`` lists the places of ``keys`` by key, ascending within each.

    ``firsts`` has two places more than there are keys to tell apart and comes in zeros; those of key ``i`` end up at
    ``firsts[i]`` to ``firsts[i + 1]`` of ``order``.
    """
    for key in keys:
        firsts[key + 2] += 1
    for i in range(2, len(firsts)):
        firsts[i] += firsts[i - 1]
    for e in range(len(keys)):
        place = firsts[keys[e] + 1]
        firsts[keys[e] + 1] = place + 1
        order[place] = e


@compiled
def _add_entries(i, firsts, tokens, values, rows, gradient):
    """Add latent ``i``'s tokens' rows, weighted, to ``gradient``."""
    d = rows.shape[1]
    for p in range(firsts[i], firsts[i + 1]):
        value, row = values[p], rows[tokens[p]]
        if value != 0:
            for c in range(d):
                gradient[c] += value * row[c]


@compiled
def spread_loop(first, last, firsts, tokens, values, rows, out):
    """``out[i]``: the sum of latent ``i``'s tokens' rows, weighted by its values, which stand in transposed order."""
    for i in range(first, last):
        out[i][:] = 0
        _add_entries(i, firsts, tokens, values, rows, out[i])


@compiled
def _gradient(i, weights, unit, firsts, tokens, values, rows, dense_of, dense, gradient):
    """Row ``i`` of a matrix's gradient: its entries, and row ``dense_of[i]`` of ``dense`` unless that is negative."""
    d = weights.shape[1]
    if dense_of[i] >= 0:
        gradient[:] = dense[dense_of[i]]
    else:
        gradient[:] = 0
    _add_entries(i, firsts, tokens, values, rows, gradient)
    if unit:
        row = weights[i]
        along = weights.dtype.type(0)
        for c in range(d):
            along += gradient[c] * row[c]
        for c in range(d):
            gradient[c] -= along * row[c]


@compiled
def squared_norms_loop(first, last, weights, unit, firsts, tokens, values, rows, dense_of, dense, out):
    """``out[i]``: squared length of row ``i`` of the gradient, without its part along the row where rows are ``unit``."""
    d = weights.shape[1]
    gradient = np.empty(d, weights.dtype)
    for i in range(first, last):
        _gradient(i, weights, unit, firsts, tokens, values, rows, dense_of, dense, gradient)
        total = weights.dtype.type(0)
        for c in range(d):
            total += gradient[c] * gradient[c]
        out[i] = total


@compiled
def adam_loop(first, last, weights, unit, firsts, tokens, values, rows, dense_of, dense, mean, square, settings):
    """Adam's step on every row, whose gradient exists only while the row is worked on; ``unit`` rows end at norm 1.

    ``settings``: the gradient's factor, 1 - beta1, beta2, 1 - beta2, the step length, what the root of ``square`` is
    multiplied by, epsilon.
    """
    d = weights.shape[1]
    gradient = np.empty(d, weights.dtype)
    factor, new, keep, fresh = settings[0], settings[1], settings[2], settings[3]
    length, root, eps = settings[4], settings[5], settings[6]
    for i in range(first, last):
        _gradient(i, weights, unit, firsts, tokens, values, rows, dense_of, dense, gradient)
        row, m, v = weights[i], mean[i], square[i]
        total = weights.dtype.type(0)
        for c in range(d):
            g = gradient[c] * factor
            m[c] += (g - m[c]) * new
            v[c] = v[c] * keep + g * g * fresh
            row[c] -= length * m[c] / (np.sqrt(v[c]) * root + eps)
            total += row[c] * row[c]
        if unit:
            # torch's own normalize divides by no less.
            norm = max(np.sqrt(total), weights.dtype.type(1e-12))
            for c in range(d):
                row[c] /= norm


@ranked
def _smallest(values):
    floor = values[0]
    for q in range(1, len(values)):
        floor = min(floor, values[q])
    return floor


@ranked
def _put(score, latent, filled, floor, values, latents):
    """Take in a score above ``floor``, the smallest of those kept, or minus infinity while places are free; the new floor."""
    k = len(values)
    # Within bounds even if the floor is none of the kept, as after a NaN.
    place = min(filled, k - 1)
    if filled == k:
        # The first of the smallest: a search without branches runs in vector registers.
        for q in range(k):
            place = min(place, q if values[q] == floor else k)
    values[place], latents[place] = score, latent
    return _smallest(values) if filled >= k - 1 else floor


@ranked
def _first_bound(row, best, bound, unused):
    """A number that at least ``len(bound)`` of a row's scores reach: the row is dealt out to lanes, whose maxima are scores."""
    lanes, k = len(best), len(bound)
    for j in range(lanes):
        best[j] = row[j]
    # Four rounds of the deal at once; what does not fill four is left out, which only makes the bound lower.
    for start in range(lanes, len(row) - 4 * lanes + 1, 4 * lanes):
        part = row[start : start + 4 * lanes]
        for j in range(lanes):
            one, two, three, four = part[j], part[j + lanes], part[j + 2 * lanes], part[j + 3 * lanes]
            one, three = one if one > two else two, three if three > four else four
            one, two = one if one > three else three, best[j]
            best[j] = one if one > two else two
    bound[:] = best[:k]
    level = _smallest(bound)
    for j in range(k, lanes):
        if best[j] > level:
            level = _put(best[j], 0, k, level, bound, unused)
    return level


@compiled
def _keep_row(row, offset, best, bound, unused, kept, names):
    """Bring the largest of ``row`` into ``kept``, and where they stand, counted from ``offset``, into ``names``.

    Places not taken yet hold minus infinity. A score equal to the smallest kept does not come in. A NaN in ``row`` makes all
    of ``kept`` NaN for good. ``best`` has no place, or at least as many as ``kept`` and at most as many as ``row``; it and
    the two of ``kept``'s size are for scratch.
    """
    k = len(kept)
    if np.isnan(kept[0]):
        return
    floor, filled = _smallest(kept), 0
    for q in range(k):
        filled += kept[q] > -np.inf
    if filled == 0 and len(best):
        level, tiny = _first_bound(row, best, bound, unused), np.finfo(row.dtype).tiny
        # Scores equal to the bound must still come in, and the number below it must not be flushed to zero.
        floor = np.nextafter(level if abs(level) > tiny else -tiny, floor)
    for start in range(0, len(row), BLOCK):
        part = row[start : start + BLOCK]
        exceed = 0
        # Of constant length, all but the last block are a few instructions.
        if len(part) == BLOCK:
            for j in range(BLOCK):
                # True of NaN as well.
                exceed += not part[j] <= floor
        if exceed or len(part) < BLOCK:
            for j in range(len(part)):
                if np.isnan(part[j]):
                    kept[:] = part[j]
                    return
                if part[j] > floor:
                    floor = max(floor, _put(part[j], offset + start + j, filled, floor, kept, names))
                    filled = min(filled + 1, k)


@compiled
def keep_largest_loop(first, last, scores, offset, lanes, values, latents):
    """Bring the largest scores of a tile whose first latent is ``offset`` into each token's ``values`` and ``latents``."""
    k = values.shape[1]
    best, bound, unused = np.empty(lanes, scores.dtype), np.empty(k, scores.dtype), np.empty(k, latents.dtype)
    for t in range(first, last):
        _keep_row(scores[t], offset, best, bound, unused, values[t], latents[t])


@compiled
def keep_largest_ragged_loop(first, last, scores, firsts, values, tokens):
    """The largest scores of every row ``i``, as many as ``firsts[i]`` and ``firsts[i + 1]`` leave room for."""
    width, most = scores.shape[1], 0
    for i in range(first, last):
        most = max(most, firsts[i + 1] - firsts[i])
    bound, unused, best = np.empty(most, scores.dtype), np.empty(most, tokens.dtype), np.empty(4 * most + 64, scores.dtype)
    for i in range(first, last):
        room = firsts[i + 1] - firsts[i]
        if room:
            lanes = 32
            while lanes < 2 * room:
                lanes *= 2
            if lanes > width:
                lanes = 0
            here = slice(firsts[i], firsts[i + 1])
            values[here] = -np.inf
            _keep_row(scores[i], 0, best[:lanes], bound[:room], unused[:room], values[here], tokens[here])


@compiled
def count_above_loop(first, last, scores, cut, counts):
    """``counts[t]``: how many of a token's scores exceed their latent's ``cut``."""
    width = scores.shape[1]
    for t in range(first, last):
        row, found = scores[t], 0
        for j in range(width):
            found += row[j] > cut[j]
        counts[t] = found


@compiled
def collect_above_loop(first, last, scores, cut, offset, ends, values, latents):
    """The scores that exceed their latent's ``cut``, and their latents from ``offset`` on; token ``t``'s end at ``ends[t]``."""
    width = scores.shape[1]
    for t in range(first, last):
        row, place = scores[t], ends[t - 1] if t else 0
        for start in range(0, width, BLOCK):
            part, limit = row[start : start + BLOCK], cut[start : start + BLOCK]
            exceed = 0
            if len(part) == BLOCK:
                for j in range(BLOCK):
                    exceed += part[j] > limit[j]
            if exceed or len(part) < BLOCK:
                for j in range(len(part)):
                    if part[j] > limit[j]:
                        values[place], latents[place] = part[j], offset + start + j
                        place += 1


@ranked
def _largest_size(row):
    largest = abs(row[0])
    for c in range(1, len(row)):
        largest = max(largest, abs(row[c]))
    return largest


@compiled
def quantize_loop(first, last, rows, levels, least, out, scale):
    """Rows in ``levels`` of their largest entry, which ``scale`` undoes; it is no less than ``least``, and NaN if one is."""
    d = rows.shape[1]
    for i in range(first, last):
        row, coarse, unknown = rows[i], out[i], 0
        for c in range(d):
            unknown += np.isnan(row[c])
        scale[i] = np.nan if unknown else max(_largest_size(row) / levels, least)
        inverse = 1 / scale[i]
        for c in range(d):
            coarse[c] = np.int8(np.rint(row[c] * inverse))


@compiled
def rescale_loop(first, last, product, scale, token_scale, shift, out):
    """A token's scores divided by its own scale, from an integer product of rounded rows."""
    for t in range(first, last):
        row, mine, inverse = product[t], out[t], 1 / token_scale[t]
        for j in range(len(row)):
            mine[j] = row[j] * scale[j] + shift[j] * inverse
