"""Keyed permutation of a stream's row numbers."""

import numpy as np

from .compiling import njit


@njit(nogil=True)
def feistel(index, n, half, keys, out):
    """Write to ``out`` the permuted position of each ``index`` below ``n``, in uint64. Same results as the plain version."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    for i in range(index.size):
        value = index[i]
        while True:
            left, right = value >> half, value & mask
            for round_key in keys:
                z = right ^ round_key
                z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
            value = left << half | right
            if value < n:
                break
        out[i] = value
