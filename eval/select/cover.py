"""Diverse choice: a greedy cover of the prototype's latents by documents that are similar to the examples.

After the greedy selection of Yang et al. 2025 (arXiv:2502.14050): the next document is the one that adds most latents that no
chosen document has. Ours are the weights, a latent's share of the prototype, and the new beginning once nothing is added.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from .pooled import SparseRows


def greedy_cover(rows: SparseRows, weights: Float[np.ndarray, " entries"], count: int) -> Int[np.ndarray, " chosen"]:
    """Return ``count`` rows, each of which adds the largest weight of entries that the rows before it lack; ties by order.

    Where no row adds anything, the cover begins anew with the rows that are left.

    >>> from scipy import sparse
    >>> rows = sparse.csr_array(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0.0]]))
    >>> greedy_cover(rows, np.array([3.0, 2, 1, 1]), 3).tolist()
    [3, 0, 2]
    """
    chosen: list[int] = []
    left = set(range(rows.shape[0]))
    entries = [rows.indices[rows.indptr[row] : rows.indptr[row + 1]] for row in range(rows.shape[0])]
    while left and len(chosen) < count:
        open_weights = weights.astype(np.float64).copy()
        # Gains only fall, so the top of the heap is the best row if its gain is still what the heap says (lazy greedy).
        heap = [(-float(open_weights[entries[row]].sum()), row) for row in sorted(left)]
        heapq.heapify(heap)
        before = len(chosen)
        while heap and len(chosen) < count:
            gain, row = heapq.heappop(heap)
            now = float(open_weights[entries[row]].sum())
            if now <= 0:
                continue
            if now < -gain:
                heapq.heappush(heap, (-now, row))
                continue
            chosen.append(row)
            left.discard(row)
            open_weights[entries[row]] = 0
        if len(chosen) == before:
            # Rows without an entry of any weight, in their order.
            chosen += sorted(left)[: count - len(chosen)]
    return np.array(chosen[:count], np.int64)


def coverage(rows: SparseRows, weights: Float[np.ndarray, " entries"], chosen: Sequence[int] | np.ndarray) -> float:
    """Return the share of the weights whose entry is in a chosen row."""
    there = np.zeros(rows.shape[1], bool)
    there[rows[np.asarray(chosen)].indices] = True
    return float(weights[there].sum() / max(weights.sum(), 1e-30))
