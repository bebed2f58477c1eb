"""Nearest named vectors of decoder directions by cosine, with margins, and the floor of random directions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .named_vectors import NamedVectors

# Candidates for the second name: the first may recur in other spellings (" Cat", "cat").
CANDIDATES = 8
# Random directions of the floor, at least.
FLOOR_DIRECTIONS = 1000
BLOCK = 256


class NearestNames(NamedTuple):
    """The best and the second name of each direction by number, and their cosines; directions of length 0 have -1 and 0."""

    best: Int[Tensor, " directions"]
    second: Int[Tensor, " directions"]
    cosine: Float[Tensor, " directions"]
    second_cosine: Float[Tensor, " directions"]

    @property
    def margin(self) -> Float[Tensor, " directions"]:
        return self.cosine - self.second_cosine


def nearest_names(directions: Float[Tensor, "directions d"], words: NamedVectors) -> NearestNames:
    """Return the names with the largest cosine. Spellings that differ in case and white space alone are one name.

    >>> words = NamedVectors(["cat", " Cat", "dog"], torch.tensor([[1.0, 0], [0.99, 0.01], [0, 1]]), "test")
    >>> found = nearest_names(torch.tensor([[2.0, 0.5]]), words)
    >>> found.best.tolist(), found.second.tolist()
    ([1], [2])
    """
    spelling: dict[str, int] = {}
    same = torch.tensor([spelling.setdefault(name.strip().casefold(), len(spelling)) for name in words.names])
    unit_words = F.normalize(words.vectors, dim=-1)
    count = min(CANDIDATES, len(words.names))
    parts: list[tuple[Tensor, ...]] = []
    for some in directions.split(BLOCK):
        found = (F.normalize(some, dim=-1) @ unit_words.T).topk(count, dim=-1)
        other = same[found.indices] != same[found.indices[:, :1]]
        # Of eight spellings of one name the last stands for the second.
        place = torch.where(other.any(1), other.int().argmax(1), count - 1)[:, None]
        second, second_cosine = found.indices.gather(1, place)[:, 0], found.values.gather(1, place)[:, 0]
        there = some.norm(dim=-1) > 0
        best = torch.where(there, found.indices[:, 0], -1)
        parts.append((best, torch.where(there, second, -1), found.values[:, 0] * there, second_cosine * there))
    return NearestNames(*(torch.cat(each) for each in zip(*parts, strict=True)))


def random_directions(directions: Float[Tensor, "directions d"], count: int, seed: int) -> Float[Tensor, "count d"]:
    """Return random mixtures of directions: Gaussian, with the second moments of the unit directions.

    Isotropic directions would be too easy a floor where all directions and words lie in a cone, as embeddings do.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, len(directions), generator=generator) / len(directions) ** 0.5
    return weights @ F.normalize(directions, dim=-1)
