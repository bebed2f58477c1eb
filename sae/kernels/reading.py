"""Reading and decoding of scattered rows of a file, in one pass without Python's lock.

Every function reads rows ``rows`` (ascending) of ``size`` bytes each, the first at byte ``start`` of the file, writes row
``rows[i]`` to row ``places[i]`` of ``out``, and returns the number of rows read and True if all were finite. It stops at the
first short read. Nearby rows go through ``scratch`` in one read: a system call costs as much as copying a few kilobytes.
"""

import numpy as np
from numba import types

from .compiling import njit

# Maximum gap in bytes that is read rather than skipped by another call: 2 KB take about as long.
GAP = 2048
SCRATCH_BYTES = 1 << 16
# All exponent bits: an infinity or NaN in float32.
NOT_FINITE = np.uint32(0x7F800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)

# The C library's function, looked up by name when compiled code is loaded, so that cached code stays valid.
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@njit(nogil=True)
def _run(rows, first, size, room):
    """Return one past the last row that is read together with row number ``first``."""
    last = first
    while (
        last + 1 < rows.size
        and (rows[last + 1] - rows[last] - 1) * size <= GAP
        and (rows[last + 1] - rows[first] + 1) * size <= room
    ):
        last += 1
    return last + 1


@njit(nogil=True)
def _read(descriptor, start, size, rows, first, end, memory):
    """Read rows number ``first`` to ``end`` with the gaps between them; return True if the read was complete."""
    wanted = (rows[end - 1] - rows[first] + 1) * size
    return _pread(descriptor, memory, wanted, start + rows[first] * size) == wanted


@njit(nogil=True)
def read_bytes(descriptor, start, size, rows, places, out, scratch):
    """Read labels: ``out`` is ``(n, size)`` uint8."""
    first = 0
    while first < rows.size:
        end = _run(rows, first, size, scratch.size)
        if not _read(descriptor, start, size, rows, first, end, scratch.ctypes.data):
            return first, True
        for i in range(first, end):
            begin = (rows[i] - rows[first]) * size
            for k in range(size):
                out[places[i], k] = scratch[begin + k]
        first = end
    return first, True


@njit(nogil=True)
def read_float32(descriptor, start, size, rows, places, out, scratch):
    """Read float32 rows: ``out`` is ``(n, width)`` float32, viewed as uint32."""
    first, width, finite = 0, out.shape[1], True
    words = scratch.view(np.uint32)
    while first < rows.size:
        end = _run(rows, first, size, scratch.size)
        # A single row is read directly into its place.
        memory = scratch.ctypes.data if end > first + 1 else out.ctypes.data + places[first] * size
        if not _read(descriptor, start, size, rows, first, end, memory):
            return first, finite
        for i in range(first, end):
            row = out[places[i]]
            if end > first + 1:
                begin = (rows[i] - rows[first]) * width
                for k in range(width):
                    row[k] = words[begin + k]
            largest = np.uint32(0)
            for k in range(width):
                largest = max(largest, row[k] & MAGNITUDE)
            finite &= largest < NOT_FINITE
        first = end
    return first, finite


@njit(nogil=True)
def read_bfloat16(descriptor, start, size, rows, places, out, scratch):
    """Read bfloat16 rows: ``out`` is ``(n, width)`` float32, viewed as uint32; a bfloat16 is the upper half of a float32."""
    first, width, finite = 0, out.shape[1], True
    words = scratch.view(np.uint16)
    while first < rows.size:
        end = _run(rows, first, size, scratch.size)
        if not _read(descriptor, start, size, rows, first, end, scratch.ctypes.data):
            return first, finite
        for i in range(first, end):
            row, begin = out[places[i]], (rows[i] - rows[first]) * width
            largest = np.uint32(0)
            for k in range(width):
                value = np.uint32(words[begin + k]) << np.uint32(16)
                row[k] = value
                largest = max(largest, value & MAGNITUDE)
            finite &= largest < NOT_FINITE
        first = end
    return first, finite


@njit(nogil=True)
def read_float16(descriptor, start, size, rows, places, out, scratch, table):
    """Read float16 rows: ``out`` is ``(n, width)`` float32; ``table`` maps every float16 bit pattern to its float32."""
    first, width, finite = 0, out.shape[1], True
    words = scratch.view(np.uint16)
    while first < rows.size:
        end = _run(rows, first, size, scratch.size)
        if not _read(descriptor, start, size, rows, first, end, scratch.ctypes.data):
            return first, finite
        for i in range(first, end):
            row, begin = out[places[i]], (rows[i] - rows[first]) * width
            for k in range(width):
                value = words[begin + k]
                row[k] = table[value]
                finite &= (value & np.uint16(0x7C00)) != np.uint16(0x7C00)
        first = end
    return first, finite


@njit(nogil=True)
def read_int8(descriptor, start, size, rows, places, out, scratch, scales, block):
    """Read int8 rows: ``out`` is ``(n, width)`` float32, codes times ``scales`` ``(n, blocks)`` in the order of ``out``."""
    first = 0
    codes = scratch.view(np.int8)
    while first < rows.size:
        end = _run(rows, first, size, scratch.size)
        if not _read(descriptor, start, size, rows, first, end, scratch.ctypes.data):
            return first, True
        for i in range(first, end):
            begin = (rows[i] - rows[first]) * size
            for b in range(scales.shape[1]):
                scale, done = scales[places[i], b], b * block
                to = out[places[i], done : min(done + block, size)]
                codes_here = codes[begin + done : begin + done + to.size]
                for k in range(to.size):
                    to[k] = np.float32(codes_here[k]) * scale
        first = end
    return first, True
