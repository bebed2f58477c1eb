"""Rank test: accuracy with queries, keys or values of some heads projected onto few directions.

Queries are those at the question's position, keys and values those at the labels. The directions are the top right singular
vectors of a head's centred vectors on other prompts; a vector keeps their mean and its part in the directions. Source: Lieberum
et al. 2023, arXiv:2307.09458, who find that three directions are enough for four labels. Random directions are the floor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ....training.activations.architecture import Architecture, HeadInput
from ....training.activations.model import LanguageModel
from ....training.activations.ungrouped_attention import ungrouped
from ..tasks.pairs import BATCH, PromptPairs
from .direct_effects import label_places

PARTS = ("q", "k", "v")
# Share of the accuracy that a rank must keep to be enough.
ENOUGH = 0.95
RANDOM_DRAWS = 3
Head = tuple[int, int]


@dataclass(frozen=True)
class Subspace:
    """Mean of a head's vectors, and orthonormal directions (rows), the most varied first."""

    mean: Float[Tensor, " d_head"]
    directions: Float[Tensor, "d_head d_head"]

    def project(self, x: Float[Tensor, "... d_head"], rank: int) -> Float[Tensor, "... d_head"]:
        """Return vectors with only their mean and their part in the first directions."""
        kept = self.directions[:rank]
        return self.mean + (x - self.mean) @ kept.T @ kept


@dataclass(frozen=True)
class RankCurve:
    """Accuracies by rank, of one part (``q``, ``k`` or ``v``) of some heads; ``random`` is that with random directions.

    ``needed`` is the least rank that keeps 95 % of the accuracy of the model as it is, the last of ``ranks`` being all.
    """

    part: str
    ranks: list[int]
    accuracy: list[float]
    random: list[float]
    full: float

    @property
    def needed(self) -> int:
        return next(rank for rank, value in zip(self.ranks, self.accuracy, strict=True) if value >= ENOUGH * self.full)


class HeadProjections:
    """Heads whose queries, keys or values are projected: directions from ``fitted_on``, accuracies on other pairs.

    Raises:
        ValueError: If the architecture is not supported, or the pairs have no labels.
    """

    def __init__(self, model: LanguageModel, heads: Sequence[Head], fitted_on: PromptPairs, seed: int = 0):
        if label_places(fitted_on) is None:
            raise ValueError(f"{fitted_on.task}: expected pairs of multiple choice with labels, got none. Choose such a task.")
        self.anatomy = Architecture(model)
        # Of grouped-query attention, one head's keys and values alone.
        self.model, self.heads = ungrouped(self.anatomy), list(heads)
        self.fitted = {part: [self._subspace(part, head, fitted_on) for head in self.heads] for part in PARTS}
        self._draw = torch.Generator().manual_seed(seed)

    def curve(self, part: str, pairs: PromptPairs, ranks: Sequence[int] | None = None) -> RankCurve:
        """Return accuracies on ``pairs`` by rank; by default up to twice the number of labels, and all."""
        places = label_places(pairs)
        assert places is not None
        if ranks is None:
            most = min(2 * places.positions.shape[1], self.anatomy.d_head)
            ranks = sorted({*range(most + 1), self.anatomy.d_head})
        found = [self._accuracy(part, pairs, self.fitted[part], rank) for rank in ranks]
        floors = [self._random(part) for _ in range(RANDOM_DRAWS)]
        random = [sum(self._accuracy(part, pairs, floor, rank) for floor in floors) / RANDOM_DRAWS for rank in ranks]
        return RankCurve(part, list(ranks), found, random, self._accuracy(part, pairs, [], 0))

    def _random(self, part: str) -> list[Subspace]:
        size = self.anatomy.d_head
        bases = [torch.linalg.qr(torch.randn(size, size, generator=self._draw))[0] for _ in self.heads]
        return [Subspace(fitted.mean, basis.to(fitted.mean)) for fitted, basis in zip(self.fitted[part], bases, strict=True)]

    def _places(self, part: str, pairs: PromptPairs) -> Int[Tensor, "pairs places"]:
        """Return the positions whose vectors are projected."""
        if part == "q":
            return torch.tensor([[question.position] for (question,) in pairs.questions])
        places = label_places(pairs)
        assert places is not None
        return places.positions

    @torch.no_grad()
    def _subspace(self, part: str, head: Head, pairs: PromptPairs) -> Subspace:
        layer, number = head
        place = self.anatomy.head_inputs(layer)[part]
        rows = []
        for batch in pairs.batches(BATCH):
            x = place.of(self.model.activations(batch.clean.to(self.model.device), (place.hook,))[place.hook])
            at = self._places(part, batch).to(x.device)
            rows.append(x[torch.arange(len(batch), device=x.device)[:, None], at, number].flatten(0, 1).float())
        vectors = torch.cat(rows)
        mean = vectors.mean(0)
        # All directions, also if there are fewer vectors than these.
        return Subspace(mean, torch.linalg.svd((vectors - mean).double(), full_matrices=len(vectors) < len(mean))[2].to(mean))

    @torch.no_grad()
    def _accuracy(self, part: str, pairs: PromptPairs, subspaces: Sequence[Subspace], rank: int) -> float:
        right = []
        for batch in pairs.batches(BATCH):
            with self._projected(part, batch, subspaces, rank):
                right.append(batch.right(self.model.logits(batch.clean.to(self.model.device)).float()).cpu())
        return float(torch.cat(right).double().mean())

    def _projected(
        self, part: str, pairs: PromptPairs, subspaces: Sequence[Subspace], rank: int
    ) -> AbstractContextManager[None]:
        """Return a context manager in which the heads' vectors are projected; without subspaces nothing is."""
        by_hook: dict[str, Callable[[Tensor], Tensor]] = {}
        places = self._places(part, pairs)
        for layer in sorted({layer for layer, _ in self.heads}) if subspaces else ():
            place = self.anatomy.head_inputs(layer)[part]
            own = [(number, space) for (at, number), space in zip(self.heads, subspaces, strict=True) if at == layer]
            by_hook[place.hook] = partial(_replace, place=place, places=places, own=own, rank=rank)
        return self.model.hooked(by_hook)


def _replace(
    x: Float[Tensor, "pairs positions width"],
    place: HeadInput,
    places: Int[Tensor, "pairs places"],
    own: Sequence[tuple[int, Subspace]],
    rank: int,
) -> Float[Tensor, "pairs positions width"]:
    """Return the tensor at a hook with the vectors of some heads projected."""
    changed = x.clone()
    by_head = place.of(changed)
    rows = torch.arange(len(x), device=x.device)[:, None]
    for number, space in own:
        at = rows, places.to(x.device), number
        by_head[at] = space.project(by_head[at].float(), rank).to(x.dtype)
    return changed


def each_part(
    model: LanguageModel, heads: Sequence[Head], fitted_on: PromptPairs, judged_on: PromptPairs, seed: int = 0
) -> Iterator[RankCurve]:
    """Yield the curves of queries, keys and values."""
    projections = HeadProjections(model, heads, fitted_on, seed)
    for part in PARTS:
        yield projections.curve(part, judged_on)
