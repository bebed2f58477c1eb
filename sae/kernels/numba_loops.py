"""Kernels for the CPU, compiled by numba at first use and cached on disk. Arrays in, arrays changed in place.

Every kernel works on rows ``first`` to ``last`` of its output and writes to no others; ``over_rows`` distributes them. Arrays
are copied number by number: for ``a[:] = b`` numba compiles the text of an error about shapes as well, which takes seconds.
"""

import numpy as np

from .compiling import njit

# Sums may be reordered, which allows vector registers; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
# Scores compared at once: few enough that one above the smallest kept is soon found.
BLOCK = 128
# Halvings of a range of scores in the search for a level: most searches take five to eight.
BISECTIONS = 20
# Latents whose rows tokens read in turn: a few megabytes, which a last-level cache holds.
SLAB = 1024


compiled = njit(nogil=True, fastmath=FAST, error_model="numpy")
# Minima are vectorized on the assumption that no number is NaN; with a NaN the result is meaningless. If that matters, or a
# write position depends on a comparison, use ``compiled``.
ranked = njit(nogil=True, fastmath=FAST | {"nnan"}, error_model="numpy")


@compiled
def _add_weighted(first, last, places, values, rows, total):
    """Add to ``total`` the rows at ``places[first]`` to ``places[last - 1]``, weighted; rows of zero values are not read.

    Four rows per pass over ``total``, which is otherwise read and written as often as rows are read, and several rows are on
    their way from memory at once. The order of the sum is that of the entries.
    """
    d, e = len(total), first
    while e < last:
        one = two = three = four = count = 0
        while e < last and count < 4:
            if values[e] != 0:
                if count == 0:
                    one = e
                elif count == 1:
                    two = e
                elif count == 2:
                    three = e
                else:
                    four = e
                count += 1
            e += 1
        if count == 4:
            v0, v1, v2, v3 = values[one], values[two], values[three], values[four]
            r0, r1, r2, r3 = rows[places[one]], rows[places[two]], rows[places[three]], rows[places[four]]
            for c in range(d):
                total[c] = total[c] + v0 * r0[c] + v1 * r1[c] + v2 * r2[c] + v3 * r3[c]
            continue
        for q in range(count):
            at = one if q == 0 else two if q == 1 else three
            value, row = values[at], rows[places[at]]
            for c in range(d):
                total[c] += value * row[c]


@compiled
def decode_loop(first, last, bounds, latents, values, atoms, out):
    """Compute ``out[t]``: the sum of token ``t``'s decoder directions, weighted by its values.

    Tokens share the directions of some latents while these are in cache, if latents ascend within a token.
    """
    place = bounds[first:last].copy()
    for t in range(first, last):
        out[t][:] = 0
    for limit in range(SLAB, len(atoms) + SLAB, SLAB):
        for t in range(first, last):
            start = place[t - first]
            e = start
            while e < bounds[t + 1] and latents[e] < limit:
                e += 1
            _add_weighted(start, e, latents, values, atoms, out[t])
            place[t - first] = e


@compiled
def dots_loop(first, last, bounds, latents, left, rows, out):
    """Compute ``out[e]``: the dot product of an entry's token row of ``left`` and its latent's row; for order see decode."""
    d, zero = rows.shape[1], rows.dtype.type(0)
    place = bounds[first:last].copy()
    for limit in range(SLAB, len(rows) + SLAB, SLAB):
        for t in range(first, last):
            mine, e = left[t], place[t - first]
            end = e
            while end < bounds[t + 1] and latents[end] < limit:
                end += 1
            place[t - first] = end
            while e + 4 <= end:
                r0, r1, r2, r3 = rows[latents[e]], rows[latents[e + 1]], rows[latents[e + 2]], rows[latents[e + 3]]
                t0, t1, t2, t3 = zero, zero, zero, zero
                for c in range(d):
                    number = mine[c]
                    t0 += number * r0[c]
                    t1 += number * r1[c]
                    t2 += number * r2[c]
                    t3 += number * r3[c]
                out[e], out[e + 1], out[e + 2], out[e + 3] = t0, t1, t2, t3
                e += 4
            for q in range(e, end):
                row, total = rows[latents[q]], zero
                for c in range(d):
                    total += mine[c] * row[c]
                out[q] = total


@compiled
def group_loop(keys, firsts, order):
    """Run a counting sort: ``order`` lists the positions in ``keys`` by key, ascending within each.

    ``firsts`` must be zeros and two longer than the number of distinct keys; positions of key ``i`` end up at ``firsts[i]`` to
    ``firsts[i + 1]`` of ``order``.
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
def spread_loop(first, last, firsts, tokens, values, rows, out):
    """Compute ``out[i]``: the sum of latent ``i``'s tokens' rows, weighted by its values in grouped order."""
    for i in range(first, last):
        out[i][:] = 0
        _add_weighted(firsts[i], firsts[i + 1], tokens, values, rows, out[i])


@compiled
def _gradient(i, weights, unit, firsts, tokens, values, rows, dense_of, dense, gradient):
    """Compute row ``i`` of a matrix's gradient: its entries, plus row ``dense_of[i]`` of ``dense`` unless negative."""
    d = weights.shape[1]
    if dense_of[i] >= 0:
        row = dense[dense_of[i]]
        for c in range(d):
            gradient[c] = row[c]
    else:
        gradient[:] = 0
    _add_weighted(firsts[i], firsts[i + 1], tokens, values, rows, gradient)
    if unit:
        row = weights[i]
        along = weights.dtype.type(0)
        for c in range(d):
            along += gradient[c] * row[c]
        for c in range(d):
            gradient[c] -= along * row[c]


@compiled
def squared_norms_loop(first, last, weights, unit, firsts, tokens, values, rows, dense_of, dense, out):
    """Compute ``out[i]``: squared norm of row ``i`` of the gradient, without its part along the row if rows are ``unit``."""
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
    """Apply an Adam step to every row, whose gradient exists only during its update; ``unit`` rows end at norm 1.

    ``settings``: gradient factor, 1 - beta1, beta2, 1 - beta2, step length, multiplier of the root of ``square``, epsilon.
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
            # Lower bound as in ``torch.nn.functional.normalize``.
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
def _largest(values):
    top = values[0]
    for q in range(1, len(values)):
        top = max(top, values[q])
    return top


@compiled
def _level(values, k, spare):
    """Return a level that at least ``k`` values reach, found by bisection: at most ``spare`` more do, unless they are close."""
    zero, one, half = values.dtype.type(0), values.dtype.type(1), values.dtype.type(0.5)
    low, high, reached = _smallest(values), _largest(values), len(values)
    for _ in range(BISECTIONS):
        if reached <= k + spare:
            break
        middle, count = low * half + high * half, zero
        for q in range(len(values)):
            # In the values' precision, in which as many fit a register.
            count += one if values[q] >= middle else zero
        if count >= k:
            low, reached = middle, int(count)
        else:
            high = middle
    return low


@compiled
def _last_name(pool, names, size, score, n):
    """Return the ``n``-th lowest of the distinct names that stand with ``score``, found by bisection."""
    low, high = -1, names[:size].max()
    while high - low > 1:
        middle, count = (low + high) // 2, 0
        for q in range(size):
            count += pool[q] == score and names[q] <= middle
        if count >= n:
            high = middle
        else:
            low = middle
    return high


@compiled
def _prune(pool, names, size, k):
    """Move the ``k`` largest of the first ``size`` scores to the front of ``pool``; of equal ones those with lower names."""
    level, left = _level(pool[:size], k, 0), 0
    for q in range(size):
        score, name = pool[q], names[q]
        pool[left], names[left] = score, name
        left += score >= level
    # Equal scores, and those too close for the bisection.
    while left > k:
        least, equal, place = _smallest(pool[:left]), 0, 0
        for q in range(left):
            equal += pool[q] == least
        stay = equal - (left - k)
        last = _last_name(pool, names, left, least, stay) if stay > 0 else -1
        for q in range(left):
            score, name = pool[q], names[q]
            pool[place], names[place] = score, name
            place += score != least or name <= last
        if place == left:
            # A NaN: its row is not used.
            return
        left = place


@compiled
def _lanes(width, k):
    """Return the number of lanes in which a row's maxima bound its ``k`` largest scores, or 0 if the row is too short.

    Finding the bound reads all lanes, finding the scores ``k`` of them: their lengths times ``k`` balance their number.
    """
    lanes = 32
    while 8 * lanes <= width and lanes * lanes < k * width:
        lanes *= 2
    return lanes if k <= lanes and 4 * lanes <= width else 0


@compiled
def _maxima(row, wide, best):
    """Compute the maxima of the lanes that share the first ``wide`` scores; return a sum that is NaN if one of these is NaN."""
    lanes, total = len(best), row.dtype.type(0)
    for j in range(lanes):
        best[j] = row[j]
    # Four rounds over the lanes at once.
    for start in range(0, wide, 4 * lanes):
        part = row[start : start + 4 * lanes]
        for j in range(lanes):
            one, two, three, four = part[j], part[j + lanes], part[j + 2 * lanes], part[j + 3 * lanes]
            total += one + two + three + four
            one, three = one if one > two else two, three if three > four else four
            one, two = one if one > three else three, best[j]
            best[j] = one if one > two else two
    return total


@compiled
def _from_lanes(row, wide, offset, floor, best, hits, pool, names, size):
    """Append to ``pool`` the scores above ``floor`` among the first ``wide``; return its size, or -1 if it is too small.

    Only lanes whose maximum is above ``floor`` are read. Every score is written, and the next one over it if it is not above.
    """
    lanes, found = len(best), 0
    for j in range(lanes):
        hits[found] = j
        found += best[j] > floor
    for h in range(found):
        if size + wide // lanes > len(pool):
            return -1
        for c in range(hits[h], wide, lanes):
            pool[size], names[size] = row[c], offset + c
            size += row[c] > floor
    return size


@compiled
def _in_order(row, first, offset, floor, k, pool, names, size):
    """Append to ``pool`` the scores above ``floor`` from the ``first`` on, and prune it when it is full; return its size."""
    for start in range(first, len(row), BLOCK):
        part, exceed = row[start : start + BLOCK], 0
        # With constant length, all blocks but the last take few instructions.
        if len(part) == BLOCK:
            for j in range(BLOCK):
                exceed += part[j] > floor
        if exceed or len(part) < BLOCK:
            if size + len(part) > len(pool):
                _prune(pool, names, size, k)
                size, floor = k, max(floor, _smallest(pool[:k]))
            for j in range(len(part)):
                pool[size], names[size] = part[j], offset + start + j
                size += part[j] > floor
    return size


@compiled
def _keep_row(row, offset, best, hits, pool, names, kept, latents):
    """Merge the largest scores of ``row`` into ``kept``, and their positions plus ``offset`` into ``latents``.

    Free places hold -inf. A score equal to the smallest kept is not inserted. A NaN in ``row`` makes ``kept`` NaN for good. The
    other arrays are scratch: ``best`` and ``hits`` are as long as there are lanes, ``pool`` and ``names`` have two blocks
    more than twice the length of ``kept``.
    """
    k, size, free = len(kept), 0, row.dtype.type(-np.inf)
    if np.isnan(kept[0]):
        return
    for q in range(k):
        pool[size], names[size] = kept[q], latents[q]
        size += kept[q] > free
    before, floor = size, _smallest(pool[:k]) if size == k else free
    wide = len(row) - len(row) % (4 * len(best)) if len(best) else 0
    total, place = row.dtype.type(0), wide
    if wide:
        total = _maxima(row, wide, best)
        if size < k:
            level, tiny = _level(best, k, k // 8), np.finfo(row.dtype).tiny
            # Scores equal to the level must still be inserted, and the number below it must not be flushed to zero.
            floor = np.nextafter(level if abs(level) > tiny else -tiny, floor)
        size = _from_lanes(row, wide, offset, floor, best, hits, pool, names, size)
        if size < 0:
            # Too many scores are equal or close to the level; the pool still begins with what was kept.
            size, place = before, 0
    size = _in_order(row, place, offset, floor, k, pool, names, size)
    for c in range(wide, len(row)):
        total += row[c]
    # Infinities of both signs also make the sum NaN.
    if np.isnan(total):
        for c in range(len(row)):
            if np.isnan(row[c]):
                kept[:] = row[c]
                return
    if size > k:
        _prune(pool, names, size, k)
    for q in range(min(size, k)):
        kept[q], latents[q] = pool[q], names[q]


@compiled
def keep_largest_loop(first, last, scores, offset, values, latents):
    """Merge the largest scores of a tile, whose first latent is ``offset``, into each token's ``values`` and ``latents``."""
    width, k = scores.shape[1], values.shape[1]
    lanes, room = _lanes(width, k), 2 * (k + BLOCK)
    best, hits = np.empty(lanes, scores.dtype), np.empty(lanes + 1, latents.dtype)
    pool, names = np.empty(room, scores.dtype), np.empty(room, latents.dtype)
    for t in range(first, last):
        _keep_row(scores[t], offset, best, hits, pool, names, values[t], latents[t])


@compiled
def keep_largest_ragged_loop(first, last, scores, firsts, values, tokens):
    """Compute the largest scores of every row ``i``, ``firsts[i + 1] - firsts[i]`` of them."""
    width, most = scores.shape[1], 0
    for i in range(first, last):
        most = max(most, firsts[i + 1] - firsts[i])
    best, hits = np.empty(width, scores.dtype), np.empty(width + 1, tokens.dtype)
    pool, names = np.empty(2 * (most + BLOCK), scores.dtype), np.empty(2 * (most + BLOCK), tokens.dtype)
    for i in range(first, last):
        k = firsts[i + 1] - firsts[i]
        if k:
            here, lanes = slice(firsts[i], firsts[i + 1]), _lanes(width, k)
            values[here] = -np.inf
            _keep_row(scores[i], 0, best[:lanes], hits, pool, names, values[here], tokens[here])


@compiled
def count_above_loop(first, last, scores, cut, counts):
    """Compute ``counts[t]``: the number of a token's scores above their latent's ``cut``."""
    width = scores.shape[1]
    for t in range(first, last):
        row, found = scores[t], 0
        for j in range(width):
            found += row[j] > cut[j]
        counts[t] = found


@compiled
def collect_above_loop(first, last, scores, cut, offset, ends, values, latents):
    """Collect the scores above their latent's ``cut``, and latents plus ``offset``; those of token ``t`` end at ``ends[t]``."""
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
    """Quantize rows to ``levels`` of their largest entry; ``scale`` undoes it: at least ``least``, NaN for a row with NaN."""
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
    """Compute scores from an integer product of quantized rows, divided by each token's scale."""
    for t in range(first, last):
        row, mine, inverse = product[t], out[t], 1 / token_scale[t]
        for j in range(len(row)):
            mine[j] = row[j] * scale[j] + shift[j] * inverse
