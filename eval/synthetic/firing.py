"""Firing models: joint distributions of which planted features are active on a token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor


class Firing(ABC):
    """Joint distribution of which features fire on a token."""

    @abstractmethod
    def probabilities(self) -> Float[Tensor, " n_features"]:
        """Return the fraction of tokens on which each feature fires."""

    @abstractmethod
    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        """Sample the features that fire on each of ``tokens`` tokens."""


@dataclass(frozen=True)
class Independent(Firing):
    """Firing model in which features fire independently."""

    p: Float[Tensor, " n_features"]

    def probabilities(self) -> Float[Tensor, " n_features"]:
        return self.p

    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        return torch.rand(tokens, self.p.shape[0], generator=generator) < self.p


@dataclass(frozen=True)
class Copula(Firing):
    """Gaussian copula: features fire if their standard normals, correlated by ``factors @ factors.T``, exceed a threshold.

    Rows of ``factors`` have norm below 1: the rest of each variance is independent.
    """

    p: Float[Tensor, " n_features"]
    factors: Float[Tensor, "n_features rank"]

    def probabilities(self) -> Float[Tensor, " n_features"]:
        return self.p

    def draw(self, tokens: int, generator: Generator) -> Bool[Tensor, "tokens n_features"]:
        n_features, rank = self.factors.shape
        common = torch.randn(tokens, rank, generator=generator) @ self.factors.T
        own = torch.randn(tokens, n_features, generator=generator).mul_((1 - self.factors.pow(2).sum(-1)).sqrt())
        return common.add_(own) > torch.special.ndtri(1 - self.p)


@dataclass(frozen=True)
class Forest(Firing):
    """Hierarchical firing: siblings exclude each other and fire only with their parent.

    ``parents`` is -1 at the roots, which are siblings too. ``p`` is conditional on the parent. Parents precede their children.
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
        # In ascending order, a parent's own group is drawn before its children's.
        for parent in self.parents.unique().tolist():
            siblings = (self.parents == parent).nonzero()[:, 0]
            # Draws beyond the last edge mean that no sibling fires.
            edges = self.p[siblings].double().cumsum(0)
            chosen = torch.searchsorted(edges, torch.rand(tokens, generator=generator, dtype=torch.float64), right=True)
            group = chosen[:, None] == torch.arange(len(siblings))
            fires[:, siblings] = group & fires[:, parent, None] if parent >= 0 else group
        return fires


@dataclass(frozen=True)
class Decision:
    """Label determined by a few features (1 if any of them fires), and a logistic model that reads it from x."""

    features: Int[Tensor, " n_decisive"]
    reader: Float[Tensor, " d"]
    offset: float

    def labels(self, coefficients: Float[Tensor, "tokens n_features"]) -> Float[Tensor, " tokens"]:
        return (coefficients[:, self.features] > 0).any(-1).to(coefficients.dtype)

    def logits(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, " tokens"]:
        return x @ self.reader + self.offset

    def loss(self, x: Float[Tensor, "tokens d"], labels: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
        """Return the cross-entropy of the labels, summed over tokens so that a token's gradient depends on no other token."""
        return F.binary_cross_entropy_with_logits(self.logits(x), labels, reduction="sum")

    def gradient(self, x: Float[Tensor, "tokens d"], labels: Float[Tensor, " tokens"]) -> Float[Tensor, "tokens d"]:
        """Return the gradient of ``loss`` at ``x``."""
        return (self.logits(x).sigmoid() - labels)[:, None] * self.reader
