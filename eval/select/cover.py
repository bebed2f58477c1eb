"""Diverse choice: a greedy cover of the prototype's latents by documents that are similar to the examples.

After the greedy selection of Yang et al. 2025 (arXiv:2502.14050): the next document is the one that adds most of what no
chosen document has. Ours are the amounts, the smaller of document and prototype latent by latent (the numerator of the
similarity), and the new beginning once nothing is added.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from .pooled import SparseRows


def greedy_cover(rows: SparseRows, count: int) -> Int[np.ndarray, " chosen"]:
    """Return ``count`` rows, each of which raises the sum over entries of the largest value so far most; ties by order.

    Where no row adds anything, the cover begins anew with the rows that are left.

    >>> from scipy import sparse
    >>> rows = sparse.csr_array(np.array([[3.0, 1, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [2, 1, 1, 0]]))
    >>> greedy_cover(rows, 3).tolist()
    [0, 2, 3]
    """
    chosen: list[int] = []
    left = set(range(rows.shape[0]))
    parts = [slice(rows.indptr[row], rows.indptr[row + 1]) for row in range(rows.shape[0])]
    entries, values = [rows.indices[part] for part in parts], [rows.data[part] for part in parts]
    while left and len(chosen) < count:
        covered = np.zeros(rows.shape[1])
        # Gains only fall, so the top of the heap is the best row if its gain is still what the heap says (lazy greedy).
        heap = [(-float(values[row].sum()), row) for row in sorted(left)]
        heapq.heapify(heap)
        before = len(chosen)
        while heap and len(chosen) < count:
            gain, row = heapq.heappop(heap)
            now = float(np.maximum(values[row] - covered[entries[row]], 0).sum())
            if now <= 0:
                continue
            if now < -gain:
                heapq.heappush(heap, (-now, row))
                continue
            chosen.append(row)
            left.discard(row)
            covered[entries[row]] = np.maximum(covered[entries[row]], values[row])
        if len(chosen) == before:
            # Rows without any entry, in their order.
            chosen += sorted(left)[: count - len(chosen)]
    return np.array(chosen[:count], np.int64)


def coverage(rows: SparseRows, whole: Float[np.ndarray, " entries"], chosen: Sequence[int] | np.ndarray) -> float:
    """Return the share of the whole that the largest values of the chosen rows have."""
    largest = rows[np.asarray(chosen)].max(0).toarray().ravel()
    return float(largest.sum() / max(whole.sum(), 1e-30))
