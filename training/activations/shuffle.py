"""Shuffle that is computed, not stored: position ``i`` of a pass reads row ``permute(i)``, a keyed bijection.

Shuffling a whole store thus takes memory for a few batches only.
"""

import numpy as np

from ...sae.kernels.parallel import has_numba


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Map indices by a pseudorandom permutation of ``range(n)``, selected by ``key``.

    Feistel network over the next even number of bits, with cycle walking until the result is below ``n`` (Black and Rogaway
    2002).
    """
    half = max(2, (n - 1).bit_length() + 1) // 2
    keys = np.array([_mix(key * 8 + r & 0xFFFFFFFFFFFFFFFF) for r in range(6)], np.uint64)
    index = index.astype(np.uint64)
    if not has_numba():
        return _permute_plain(index, n, half, keys).astype(np.int64)
    # Imported on first use: the compiler takes a second.
    from ...sae.kernels.permuting import feistel

    out = np.empty_like(index)
    feistel(index, np.uint64(n), np.uint64(half), keys, out)
    return out.view(np.int64)


def _permute_plain(index: np.ndarray, n: int, half: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)

    def scramble(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & mask
        for round_key in keys:
            left, right = right, left ^ (_mix_array(right ^ round_key) & mask)
        return left << np.uint64(half) | right

    out = scramble(index)
    while (outside := out >= n).any():
        out[outside] = scramble(out[outside])
    return out


def _mix(z: int) -> int:
    """Finalizer of splitmix64."""
    z = (z + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def _mix_array(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
