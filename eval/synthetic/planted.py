"""Planted dictionaries: activations generated from known atoms, the ground truth for a learned dictionary."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from .firing import Copula, Decision, Firing, Forest, Independent


class Sample(NamedTuple):
    """Activations, the coefficients that generated them, and the loss gradient if there is a label."""

    x: Tensor  # (tokens, d)
    coefficients: Tensor  # (tokens, n_features)
    grad: Tensor | None  # (tokens, d)


@dataclass(frozen=True)
class Planted:
    """Generative model of activations: ``x = coefficients @ atoms + bias``.

    A coefficient is ReLU(mean + std N(0, 1)) if its feature fires, else 0. With ``parents`` (-1 at the roots, parents before
    their children) it is also multiplied by its parent's, in units of the parent's mean. ``groups`` names features whose
    recovery is also reported separately. Source: SynthSAEBench, arXiv:2602.14687; its own configuration is in
    ``eval/synthetic/synth_sae_bench.py``.
    """

    atoms: Float[Tensor, "n_features d"]
    bias: Float[Tensor, " d"]
    firing: Firing
    means: Float[Tensor, " n_features"]
    stds: Float[Tensor, " n_features"]
    decision: Decision | None = None
    groups: dict[str, Int[Tensor, " some"]] = field(default_factory=dict)
    parents: Int[Tensor, " n_features"] | None = None

    @property
    def n_features(self) -> int:
        return self.atoms.shape[0]

    @property
    def d(self) -> int:
        return self.atoms.shape[1]

    def sample(self, tokens: int, seed: int) -> Sample:
        """Sample ``tokens`` independent tokens, deterministic in the seed."""
        generator = generator_of("sample", seed)
        fires = self.firing.draw(tokens, generator)
        magnitudes = (self.means + self.stds * torch.randn(tokens, self.n_features, generator=generator)).relu()
        coefficients = magnitudes * fires
        for level in [] if self.parents is None else levels(self.parents)[1:]:
            above = self.parents[level]  # pyright: ignore[reportOptionalSubscript]
            coefficients[:, level] *= coefficients[:, above] / self.means[above]
        x = coefficients @ self.atoms + self.bias
        grad = None if self.decision is None else self.decision.gradient(x, self.decision.labels(coefficients))
        return Sample(x, coefficients, grad)


def levels(parents: Int[Tensor, " n_features"]) -> list[Int[Tensor, " some"]]:
    """Return the features by their depth in the forest, roots first."""
    depth = torch.zeros_like(parents)
    found = [(parents < 0).nonzero()[:, 0]]
    while len(found[-1]):
        depth[torch.isin(parents, found[-1])] = len(found)
        found.append((depth == len(found)).nonzero()[:, 0])
    return found[:-1]


def independent_features(
    n_features: int,
    d: int,
    seed: int,
    exponent: float = 0.5,
    p_min: float = 0.01,
    p_max: float = 0.2,
    mean: float = 1.0,
    std: float = 0.25,
    bias_norm: float = 1.0,
) -> Planted:
    """Return independent features in random directions, the most frequent first."""
    generator = generator_of("truth", seed)
    p = zipf_probabilities(n_features, exponent, p_min, p_max)
    atoms, bias = unit_directions(n_features, d, generator), bias_norm * unit_directions(1, d, generator)[0]
    return Planted(atoms, bias, Independent(p), torch.full((n_features,), mean), torch.full((n_features,), std))


def correlated(
    n_features: int,
    d: int,
    seed: int,
    rank: int = 4,
    strength: float = 0.5,
    exponent: float = 0.5,
    p_min: float = 0.01,
    p_max: float = 0.2,
    mean: float = 1.0,
    std: float = 0.25,
    bias_norm: float = 1.0,
) -> Planted:
    """Return features as in ``independent_features``, with correlated firing.

    Features share ``rank`` common factors, which hold ``strength`` of the variance.

    Raises:
        ValueError: If ``strength`` is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected a share of the variance, 0 to 1, got {strength}.")
    generator = generator_of("truth", seed)
    p = zipf_probabilities(n_features, exponent, p_min, p_max)
    atoms, bias = unit_directions(n_features, d, generator), bias_norm * unit_directions(1, d, generator)[0]
    # Slightly inside the sphere: at strength 1, rounding could make the independent variance negative.
    factors = math.sqrt(strength) * (1 - 1e-6) * unit_directions(n_features, rank, generator)
    return Planted(atoms, bias, Copula(p, factors), torch.full((n_features,), mean), torch.full((n_features,), std))


def hierarchical(
    d: int,
    seed: int,
    cosine: float,
    n_parents: int = 3,
    n_children: int = 3,
    n_singletons: int = 8,
    p_parent: float = 0.2,
    p_child: float = 0.2,
    p_singleton: float = 0.05,
    mean: float = 1.5,
    std: float = 0.25,
    bias_norm: float = 0.0,
) -> Planted:
    """Return a hierarchy with at most one parent or singleton per token, and at most one of the parent's children.

    The defaults are the benchmark of Costa et al. 2025 (matching pursuit): 20 features, 1.36 of them per token. Two atoms of
    one level (parents and singletons; the children of one parent) have the given ``cosine``, all others are orthogonal.
    Features are ordered parents, singletons, children.

    Raises:
        ValueError: If the features do not fit into ``d``, exclusive probabilities sum to more than 1, or the cosine is not
            at least 0 and less than 1.
    """
    n_roots, n_features = n_parents + n_singletons, n_parents * (1 + n_children) + n_singletons
    if n_features > d:
        raise ValueError(f"d: expected at least {n_features}, one dimension per feature, got {d}. Raise d or plant fewer.")
    if not 0 <= cosine < 1:
        raise ValueError(f"cosine: expected at least 0 and less than 1, got {cosine}.")
    for name, total in (("p_child", n_children * p_child), ("p_parent", n_parents * p_parent + n_singletons * p_singleton)):
        if total > 1 + 1e-6:
            raise ValueError(f"{name}: expected exclusive probabilities that sum to at most 1, got {total:.3g}. Lower {name}.")
    generator = generator_of("truth", seed)
    basis = _orthonormal(d, generator)
    levels = [basis[:n_roots], *basis[n_roots:n_features].split(max(n_children, 1))]
    atoms = torch.cat([_tilted(level, cosine) for level in levels])
    parents = torch.cat([torch.full((n_roots,), -1), torch.arange(n_parents).repeat_interleave(n_children)])
    sizes = torch.tensor([n_parents, n_singletons, n_parents * n_children])
    p = torch.tensor([p_parent, p_singleton, p_child]).repeat_interleave(sizes)
    parts = torch.arange(n_features).split(sizes.tolist())
    groups = {"parents": parts[0], "singletons": parts[1], "children": parts[2]}
    bias = bias_norm * unit_directions(1, d, generator)[0]
    means, stds = torch.full((n_features,), mean), torch.full((n_features,), std)
    return Planted(atoms, bias, Forest(parents, p), means, stds, groups=groups)


def small_but_decisive(
    n_large: int,
    n_decisive: int,
    d: int,
    seed: int,
    relative_magnitude: float = 0.1,
    p_decisive: float = 0.1,
    exponent: float = 0.5,
    p_min: float = 0.01,
    p_max: float = 0.2,
    mean: float = 1.0,
    std: float = 0.25,
    bias_norm: float = 1.0,
) -> Planted:
    """Return ``independent_features`` and a few small ones that alone determine a label; samples include its loss gradient.

    Decisive atoms are orthogonal to each other and to the large ones; otherwise interference would prevent a linear model from
    reading the label from x. Its logit is about 1 if one of them fires and -1 if none does.

    Raises:
        ValueError: If the decisive atoms leave no dimension for the large ones.
    """
    if n_decisive >= d:
        raise ValueError(f"n_decisive: expected less than d = {d}, got {n_decisive}.")
    generator = generator_of("truth", seed)
    basis = _orthonormal(d, generator)
    decisive, rest = basis[:n_decisive], basis[n_decisive:]
    atoms = torch.cat([unit_directions(n_large, d - n_decisive, generator) @ rest, decisive])
    bias = bias_norm * unit_directions(1, d, generator)[0]
    p = torch.cat([zipf_probabilities(n_large, exponent, p_min, p_max), torch.full((n_decisive,), p_decisive)])
    relative = torch.cat([torch.ones(n_large), torch.full((n_decisive,), relative_magnitude)])
    features = torch.arange(n_large, n_large + n_decisive)
    reader = 2 / (relative_magnitude * mean) * decisive.sum(0)
    decision = Decision(features, reader, -1 - float(bias @ reader))
    groups = {"large": torch.arange(n_large), "decisive": features}
    return Planted(atoms, bias, Independent(p), mean * relative, std * relative, decision, groups)


# Small enough to train a dictionary in minutes on two CPU cores. `flat` and `correlated` plant 256 features in 64
# dimensions, `hierarchical_*` 20 in 20, `small_but_decisive` 128 large and 4 decisive ones in 64.
PLANTED: dict[str, Callable[[int], Planted]] = {
    "flat": lambda seed: independent_features(256, 64, seed),
    "correlated": lambda seed: correlated(256, 64, seed),
    "hierarchical_0": lambda seed: hierarchical(20, seed, cosine=0.0),
    "hierarchical_04": lambda seed: hierarchical(20, seed, cosine=0.4),
    "hierarchical_08": lambda seed: hierarchical(20, seed, cosine=0.8),
    "small_but_decisive": lambda seed: small_but_decisive(128, 4, 64, seed),
}


def zipf_probabilities(n_features: int, exponent: float, p_min: float, p_max: float) -> Float[Tensor, " n_features"]:
    """Return firing probabilities that fall like rank^-exponent, rescaled to run from ``p_max`` to ``p_min``.

    Raises:
        ValueError: Unless 0 < p_min <= p_max < 1.
    """
    if not 0 < p_min <= p_max < 1:
        raise ValueError(f"p_min, p_max: expected 0 < p_min <= p_max < 1, got {p_min} and {p_max}.")
    weights = torch.arange(1, n_features + 1, dtype=torch.float64).pow(-exponent)
    share = (weights - weights[-1]) / (weights[0] - weights[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    return (p_min + (p_max - p_min) * share).float()


def generator_of(purpose: str, seed: int) -> Generator:
    """Return a random generator for one purpose.

    With the plain seed, a dictionary initialized after ``torch.manual_seed`` of the same number would start at the true atoms.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def unit_directions(n: int, d: int, generator: Generator) -> Float[Tensor, "n d"]:
    return F.normalize(torch.randn(n, d, generator=generator), dim=-1)


def _orthonormal(d: int, generator: Generator) -> Float[Tensor, "d d"]:
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0].T


def _tilted(level: Float[Tensor, "n d"], cosine: float) -> Float[Tensor, "n d"]:
    """Return orthonormal rows rotated toward their sum until every pair has the given cosine."""
    # own * e_i + common * sum(e): the squared norm is own^2 + cosine = 1, the inner product 2 own common + n common^2.
    n, own = level.shape[0], math.sqrt(1 - cosine)
    common = (math.sqrt(own**2 + n * cosine) - own) / max(n, 1)
    return own * level + common * level.sum(0)
