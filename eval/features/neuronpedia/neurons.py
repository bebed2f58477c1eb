"""Relations of latents to neurons, the coordinates of the activations, as Neuronpedia's tables show them.

A latent is aligned with the neurons that its decoder direction has the largest coordinates at, and correlated with those whose
activations its own follow.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from ....sae.sparse_code import SparseCode
from ....training.activations.contexts import ContextBatch

# Rows of each table.
ROWS = 3


class Alignment(NamedTuple):
    """Neurons at the largest coordinates of each decoder direction, with their share of the direction's L1 norm."""

    neurons: np.ndarray
    values: np.ndarray
    shares: np.ndarray


class NeuronCorrelations(NamedTuple):
    """Neurons whose activations correlate most with each latent's, largest first; the cosine is that without centring."""

    neurons: np.ndarray
    pearson: np.ndarray
    cosine: np.ndarray


def alignment(directions: Float[Tensor, "n_latents d_out"], count: int = ROWS) -> Alignment:
    """Return the ``count`` neurons at the largest signed coordinates of each direction."""
    rows = directions.detach().float()
    values, neurons = rows.topk(min(count, rows.shape[1]), dim=-1)
    shares = values.abs() / rows.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    return Alignment(*(part.cpu().numpy() for part in (neurons, values, shares)))


class NeuronMoments:
    """Running sums behind the correlations of latents with the activations that they read, over batches of kept tokens."""

    def __init__(self, n_latents: int, d_in: int):
        self.tokens = self.contexts = 0
        self.latent_sums, self.latent_squares = np.zeros((2, n_latents))
        self.neuron_sums, self.neuron_squares = np.zeros((2, d_in))
        self.products = np.zeros((n_latents, d_in))
        # Activations less their first mean, so that large means do not cost digits.
        self._shift: np.ndarray | None = None

    def update(self, batch: ContextBatch, x: Float[Tensor, "tokens d_in"], code: SparseCode) -> None:
        """Add the activations and the code of a batch's kept tokens."""
        if not len(x):
            return
        values = x.detach().cpu().double().numpy()
        if self._shift is None:
            self._shift = values.mean(0)
        values = values - self._shift
        self.contexts += len(batch.token_ids)
        self.tokens += len(values)
        self.neuron_sums += values.sum(0)
        self.neuron_squares += (values**2).sum(0)
        latents = code.latents.cpu().numpy()
        active, columns = np.unique(latents, return_inverse=True)
        entries = code.values.detach().cpu().double().numpy(), (columns, code.token_ids().cpu().numpy())
        # Converted, because latents that are listed twice for a token add up.
        rows: Any = csr_array(coo_array(entries, shape=(len(active), len(values))))
        self.latent_sums[active] += np.asarray(rows.sum(1)).ravel()
        self.latent_squares[active] += np.asarray(rows.power(2).sum(1)).ravel()
        self.products[active] += rows @ values

    def correlations(self, count: int = ROWS) -> NeuronCorrelations:
        """Return the ``count`` neurons that correlate most with each latent; constants correlate with nothing."""
        assert self._shift is not None
        n = self.tokens
        latent_means, neuron_means = self.latent_sums / n, self.neuron_sums / n
        pearson = self.products / n - latent_means[:, None] * neuron_means
        latent_spread = np.sqrt(np.maximum(self.latent_squares / n - latent_means**2, 0.0))
        neuron_spread = np.sqrt(np.maximum(self.neuron_squares / n - neuron_means**2, 0.0))
        spread = latent_spread[:, None] * neuron_spread
        pearson = np.divide(pearson, spread, out=np.zeros_like(pearson), where=spread > 1e-12)
        neurons = np.argsort(-pearson, axis=1, kind="stable")[:, :count]
        raw = self.products + self.latent_sums[:, None] * self._shift
        squares = self.neuron_squares + 2 * self._shift * self.neuron_sums + n * self._shift**2
        lengths = np.sqrt(self.latent_squares[:, None] * np.maximum(squares, 0.0))
        cosine = np.divide(raw, lengths, out=np.zeros_like(raw), where=lengths > 0)
        return NeuronCorrelations(neurons, *(np.take_along_axis(all_, neurons, 1) for all_ in (pearson, cosine)))


def latent_cosines(sums: np.ndarray, squares: np.ndarray, tokens: int, others: np.ndarray, pearson: np.ndarray) -> np.ndarray:
    """Return cosines of latents' activations from their correlations with ``others``, 0 where there is no other (-1)."""
    means, spreads = sums / tokens, np.sqrt(np.maximum(squares / tokens - (sums / tokens) ** 2, 0.0))
    at = others.clip(min=0)
    products = pearson * spreads[:, None] * spreads[at] + means[:, None] * means[at]
    lengths = np.sqrt(squares[:, None] * squares[at]) / tokens
    return np.divide(products, lengths, out=np.zeros_like(products), where=(lengths > 0) & (others >= 0))


def value_histogram(values: np.ndarray, bins: int) -> tuple[list[int], list[float]]:
    """Return counts in ``bins`` bins of equal width from the least to the largest value, and the bins' centers."""
    if not len(values):
        return [], []
    counts, edges = np.histogram(values, bins)
    return counts.tolist(), ((edges[:-1] + edges[1:]) / 2).tolist()
