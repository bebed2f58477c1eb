"""Relations between latents: co-firing, correlated activations, and similar decoder directions.

Co-firing is counted on the token sample, for all pairs of a block of latents at a time.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from .collect import TokenSample

# A csc_array; scipy's type annotations are incomplete.
Matrix = Any
# Entries per block of the all-pairs matrix.
BLOCK_ENTRIES = 4_000_000
# Fewer common tokens are ignored: pairs that fire together once would dominate the lift.
MIN_TOGETHER = 5


class Neighbours(NamedTuple):
    """Neighbors of each latent, nearest first, padded with -1."""

    latents: np.ndarray
    values: np.ndarray


class Together(NamedTuple):
    """Co-firing neighbors by three measures, with lift and count of the neighbors by Jaccard index.

    For two latents that fire on ``a`` and ``b`` of ``n`` tokens, and on ``ab`` of them together, the Jaccard index is
    ``ab / (a + b - ab)`` and the lift ``ab n / (a b)``. The correlation is Pearson's over all tokens, zeros included.
    """

    jaccard: Neighbours
    lift_of_jaccard: np.ndarray
    count_of_jaccard: np.ndarray
    lift: Neighbours
    correlation: Neighbours


def as_matrix(sample: TokenSample, n_latents: int) -> Matrix:
    """Return the sample's codes as a sparse ``(tokens, n_latents)`` matrix."""
    rows = csr_array((sample.values, sample.latents, sample.starts), shape=(len(sample.tokens), n_latents))
    return csc_array(rows)


def together(codes: Matrix, count: int = 5) -> Together:
    """Return the ``count`` nearest latents of each by every co-firing measure."""
    tokens, n = codes.shape
    fires: Any = codes.astype(bool).astype(np.float64)
    firings = np.asarray(fires.sum(0)).ravel()
    values: Any = codes.astype(np.float64)
    means = np.asarray(values.mean(0)).ravel()
    deviations = np.sqrt(np.maximum(np.asarray(values.power(2).mean(0)).ravel() - means**2, 0.0))
    parts: list[tuple[np.ndarray, ...]] = []
    step = max(1, BLOCK_ENTRIES // n)
    for begin in range(0, n, step):
        block = np.arange(begin, min(n, begin + step))
        both = (fires[:, block].T @ fires).toarray()
        both[np.arange(len(block)), block] = 0.0
        enough = both >= MIN_TOGETHER
        union = firings[block, None] + firings[None] - both
        lift = both * tokens / np.maximum(firings[block, None] * firings[None], 1.0)
        products = (values[:, block].T @ values).toarray() / tokens - means[block, None] * means[None]
        spread = deviations[block, None] * deviations[None]
        correlation = np.divide(products, spread, out=np.zeros_like(products), where=spread > 0)
        jaccard = _largest(np.where(enough, both / np.maximum(union, 1.0), 0.0), count)
        at = jaccard.latents.clip(min=0)
        parts.append(
            (
                *jaccard,
                np.take_along_axis(lift, at, 1),
                np.take_along_axis(both, at, 1),
                *_largest(np.where(enough, lift, 0.0), count),
                *_largest(np.where(enough, correlation, 0.0), count),
            )
        )
    a, b, lifts, counts, c, d, e, f = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Together(Neighbours(a, b), lifts, counts, Neighbours(c, d), Neighbours(e, f))


@torch.no_grad()
def nearest_latents(atoms: Float[Tensor, "n_latents d_out"], count: int = 5) -> Neighbours:
    """Return the latents whose decoder directions have the largest signed cosine with each latent's."""
    unit = torch.nn.functional.normalize(atoms.detach().float(), dim=-1)
    n = unit.shape[0]
    parts: list[Neighbours] = []
    step = max(1, BLOCK_ENTRIES // n)
    for begin in range(0, n, step):
        cosines = unit[begin : begin + step] @ unit.T
        rows = torch.arange(cosines.shape[0], device=cosines.device)
        cosines[rows, rows + begin] = -2.0
        values, latents = cosines.topk(min(count, n - 1), dim=-1)
        parts.append(Neighbours(latents.cpu().numpy(), values.cpu().numpy()))
    return Neighbours(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class TokenTable(NamedTuple):
    """Ids of the tokens with the largest shares of each latent's summed activation, largest first; padded with -1."""

    tokens: np.ndarray
    shares: np.ndarray


def token_table(sample: TokenSample, codes: Matrix, count: int = 8) -> TokenTable:
    """Return the tokens that hold most of each latent's activation."""
    ids, places = np.unique(sample.tokens, return_inverse=True)
    n = codes.shape[1]
    ones = csr_array((np.ones(len(places)), places, np.arange(len(places) + 1)), shape=(len(places), len(ids)))
    mass: Any = csr_array(codes.astype(np.float64).T @ ones)
    tokens, shares = np.full((n, count), -1, np.int64), np.zeros((n, count))
    for latent in range(n):
        here = slice(*mass.indptr[latent : latent + 2])
        columns, values = mass.indices[here], mass.data[here]
        order = np.argsort(-values, kind="stable")[:count]
        tokens[latent, : len(order)] = ids[columns[order]]
        shares[latent, : len(order)] = values[order] / max(values.sum(), 1e-30)
    return TokenTable(tokens, shares)


def _largest(scores: np.ndarray, count: int) -> Neighbours:
    """Return the largest positive entries of each row."""
    count = min(count, scores.shape[1])
    some = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    values = np.take_along_axis(scores, some, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    latents, values = np.take_along_axis(some, order, 1), np.take_along_axis(values, order, 1)
    return Neighbours(np.where(values > 0, latents, -1), np.maximum(values, 0.0))
