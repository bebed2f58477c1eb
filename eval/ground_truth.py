"""Planted dictionaries: activations made of known atoms, and how much of them a learned dictionary recovers."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from ..sae import SparseDictionary
from ..sae.metrics import RunningFvu, dead_fraction

# A feature counts as recovered when some atom is this close to its own.
RECOVERED_COSINE = 0.9
# Bounds the dense pre-activations of a wide dictionary; codes do not depend on it in eval mode.
JUDGE_BATCH_TOKENS = 8192


class Firing(ABC):
    """Which features fire together on a token."""

    @abstractmethod
    def probabilities(self) -> Float[Tensor, " n_features"]:
        """On which share of all tokens each feature fires."""

    @abstractmethod
    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        """The features that fire on each of so many tokens."""


@dataclass(frozen=True)
class Independent(Firing):
    """Every feature fires on its own."""

    p: Float[Tensor, " n_features"]

    def probabilities(self) -> Float[Tensor, " n_features"]:
        return self.p

    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        return torch.rand(tokens, self.p.shape[0], generator=generator) < self.p


@dataclass(frozen=True)
class Copula(Firing):
    """A feature fires where its standard normal exceeds a threshold; ``factors @ factors.T`` correlates the normals.

    Rows of ``factors`` are shorter than 1: the rest of each variance is the feature's own.
    """

    p: Float[Tensor, " n_features"]
    factors: Float[Tensor, "n_features rank"]

    def probabilities(self) -> Float[Tensor, " n_features"]:
        return self.p

    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        n_features, rank = self.factors.shape
        common = torch.randn(tokens, rank, generator=generator) @ self.factors.T
        own = torch.randn(tokens, n_features, generator=generator) * (1 - self.factors.pow(2).sum(-1)).sqrt()
        return common + own > torch.special.ndtri(1 - self.p)


@dataclass(frozen=True)
class Forest(Firing):
    """Siblings exclude each other and fire only with their parent; ``parents`` is -1 at the roots, siblings themselves.

    ``p`` is conditional on the parent. Parents stand before their children.
    """

    parents: Int[Tensor, " n_features"]
    p: Float[Tensor, " n_features"]

    def probabilities(self) -> Float[Tensor, " n_features"]:
        marginal = self.p.clone()
        for feature, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                marginal[feature] *= marginal[parent]
        return marginal

    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        fires = torch.zeros(tokens, self.p.shape[0], dtype=torch.bool)
        # Ascending, so that a parent's own group has been drawn before its children's.
        for parent in self.parents.unique().tolist():
            siblings = (self.parents == parent).nonzero()[:, 0]
            # Beyond the last edge lies the case that no sibling fires.
            edges = self.p[siblings].double().cumsum(0)
            chosen = torch.searchsorted(edges, torch.rand(tokens, generator=generator, dtype=torch.float64), right=True)
            group = chosen[:, None] == torch.arange(len(siblings))
            fires[:, siblings] = group & fires[:, parent, None] if parent >= 0 else group
        return fires


@dataclass(frozen=True)
class Decision:
    """A label that some features alone determine (1 where any of them fires) and a logistic model that reads it from x."""

    features: Int[Tensor, " n_decisive"]
    reader: Float[Tensor, " d"]
    offset: float

    def labels(self, coefficients: Float[Tensor, "tokens n_features"]) -> Float[Tensor, " tokens"]:
        return (coefficients[:, self.features] > 0).any(-1).to(coefficients.dtype)

    def logits(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, " tokens"]:
        return x @ self.reader + self.offset

    def loss(self, x: Float[Tensor, "tokens d"], labels: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
        """Cross-entropy of the labels, summed over tokens, so that a token's gradient is its own."""
        return F.binary_cross_entropy_with_logits(self.logits(x), labels, reduction="sum")

    def gradient(self, x: Float[Tensor, "tokens d"], labels: Float[Tensor, " tokens"]) -> Float[Tensor, "tokens d"]:
        """The gradient of ``loss`` at ``x``."""
        return (self.logits(x).sigmoid() - labels)[:, None] * self.reader


class Sample(NamedTuple):
    """Activations, the coefficients they were made of, and the loss gradient where there is a label."""

    x: Tensor  # (tokens, d)
    coefficients: Tensor  # (tokens, n_features)
    grad: Tensor | None  # (tokens, d)


@dataclass(frozen=True)
class Planted:
    """``x = coefficients @ atoms + bias``; a coefficient is ReLU(mean + std N(0, 1)) where its feature fires, else 0.

    ``groups`` names features whose recovery is of interest by itself. With ``parents`` (-1 at the roots, parents before their
    children) a coefficient is also multiplied by its parent's, in units of the parent's mean.
    Source: SynthSAEBench, arXiv:2602.14687; its own configuration is in ``eval/synth.py``.
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
        """So many independent tokens; the same seed gives the same ones."""
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
    """The features by their depth in the forest, roots first."""
    depth = torch.zeros_like(parents)
    found = [(parents < 0).nonzero()[:, 0]]
    while len(found[-1]):
        depth[torch.isin(parents, found[-1])] = len(found)
        found.append((depth == len(found)).nonzero()[:, 0])
    return found[:-1]


def flat(
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
    """Independent features in random directions; the frequent ones first."""
    generator = generator_of("truth", seed)
    p = zipf_probabilities(n_features, exponent, p_min, p_max)
    atoms, bias = _directions(n_features, d, generator), bias_norm * _directions(1, d, generator)[0]
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
    """``flat``, except that features fire together through ``rank`` common factors with ``strength`` of the variance.

    Raises:
        ValueError: If ``strength`` is not a share.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected a share of the variance, 0 to 1, got {strength}.")
    generator = generator_of("truth", seed)
    p = zipf_probabilities(n_features, exponent, p_min, p_max)
    atoms, bias = _directions(n_features, d, generator), bias_norm * _directions(1, d, generator)[0]
    # Just inside the sphere: at strength 1 rounding could leave a negative variance of its own.
    factors = math.sqrt(strength) * (1 - 1e-6) * _directions(n_features, rank, generator)
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
    """One parent or singleton per token, and with a parent at most one of its ``n_children`` children.

    The defaults are the benchmark of Costa et al. 2025 (matching pursuit): 20 features, 1.36 of them per token. Two atoms of
    one level (parents and singletons; the children of one parent) have the given ``cosine``, all others are orthogonal.
    Features are ordered parents, singletons, children.

    Raises:
        ValueError: If the features do not fit into ``d``, exclude each other with a total above 1, or the cosine is not
            in 0 to 1.
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
    bias = bias_norm * _directions(1, d, generator)[0]
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
    """``flat`` features, then a few small ones that alone determine a label; samples carry the gradient of its loss.

    Decisive atoms are orthogonal to each other and to the large ones: only so can a linear model read the label
    from x without their interference. Its logit is about 1 where one of them fires and -1 where none does.

    Raises:
        ValueError: If the decisive atoms leave no dimension to the large ones.
    """
    if n_decisive >= d:
        raise ValueError(f"n_decisive: expected less than d = {d}, got {n_decisive}.")
    generator = generator_of("truth", seed)
    basis = _orthonormal(d, generator)
    decisive, rest = basis[:n_decisive], basis[n_decisive:]
    atoms = torch.cat([_directions(n_large, d - n_decisive, generator) @ rest, decisive])
    bias = bias_norm * _directions(1, d, generator)[0]
    p = torch.cat([zipf_probabilities(n_large, exponent, p_min, p_max), torch.full((n_decisive,), p_decisive)])
    relative = torch.cat([torch.ones(n_large), torch.full((n_decisive,), relative_magnitude)])
    features = torch.arange(n_large, n_large + n_decisive)
    reader = 2 / (relative_magnitude * mean) * decisive.sum(0)
    decision = Decision(features, reader, -1 - float(bias @ reader))
    groups = {"large": torch.arange(n_large), "decisive": features}
    return Planted(atoms, bias, Independent(p), mean * relative, std * relative, decision, groups)


# Small enough for a dictionary to be trained in minutes on two CPU cores. `flat` and `correlated` plant 256 features in 64
# dimensions, `hierarchical_*` 20 in 20, `small_but_decisive` 128 large and 4 decisive ones in 64.
PLANTED: dict[str, Callable[[int], Planted]] = {
    "flat": lambda seed: flat(256, 64, seed),
    "correlated": lambda seed: correlated(256, 64, seed),
    "hierarchical_0": lambda seed: hierarchical(20, seed, cosine=0.0),
    "hierarchical_04": lambda seed: hierarchical(20, seed, cosine=0.4),
    "hierarchical_08": lambda seed: hierarchical(20, seed, cosine=0.8),
    "small_but_decisive": lambda seed: small_but_decisive(128, 4, 64, seed),
}


def zipf_probabilities(n_features: int, exponent: float, p_min: float, p_max: float) -> Float[Tensor, " n_features"]:
    """Firing probabilities that fall like rank^-exponent, stretched to run from ``p_max`` to ``p_min``.

    Raises:
        ValueError: Unless 0 < p_min <= p_max < 1.
    """
    if not 0 < p_min <= p_max < 1:
        raise ValueError(f"p_min, p_max: expected 0 < p_min <= p_max < 1, got {p_min} and {p_max}.")
    weights = torch.arange(1, n_features + 1, dtype=torch.float64).pow(-exponent)
    share = (weights - weights[-1]) / (weights[0] - weights[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    return (p_min + (p_max - p_min) * share).float()


def generator_of(purpose: str, seed: int) -> Generator:
    """Random numbers of one purpose.

    The plain seed would give a dictionary, initialised after ``torch.manual_seed`` of the same number, the truth's atoms.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _directions(n: int, d: int, generator: Generator) -> Float[Tensor, "n d"]:
    return F.normalize(torch.randn(n, d, generator=generator), dim=-1)


def _orthonormal(d: int, generator: Generator) -> Float[Tensor, "d d"]:
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0].T


def _tilted(level: Float[Tensor, "n d"], cosine: float) -> Float[Tensor, "n d"]:
    """Orthonormal rows turned towards their sum, all by the same angle, until each two of them have the given cosine."""
    # own * e_i + common * sum(e): the squared norm is own^2 + cosine = 1, the inner product 2 own common + n common^2.
    n, own = level.shape[0], math.sqrt(1 - cosine)
    common = (math.sqrt(own**2 + n * cosine) - own) / max(n, 1)
    return own * level + common * level.sum(0)


class Pairs(NamedTuple):
    """A one-to-one matching: entry i of both belongs together."""

    features: Tensor  # (pairs,)
    latents: Tensor  # (pairs,)


def match(cosines: Float[Tensor, "n_features n_latents"]) -> Pairs:
    """The min(n_features, n_latents) pairs with the largest sum of cosines (Hungarian method)."""
    features, latents = linear_sum_assignment(cosines.numpy(), maximize=True)
    return Pairs(torch.from_numpy(features), torch.from_numpy(latents))


def absolute_cosines(
    atoms: Float[Tensor, "n_features d"], W_dec: Float[Tensor, "n_latents d"]
) -> Float[Tensor, "n_features n_latents"]:
    """|cos| of every planted atom with every learned one; a zero row is orthogonal to all."""
    return (F.normalize(atoms.double(), dim=-1) @ F.normalize(W_dec.double(), dim=-1).T).abs()


def score(
    planted: Planted,
    W_dec: Float[Tensor, "n_latents d"],
    latents: Float[Tensor, "tokens n_latents"],
    sample: Sample,
    x_hat: Float[Tensor, "tokens d"],
) -> dict[str, float]:
    """What a dictionary recovered of the truth: ``Recovery`` of one sample."""
    recovery = Recovery(planted, W_dec)
    recovery.update(latents, sample, x_hat)
    return recovery.report()


class Recovery:
    """What a dictionary recovered of the truth, from its atoms and, over any number of samples, latents and reconstruction.

    - ``mcc``: mean |cos| of planted and learned atoms matched one to one; ``chance_mcc``: that of random atoms.
    - ``mmcs_true``: mean over features of the |cos| with the nearest atom, which may be nearest to several (like a recall);
      ``mmcs_learned``: mean over latents of the |cos| with the nearest feature (like a precision).
    - ``recall_09``: share of features with an atom above |cos| 0.9; ``recall_09_<group>``: within a group.
    - ``uniqueness``: share of latents, dead ones included, whose nearest feature is no other latent's nearest.
      ``distinct_features``: how many features are some latent's nearest, per latent; what SAELens calls uniqueness.
    - ``detector_f1``: (latent > 0) as a detector of (coefficient > 0), mean over matched pairs.
    - ``latent_f1``, ``latent_precision``, ``latent_recall``: (latent > 0) as a detector of its nearest feature, mean over all
      latents; 0 for a dead one.
    - ``coefficient_correlation``: Pearson's, over tokens, mean over matched pairs; 0 where the latent is constant.
    - ``fvu``, ``shrinkage`` (mean ||x_hat|| / ||x||), ``l0``, ``true_l0``, ``dead_fraction``: on the samples.

    The means over pairs leave out features that never fire in the samples.
    Source: SynthSAEBench, arXiv:2602.14687.
    """

    def __init__(self, planted: Planted, W_dec: Float[Tensor, "n_latents d"]):
        self.planted = planted
        self.n_latents = W_dec.shape[0]
        cosines = absolute_cosines(planted.atoms, W_dec)
        self.pairs = match(cosines)
        nearest_atom = cosines.max(1).values
        nearest_cosine, self.nearest_feature = cosines.max(0)
        shared_by = torch.bincount(self.nearest_feature, minlength=planted.n_features)
        recovered = (nearest_atom > RECOVERED_COSINE).double()
        self.of_atoms = {
            "mcc": float(cosines[self.pairs.features, self.pairs.latents].mean()),
            "chance_mcc": chance_mcc(planted.atoms, self.n_latents),
            "mmcs_true": float(nearest_atom.mean()),
            "mmcs_learned": float(nearest_cosine.mean()),
            "recall_09": float(recovered.mean()),
            **{f"recall_09_{name}": float(recovered[features].mean()) for name, features in planted.groups.items()},
            "uniqueness": float((shared_by[self.nearest_feature] == 1).double().mean()),
            "distinct_features": int((shared_by > 0).sum()) / self.n_latents,
        }
        n_pairs = len(self.pairs.features)
        # Tokens on which both, the true one, the learned one fire.
        self.counts = torch.zeros(3, n_pairs, dtype=torch.float64)
        self.latent_counts = torch.zeros(3, self.n_latents, dtype=torch.float64)
        # Sums of the coefficient, the latent, their squares and their product.
        self.sums = torch.zeros(5, n_pairs, dtype=torch.float64)
        self.fvu = RunningFvu(planted.d)
        self.shrinkage, self.l0, self.true_l0, self.tokens = 0.0, 0.0, 0.0, 0

    def update(self, latents: Float[Tensor, "tokens n_latents"], sample: Sample, x_hat: Float[Tensor, "tokens d"]) -> None:
        """Take in a dictionary's latents on a sample, and what it makes of them."""
        fires, truly = latents > 0, sample.coefficients > 0
        true, learned = sample.coefficients[:, self.pairs.features].double(), latents[:, self.pairs.latents].double()
        self.counts += _overlap(truly[:, self.pairs.features], fires[:, self.pairs.latents])
        self.latent_counts += _overlap(truly[:, self.nearest_feature], fires)
        self.sums += torch.stack([t.sum(0) for t in (true, learned, true * true, learned * learned, true * learned)])
        self.fvu.update(sample.x, x_hat)
        norms = sample.x.double().norm(dim=-1)
        self.shrinkage += float((x_hat.double().norm(dim=-1) / norms.clamp_min(1e-12)).sum())
        self.l0 += int(fires.sum())
        self.true_l0 += int(truly.sum())
        self.tokens += len(norms)

    def report(self) -> dict[str, float]:
        """The figures, over all samples so far."""
        both, truly, fired = self.counts
        # A feature that never fires is no evidence against its detector.
        seen = truly > 0
        f1 = 2 * both[seen] / (truly + fired)[seen]
        both_latent, truly_latent, fired_latent = self.latent_counts
        return self.of_atoms | {
            "detector_f1": float(f1.mean()),
            "latent_f1": float((2 * both_latent / (truly_latent + fired_latent).clamp_min(1)).mean()),
            "latent_precision": float((both_latent / fired_latent.clamp_min(1)).mean()),
            "latent_recall": float((both_latent / truly_latent.clamp_min(1)).mean()),
            "coefficient_correlation": float(self._correlation()[seen].mean()),
            "fvu": float(self.fvu.value()),
            "shrinkage": self.shrinkage / self.tokens,
            "l0": self.l0 / self.tokens,
            "true_l0": self.true_l0 / self.tokens,
            "dead_fraction": dead_fraction(fired_latent.long()),
        }

    def _correlation(self) -> Float[Tensor, " pairs"]:
        a, b, aa, bb, ab = self.sums / self.tokens
        spread = ((aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)).sqrt()
        # What is left of a constant's variance is rounding.
        constant = (bb - b * b <= 1e-12 * bb) | (aa - a * a <= 1e-12 * aa)
        return torch.where(constant, 0.0, (ab - a * b) / spread.where(spread > 0, 1.0))


def _overlap(true: Bool[Tensor, "tokens n"], detected: Bool[Tensor, "tokens n"]) -> Float[Tensor, "3 n"]:
    return torch.stack([(true & detected).sum(0), true.sum(0), detected.sum(0)]).double()


def chance_mcc(atoms: Float[Tensor, "n_features d"], n_latents: int, seed: int = 0) -> float:
    """The ``mcc`` of ``n_latents`` random atoms: what a dictionary that learned nothing is given."""
    guessed = _directions(n_latents, atoms.shape[1], generator_of("chance", seed))
    cosines = absolute_cosines(atoms, guessed)
    pairs = match(cosines)
    return float(cosines[pairs.features, pairs.latents].mean())


@torch.no_grad()
def judge(dictionary: SparseDictionary, planted: Planted, tokens: int, seed: int) -> dict[str, float]:
    """``score`` of a dictionary in eval mode on fresh tokens; take a seed that it was not trained on.

    Raises:
        ValueError: If the dictionary is of another width.
    """
    recovery = recovery_of(planted, dictionary)
    update_recovery(recovery, dictionary, planted.sample(tokens, seed))
    return recovery.report()


def recovery_of(planted: Planted, dictionary: SparseDictionary) -> Recovery:
    """An empty record of what a dictionary recovers.

    Raises:
        ValueError: If the dictionary is of another width.
    """
    if dictionary.d_in != planted.d or dictionary.d_out != planted.d:
        raise ValueError(
            f"dictionary: expected d_in = d_out = {planted.d}, as planted, got {dictionary.d_in} and {dictionary.d_out}."
        )
    return Recovery(planted, dictionary.atoms.detach().float().cpu())


@torch.no_grad()
def update_recovery(recovery: Recovery, dictionary: SparseDictionary, sample: Sample) -> None:
    """Take in what a dictionary in eval mode makes of a sample."""
    device = dictionary.device
    training = dictionary.training
    dictionary.eval()
    try:
        for start in range(0, len(sample.x), JUDGE_BATCH_TOKENS):
            x, coefficients, grad = (None if t is None else t[start : start + JUDGE_BATCH_TOKENS] for t in sample)
            assert x is not None
            assert coefficients is not None
            code = dictionary.encode(x.to(device), None if grad is None else grad.to(device))
            latents = code.to_dense(dictionary.n_latents).float().cpu()
            recovery.update(latents, Sample(x, coefficients, grad), dictionary.decode(code).float().cpu())
    finally:
        dictionary.train(training)
