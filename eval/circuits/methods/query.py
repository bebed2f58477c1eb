"""Query circuits: the best circuit for one answer to one prompt, among those found on it and on similar prompts.

``NDF = 1 - min(|m(model) - m(circuit)| / |m(model) - m(corrupted)|, 1)``: 1 is the model's own metric on the query, 0 is as far
from it as the corrupted prompt, in either direction.

Choosing the best of several circuits on the query that evaluates them is optimistic. As controls, the best of several random
circuits is chosen in the same way, and the chosen circuits are run on a held-out prompt.

Source: Wu and Barez 2025, arXiv:2509.24808.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..tasks.pairs import PromptPairs
from ..units.passes import Cost
from ..units.ranking import largest
from ..units.space import Space
from .integrated import IntegratedInputs
from .method import Method, UnitScores

N_VARIANTS = 9
# Steps of integrated gradients, as published.
BASE_STEPS = 20
# Sizes, as shares of all units, over which NDF is averaged to choose one ranking.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, eq=False)
class QueryCurves:
    """NDF of circuits by query and size.

    ``single`` is the circuit found on the query itself, ``best`` the best of that size among it and its variants' circuits,
    ``random`` the best of as many random ones. ``winner`` is the index of the best circuit: 0 is the query's own, then the
    variants. ``*_held_out`` are the same circuits on another prompt, with ``best`` and ``random`` still chosen on the query.
    """

    sizes: tuple[int, ...]
    single: Float[Tensor, "queries sizes"]
    best: Float[Tensor, "queries sizes"]
    random: Float[Tensor, "queries sizes"]
    winner: Int[Tensor, "queries sizes"]
    single_held_out: Float[Tensor, "queries sizes"]
    best_held_out: Float[Tensor, "queries sizes"]
    random_held_out: Float[Tensor, "queries sizes"]
    cost: Cost


class QueryCircuits(Method):
    """Query circuit of the first pair: of its own and its variants' scores, the best by NDF on it, averaged over sizes.

    Variants are drawn from the other pairs. ``base`` finds the circuit of a single pair, by default with integrated gradients
    from the embeddings in 20 steps.
    """

    def __init__(
        self,
        base: Method | None = None,
        n_variants: int = N_VARIANTS,
        shares: Sequence[float] = SHARES,
        ranking: str = "signed",
        seed: int = 0,
    ):
        if n_variants < 0:
            raise ValueError(f"n_variants: expected at least 0, got {n_variants}.")
        self.base, self.n_variants, self.shares = base or IntegratedInputs(BASE_STEPS), n_variants, tuple(shares)
        self.ranking, self.seed = ranking, seed

    def discover(self, space: Space, pairs: PromptPairs) -> UnitScores:
        sizes = sorted({max(1, round(share * space.size)) for share in self.shares})
        draw = torch.Generator().manual_seed(self.seed)
        with space.passes.counted() as cost:
            variants = _drawn(variants_of(pairs, 0), self.n_variants, draw)
            values = single_scores(space, pairs.take([0, *variants]), self.base)
            found = torch.stack([deviation(space, pairs.take([0]), largest(values, size, self.ranking)) for size in sizes])
        return UnitScores(values[found.mean(0).argmax()], cost)


def query_circuits(
    space: Space,
    pairs: PromptPairs,
    queries: Sequence[int],
    sizes: Sequence[int],
    base: Method,
    n_variants: int = N_VARIANTS,
    ranking: str = "signed",
    seed: int = 0,
) -> QueryCurves:
    """Compute NDF by size for the best-of-N circuits of some pairs, with controls; units are ablated by resampling.

    Raises:
        ValueError: If a query has no similar pair to hold out.
    """
    draw = torch.Generator().manual_seed(seed)
    columns: dict[str, list[Tensor]] = {}
    with space.passes.counted() as cost:
        for query in queries:
            for name, row in _compare(space, pairs, query, sizes, base, n_variants, ranking, draw).items():
                columns.setdefault(name, []).append(row)
    return QueryCurves(tuple(sizes), cost=cost, **{name: torch.stack(rows) for name, rows in columns.items()})


def _compare(
    space: Space,
    pairs: PromptPairs,
    query: int,
    sizes: Sequence[int],
    base: Method,
    n_variants: int,
    ranking: str,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """Return one query's row of every column, each ``(sizes,)``."""
    alike = _drawn(variants_of(pairs, query), n_variants + 1, draw)
    if not alike:
        raise ValueError(
            f"{pairs.task}: pair {query}: expected another pair with as many answers and foils, to be held out, got none. "
            "Give more pairs."
        )
    held_out, *variants = alike
    values = single_scores(space, pairs.take([query, *variants]), base)
    n = len(values)
    noise = torch.rand(n, space.size, generator=draw).to(values)
    rows: dict[str, list[Tensor]] = {}
    for size in sizes:
        kept = torch.cat([largest(values, size, ranking), largest(noise, size)])
        here, there = (deviation(space, pairs.take([row]), kept) for row in (query, held_out))
        winner, lucky = here[:n].argmax(), n + here[n:].argmax()
        found = {"single": here[0], "best": here[winner], "random": here[lucky], "winner": winner}
        found |= {f"{name}_held_out": there[row] for name, row in (("single", 0), ("best", winner), ("random", lucky))}
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(row).cpu() for name, row in rows.items()}


def single_scores(space: Space, pairs: PromptPairs, base: Method) -> Float[Tensor, "pairs units"]:
    """Return the scores that a method gives on each pair alone."""
    # Methods with per-pair scores treat pairs independently.
    together = base.discover(space, pairs)
    if together.per_pair is not None:
        return together.per_pair
    return torch.stack([base.discover(space, pairs.take([row])).values for row in range(len(pairs))])


def variants_of(pairs: PromptPairs, query: int) -> list[int]:
    """Return the other pairs with as many questions, answers and foils as the query."""

    def asked(row: int) -> list[tuple[int, int]]:
        return [(len(question.answers), len(question.foils)) for question in pairs.questions[row]]

    return [row for row in range(len(pairs)) if row != query and asked(row) == asked(query)]


@torch.no_grad()
def deviation(space: Space, query: PromptPairs, kept: Tensor) -> Float[Tensor, " circuits"]:
    """Return the NDF on one pair of circuits ``(circuits, units)``, all in one pass."""
    copies = query.take([0] * len(kept))
    full = query.measure(space.passes.run(query.clean))
    corrupted, filler = space.see(query.corrupted)
    return ndf(full, copies.measure(space.run(copies.clean, kept, filler)), query.measure(corrupted))


def ndf(full: Tensor, circuit: Float[Tensor, " circuits"], corrupted: Tensor) -> Float[Tensor, " circuits"]:
    """Return normalized deviation faithfulness; if corrupting changes nothing, 1 for no deviation and 0 otherwise."""
    gap, off = (full - corrupted).abs(), (full - circuit).abs()
    return torch.where(gap > 0, 1 - (off / gap.clamp_min(torch.finfo(gap.dtype).tiny)).clamp_max(1), (off == 0).to(off))


def _drawn(rows: list[int], n: int, draw: torch.Generator) -> list[int]:
    order = torch.randperm(len(rows), generator=draw)[:n].tolist()
    return [rows[place] for place in order]
