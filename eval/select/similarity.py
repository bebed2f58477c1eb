"""Similarity of pooled documents to examples: by latents, neurons, dimensions, the activation, and words.

Latents, neurons and dimensions are compared by generalised Jaccard, ``sum_i min(u_i, p_i) / sum_i max(u_i, p_i)``, of a
document's row u and the prototype p, the mean of the examples' rows. The other baselines are the usual ones: cosine of the mean
activation, less the pool's mean; cosine of TF-IDF vectors (scikit-learn's smooth idf); and BM25 (Robertson and Zaragoza 2009,
k1 = 1.5, b = 0.75) with the examples as the query.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import sparse

from .pooled import WORDS, PooledDocuments, SparseRows

JACCARD = ("latents", "neurons", "dimensions")
METHODS = (*JACCARD, "activation", "tfidf", "bm25")
K1, B = 1.5, 0.75

Similarity = Callable[[PooledDocuments], Float[np.ndarray, " documents"]]


@dataclass(frozen=True)
class PoolStatistics:
    """Means and counts over a pool that baselines need."""

    documents: int
    activation: np.ndarray  # (d_in,)
    document_counts: np.ndarray  # (words,), documents with the word
    words: float  # mean words of a document

    @classmethod
    def of(cls, pool: Iterable[PooledDocuments]) -> "PoolStatistics":
        """Read a pool once."""
        count, words = 0, 0.0
        activation, documents = np.zeros(1), np.zeros(1)
        for part in pool:
            rows = part.units[WORDS]
            count, words = count + len(part), words + float(rows.sum())
            activation = activation + part.activation.sum(0, dtype=np.float64)
            documents = documents + np.bincount(rows.indices, minlength=rows.shape[1])
        return cls(count, activation / count, documents, words / count)


def generalised_jaccard(rows: SparseRows, prototype: Float[np.ndarray, " entries"]) -> Float[np.ndarray, " documents"]:
    """Return the generalised Jaccard similarity of non-negative rows and a prototype: 1 if they are equal, 0 if disjoint.

    >>> generalised_jaccard(sparse.csr_array(np.array([[2.0, 0, 1], [2, 1, 0], [0, 0, 0]])), np.array([2.0, 1, 0])).tolist()
    [0.5, 1.0, 0.0]
    """
    least = contributions_to_minimum(rows, prototype)
    low = row_sums(least)
    # min + max = u + p for every entry.
    return low / np.maximum(row_sums(rows) + prototype.sum() - low, 1e-30)


def contributions_to_minimum(rows: SparseRows, prototype: Float[np.ndarray, " entries"]) -> SparseRows:
    """Return ``min(u_i, p_i)`` of every entry: what a unit adds to the numerator of the similarity."""
    return sparse.csr_array((np.minimum(rows.data, prototype[rows.indices]), rows.indices, rows.indptr), shape=rows.shape)


def contributions(rows: SparseRows, prototype: Float[np.ndarray, " entries"]) -> SparseRows:
    """Return each unit's part of a document's similarity; the parts of a document add up to it."""
    least = contributions_to_minimum(rows, prototype)
    low = row_sums(least)
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(row_sums(rows) + prototype.sum() - low, 1e-30)) @ least)


def row_sums(rows: SparseRows) -> Float[np.ndarray, " documents"]:
    return np.asarray(rows.sum(1), np.float64).ravel()


def mean_row(rows: SparseRows) -> Float[np.ndarray, " entries"]:
    """Return the mean of rows as a dense array."""
    return np.asarray(rows.mean(0), np.float64).ravel()


def similarities(examples: PooledDocuments, pool: PoolStatistics) -> dict[str, Similarity]:
    """Return the functions that score documents against the examples, by the names of ``METHODS``."""
    found: dict[str, Similarity] = {}
    for name in JACCARD:
        if name in examples.units:
            found[name] = _by_units(name, mean_row(examples.units[name]))
    return found | {
        "activation": _by_activation(examples, pool),
        "tfidf": _by_tfidf(examples, pool),
        "bm25": _bm25(examples, pool),
    }


def _by_units(name: str, prototype: np.ndarray) -> Similarity:
    return lambda some: generalised_jaccard(some.units[name], prototype)


def _by_activation(examples: PooledDocuments, pool: PoolStatistics) -> Similarity:
    prototype = _unit(_unit(examples.activation - pool.activation).mean(0))
    return lambda some: _unit(some.activation - pool.activation) @ prototype


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def _by_tfidf(examples: PooledDocuments, pool: PoolStatistics) -> Similarity:
    idf = np.log((1 + pool.documents) / (1 + pool.document_counts)) + 1

    def vectors(some: PooledDocuments) -> SparseRows:
        rows = some.units[WORDS]
        weighted = sparse.csr_array((rows.data * idf[rows.indices], rows.indices, rows.indptr), shape=rows.shape)
        norms = np.sqrt(row_sums(weighted.multiply(weighted).tocsr()))
        return sparse.csr_array(sparse.diags_array(1 / np.maximum(norms, 1e-30)) @ weighted)

    prototype = _unit(mean_row(vectors(examples)))
    return lambda some: vectors(some) @ prototype


def _bm25(examples: PooledDocuments, pool: PoolStatistics) -> Similarity:
    # Never negative, as in Lucene: a word of most documents counts for little, not against them.
    idf = np.log(1 + (pool.documents - pool.document_counts + 0.5) / (pool.document_counts + 0.5))
    query = mean_row(examples.units[WORDS]) * idf

    def score(some: PooledDocuments) -> np.ndarray:
        rows = some.units[WORDS]
        length = K1 * (1 - B + B * row_sums(rows) / max(pool.words, 1e-30))
        # Once for every entry.
        own = np.repeat(length, np.diff(rows.indptr))
        saturated = rows.data * (K1 + 1) / (rows.data + own)
        return sparse.csr_array((saturated, rows.indices, rows.indptr), shape=rows.shape) @ query

    return score
