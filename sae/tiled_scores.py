"""Tiled scores: the encoder's product computed in tiles, so that selection runs while each tile is in cache.

The product of a batch with all latents is by far the largest tensor of a step, and almost all of it is discarded. Here only one
tile exists at a time, in a buffer that the next tile overwrites. No function here carries gradients.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .batch_selection import SLACK, largest_cells, largest_columns, smallest_of_largest
from .kernels import selection
from .ranks import ALONE, UNDIVIDED, Ranks, Shards, largest_of_all
from .sparse_code import SparseCode, group_by_latent
from .sparse_ops import dots

# Numbers per tile: on a CPU half of a last-level cache (16 MB in float32), on an accelerator enough to amortize kernel
# launches.
TILE_NUMBERS_CPU = 1 << 22
TILE_NUMBERS_ACCELERATOR = 1 << 28
# Products with fewer latents at a time read the inputs too often.
LEAST_WIDTH = 256
# Encoders up to this many numbers stay in cache: their tiles have all latents and some of the tokens.
WHOLE_NUMBERS = 1 << 20
# Tokens sampled to estimate a first cut.
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Scorer:
    """``W x + b`` computed in tiles: by token ``(tokens, width)``, or by latent ``(width, tokens)``."""

    x: Float[Tensor, "tokens d_in"]
    W: Float[Tensor, "n_latents d_in"]
    b: Float[Tensor, " n_latents"] | None
    # Tile shape of another scorer that is iterated in parallel.
    plan: tuple[int, int] | None = None
    # Processes that hold the other tokens of the batch, and the other latents.
    ranks: Ranks = ALONE
    shards: Shards = UNDIVIDED
    # Values added to the scores of its entries, in tiles by token. Samples leave them out.
    plus: SparseCode | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tokens and latents."""
        return len(self.x), len(self.W)

    @property
    def batch_tokens(self) -> int:
        """Number of tokens of all ranks."""
        return len(self.x) * self.ranks.size

    @property
    def all_latents(self) -> int:
        """Number of latents of all shards."""
        return len(self.W) * self.shards.size

    @property
    def selecting(self) -> Ranks:
        """Ranks that choose from the batch together."""
        return self.shards.selecting(self.ranks)

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Tokens and latents per tile: for a small encoder some tokens and all latents, otherwise all tokens, some latents."""
        if self.plan is not None:
            return self.plan
        tokens, n_latents = self.shape
        numbers = TILE_NUMBERS_CPU if self.x.device.type == "cpu" else TILE_NUMBERS_ACCELERATOR
        whole = self.W.numel() <= WHOLE_NUMBERS and n_latents <= numbers
        width = n_latents if whole else max(LEAST_WIDTH, numbers // max(tokens, 1))
        return max(1, min(tokens, numbers // width)), min(width, n_latents)

    @torch.no_grad()
    def tiles(self) -> Iterator["Tile"]:
        """Yield tiles by token; each is valid until the next is requested."""
        height, width = self.tile_shape
        room = torch.empty(height * width, dtype=self.x.dtype, device=self.x.device)
        # Without tokens, one empty tile is still yielded.
        for token in range(0, max(len(self.x), 1), height):
            x = self.x[token : token + height]
            for first in range(0, len(self.W), width):
                rows = self.W[first : first + width]
                scores = room[: len(x) * len(rows)].view(len(x), len(rows))
                if self.b is None:
                    torch.mm(x, rows.T, out=scores)
                else:
                    torch.addmm(self.b[first : first + width], x, rows.T, out=scores)
                self._add_entries_(scores, token, first)
                yield Tile(first, scores, token)

    def _add_entries_(self, scores: Tensor, token: int, first: int) -> None:
        if self.plus is None:
            return
        tokens, latents = self.plus.token_ids() - token, self.plus.latents - first
        inside = (tokens >= 0) & (tokens < scores.shape[0]) & (latents >= 0) & (latents < scores.shape[1])
        cells = tokens[inside] * scores.shape[1] + latents[inside]
        scores.view(-1).index_add_(0, cells, self.plus.values[inside].to(scores.dtype))

    @torch.no_grad()
    def tiles_by_latent(self) -> Iterator["Tile"]:
        """Yield tiles with one row per latent and one column per token."""
        numbers = TILE_NUMBERS_CPU if self.x.device.type == "cpu" else TILE_NUMBERS_ACCELERATOR
        tokens, n_latents = self.shape
        width = min(n_latents, max(LEAST_WIDTH, numbers // max(tokens, 1)))
        room = torch.empty(width * tokens, dtype=self.x.dtype, device=self.x.device)
        for first in range(0, n_latents, width):
            rows, x = self.W[first : first + width], self.x.T
            scores = room[: len(rows) * tokens].view(len(rows), tokens)
            if self.b is None:
                torch.mm(rows, x, out=scores)
            else:
                torch.addmm(self.b[first : first + width, None], rows, x, out=scores)
            yield Tile(first, scores, 0)


@dataclass(frozen=True)
class Tile:
    """Scores of consecutive latents and tokens; ``first`` is the first latent, ``token`` the first token."""

    first: int
    scores: Float[Tensor, "rows columns"]
    token: int


@torch.no_grad()
def largest_per_token(tiles: Iterable[Tile], k: int) -> SparseCode:
    """Return each token's ``k`` largest scores, in arbitrary order; a token with a NaN score gets NaN in its code.

    Tiles of the same tokens must be consecutive.
    """
    done: list[_Kept] = []
    for tile in tiles:
        if not tile.first:
            done.append((_Kept if selection(tile.scores) is None else _KeptByKernel)(tile.scores, k))
        done[-1].take(tile)
    latents, values = torch.cat([kept.latents for kept in done]), torch.cat([kept.values for kept in done])
    return SparseCode.from_rows(latents, values)


class _Kept:
    """Largest scores so far of some tokens, ranked again with every tile."""

    def __init__(self, scores: Tensor, k: int):
        self.k = k
        self.values, self.latents = scores[:, :0], torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)

    def take(self, tile: Tile) -> None:
        best = tile.scores.topk(min(self.k, tile.scores.shape[1]), dim=-1, sorted=False)
        values = torch.cat([self.values, best.values], dim=1)
        latents = torch.cat([self.latents, best.indices + tile.first], dim=1)
        if values.shape[1] > self.k:
            values, places = values.topk(self.k, dim=-1, sorted=False)
            latents = latents.gather(1, places)
        self.values, self.latents = values, latents


class _KeptByKernel(_Kept):
    """Compiled version: each tile is read once and few kept scores change."""

    def __init__(self, scores: Tensor, k: int):
        self.values = scores.new_full((len(scores), k), -torch.inf)
        self.latents = torch.zeros(len(scores), k, dtype=torch.long, device=scores.device)

    def take(self, tile: Tile) -> None:
        kernels = selection(tile.scores)
        assert kernels is not None
        kernels.keep_largest_(tile.scores, tile.first, self.values, self.latents)


@torch.no_grad()
def pick(scorer: Scorer, code: SparseCode) -> Float[Tensor, " nnz"]:
    """Return the scores of a code's entries, computed individually."""
    found = dots(scorer.x, scorer.W, code.latents, code.starts)
    return found if scorer.b is None else found + scorer.b[code.latents]


@torch.no_grad()
def above(tiles: Iterable[Tile], cut: Float[Tensor, "..."], tokens: int, n_latents: int) -> SparseCode:
    """Return all scores that exceed ``cut``, one number or one per latent; latents ascend within a token."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for tile in tiles:
        rows, width = tile.scores.shape
        limit = cut.to(tile.scores.dtype).expand(n_latents)[tile.first : tile.first + width].contiguous()
        kernels = selection(tile.scores, limit)
        if kernels is None:
            token, latent = (tile.scores > limit).nonzero(as_tuple=True)
            counts, values, latents = torch.bincount(token, minlength=rows), tile.scores[token, latent], latent + tile.first
        else:
            counts, values, latents = kernels.above(tile.scores, limit, tile.first)
        every = torch.arange(tile.token, tile.token + rows, device=cut.device)
        found.append((torch.repeat_interleave(every, counts, output_size=len(values)), values, latents))
    token, values, latents = (torch.cat(parts) for parts in zip(*found, strict=True))
    firsts, order = group_by_latent(token, tokens)
    return SparseCode(latents.index_select(0, order), values.index_select(0, order), firsts[:-1])


@torch.no_grad()
def largest_of_batch(scorer: Scorer, budget: int, cut: float | None = None) -> tuple[SparseCode, float | None]:
    """Return the ``budget`` largest scores among all pairs of a batch, and a cut suggested for the next batch.

    The count is exact; ties go to the lower token, then the lower latent. Scores above ``cut``, a guess, are ranked exactly; if
    there are too few, a second guess comes from a sample of tokens, and after that every tile is ranked. The result does not
    depend on the guess. If the batch is spread over ranks, the budget is the whole batch's, and each rank gets its own part:
    they exchange counts only (``ranks.largest_of_all``).
    """
    (tokens, n_latents), ranks = scorer.shape, scorer.selecting
    budget = min(budget, scorer.batch_tokens * scorer.all_latents)
    # A guess requires counting the scores above it, for which an accelerator would have to synchronize.
    guesses = (lambda: cut, lambda: level_of_batch(scorer, budget, SLACK)) if scorer.x.device.type == "cpu" and budget else ()
    for guess in guesses:
        limit = guess()
        if limit is None:
            continue
        pool = above(scorer.tiles(), torch.tensor(limit, dtype=scorer.x.dtype), tokens, n_latents)
        passed = ranks.total(len(pool.values))
        if passed >= budget:
            kept = pool.where(largest_values(pool.values, budget, ranks))
            # Move toward the smallest kept score if far too many pass, and away from it if barely enough do.
            share, smallest = passed / budget, float(smallest_of(kept, ranks))
            move = 0.5 if share > 2 * SLACK - 1 else -0.5 if share < (SLACK + 1) / 2 else 0.0
            return kept, limit + (smallest - limit) * move
    found = _ranked(scorer, min(budget, tokens * n_latents))
    return found if ranks.size == 1 else found.where(largest_values(found.values, budget, ranks)), None


def smallest_of(code: SparseCode, ranks: Ranks) -> Float[Tensor, ""]:
    """Return the smallest value of a code that is spread over ranks; infinity if it is empty."""
    return ranks.least(code.values.amin() if len(code.values) else code.values.new_full((), torch.inf))


def _ranked(scorer: Scorer, budget: int) -> SparseCode:
    """Compute ``largest_of_batch`` without guesses, merging the largest scores tile by tile."""
    tokens, n_latents = len(scorer.x), len(scorer.W)
    values, cells = scorer.x.new_empty(0), torch.empty(0, dtype=torch.long, device=scorer.x.device)
    for tile in scorer.tiles():
        width = tile.scores.shape[1]
        best = largest_cells(tile.scores, budget)
        values = torch.cat([values, tile.scores.reshape(-1)[best]])
        cells = torch.cat([cells, (best // width + tile.token) * n_latents + tile.first + best % width])
        order = cells.argsort()
        order = order[largest_values(values[order], budget, ALONE)] if len(order) > budget else order
        values, cells = values[order], cells[order]
    return SparseCode.from_cells(cells, values, tokens, n_latents)


@torch.no_grad()
def level_of_batch(scorer: Scorer, budget: int, slack: float = 1.0) -> float:
    """Estimate, from some of its tokens, the score that ``slack`` times the budget of a batch exceeds."""
    stride, ranks = max(1, scorer.batch_tokens // SAMPLE_TOKENS), scorer.ranks
    # The same tokens of the batch, however many ranks hold it.
    own = scorer.x[-ranks.rank * len(scorer.x) % stride :: stride]
    some = own if ranks.size == 1 else torch.cat(ranks.gather_rows(own))
    rank = max(1, int(budget * len(some) / scorer.batch_tokens * slack))
    sample = Scorer(some, scorer.W, scorer.b)
    best = torch.cat([t.scores.reshape(-1).topk(min(rank, t.scores.numel()), sorted=False).values for t in sample.tiles()])
    best = torch.cat(scorer.shards.gather(best))
    return float(best.topk(min(rank, len(best)), sorted=False).values.amin())


def largest_values(values: Float[Tensor, " n"], budget: int, ranks: Ranks) -> Tensor:
    """Return a mask of the ``budget`` largest values of all ranks; the first win ties."""
    if ranks.size > 1:
        return largest_of_all(values, budget, ranks)
    smallest = smallest_of_largest(values, budget)
    over, equal = values > smallest, values == smallest
    spare = budget - over.sum()
    return over | (equal & (equal.cumsum(0) <= spare))


@dataclass(frozen=True)
class PerLatent:
    """Entries kept per latent, each latent's smallest kept score, and its number of tokens above a given level, if any."""

    code: SparseCode
    smallest: Float[Tensor, " n_latents"]
    above: Float[Tensor, " n_latents"] | None


@torch.no_grad()
def largest_per_latent(scorer: Scorer, room: Int[Tensor, " n_latents"], level: float | None = None) -> PerLatent:
    """Return each latent's ``room[i]`` largest scores; a room beyond the number of tokens takes every token.

    Latents ascend within a token. The smallest score of a latent with room 0 is infinite. If the batch is spread over ranks,
    rooms are the whole batch's, each rank gets its own part of the code, and the other results are of all ranks; the ranks
    exchange their candidates' scores.
    """
    tokens, ranks = len(scorer.x), scorer.ranks
    # A rank may hold all of a latent's largest scores.
    here = room.clamp(max=tokens)
    values, token, over = [], [], []
    for tile in scorer.tiles_by_latent():
        found = largest_columns(tile.scores, here[tile.first : tile.first + len(tile.scores)])
        values.append(found[0])
        token.append(found[1])
        if level is not None:
            over.append((tile.scores > level).sum(1).float())
    value, place = torch.cat(values), torch.cat(token)
    latents = torch.repeat_interleave(torch.arange(len(room), device=room.device), here, output_size=len(value))
    if ranks.size > 1:
        kept = _largest_of_ranks(value, latents, room, ranks)
        value, place, latents = value[kept], place[kept], latents[kept]
    smallest = value.new_full((len(room),), torch.inf).scatter_reduce_(0, latents, value, "amin")
    firsts, order = group_by_latent(place, tokens)
    code = SparseCode(latents[order], value[order], firsts[:-1])
    return PerLatent(code, ranks.least(smallest), ranks.sum(torch.cat(over)) if over else None)


def _largest_of_ranks(
    values: Float[Tensor, " n"], latents: Int[Tensor, " n"], room: Int[Tensor, " n_latents"], ranks: Ranks
) -> Bool[Tensor, " n"]:
    """Return a mask of the candidates, equally many per latent on every rank, that are their latent's largest of all ranks."""
    everywhere, latent = torch.cat(ranks.gather(values)), latents.repeat(ranks.size)
    # Descending within a latent; stable sorts, so that lower ranks win ties.
    order = everywhere.argsort(descending=True, stable=True)
    order = order[latent[order].argsort(stable=True)]
    counts = torch.bincount(latent, minlength=len(room))
    within = torch.arange(len(latent), device=latent.device) - (counts.cumsum(0) - counts)[latent[order]]
    kept = torch.zeros_like(latent, dtype=torch.bool)
    kept[order] = within < room[latent[order]]
    return kept[ranks.rank * len(values) : (ranks.rank + 1) * len(values)]
