"""Firing models of planted features."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor


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
