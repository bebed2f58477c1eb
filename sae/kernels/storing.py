"""Per-number operations of a harvest, each in one pass without Python's lock."""

import numpy as np

from .compiling import njit


@njit(nogil=True)
def moments(rows, mean, deviation):
    """Compute every column's mean, not finite if one of its numbers is not, and summed squared deviation, in float64."""
    mean[:] = 0.0
    deviation[:] = 0.0
    for i in range(rows.shape[0]):
        row = rows[i]
        for k in range(row.size):
            mean[k] += row[k]
    for k in range(mean.size):
        mean[k] /= rows.shape[0]
    for i in range(rows.shape[0]):
        row = rows[i]
        for k in range(row.size):
            distance = row[k] - mean[k]
            deviation[k] += distance * distance


@njit(nogil=True)
def squared_difference(left, right):
    """Return the sum of all squared differences, in float64."""
    # One sum per column, so that neighboring sums are vectorized.
    sums = np.zeros(left.shape[1])
    for i in range(left.shape[0]):
        row, other = left[i], right[i]
        for k in range(row.size):
            difference = np.float64(row[k]) - np.float64(other[k])
            sums[k] += difference * difference
    return sums.sum()


@njit(nogil=True)
def largest_of_blocks(rows, block, out):
    """Write the largest absolute value of each run of ``block`` columns to ``out`` ``(n, blocks)``."""
    for i in range(rows.shape[0]):
        for b in range(out.shape[1]):
            part = rows[i, b * block : min((b + 1) * block, rows.shape[1])]
            largest = np.float32(0.0)
            for k in range(part.size):
                largest = max(largest, abs(part[k]))
            out[i, b] = largest


@njit(nogil=True)
def to_int8(rows, scales, block, codes, restored):
    """Quantize ``rows`` by block scale to ``codes``, rounding halves to even; ``restored`` gets the dequantized float32."""
    for i in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            scale, here = scales[i, b], slice(b * block, min((b + 1) * block, rows.shape[1]))
            part, to, back = rows[i, here], codes[i, here], restored[i, here]
            for k in range(part.size):
                code = min(max(np.rint(part[k] / scale), np.float32(-127.0)), np.float32(127.0))
                to[k] = np.int8(code)
                back[k] = code * scale


@njit(nogil=True)
def to_bfloat16(bits, out, restored):
    """Round finite float32 ``bits`` to bfloat16 bits ``out``, halves to even, and back to float32 bits in ``restored``."""
    for i in range(bits.shape[0]):
        row, to, back = bits[i], out[i], restored[i]
        for k in range(row.size):
            odd = (row[k] >> np.uint32(16)) & np.uint32(1)
            upper = (row[k] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            to[k] = np.uint16(upper)
            back[k] = upper << np.uint32(16)
