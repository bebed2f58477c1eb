"""Approximate top-k: a coarse int8 product finds candidate latents, and an exact one ranks only these."""

import logging
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from .break_even import break_even
from .kernels import selection
from .sparse_code import SparseCode
from .tiled_scores import Scorer, Tile, largest_per_token, pick

log = logging.getLogger(__name__)

# Candidates per latent to be selected. If recall is too low, selection moves to the next factor, and after the last to exact
# selection.
CANDIDATES = (2, 4)
# Batches between two measurements of recall, and tokens per measurement: they cost an exact selection.
MEASURE_EVERY = 50
MEASURE_TOKENS = 128
LEVELS = 127
# Scores are divided by the token's scale. For a token of zeros only biases remain, and they must stay finite.
LEAST_SCALE = 1e-30
# Tokens, width and latents of the products that are timed.
TIMED = (256, 768, 1024)
# Share that stands for products that take equally long.
EQUALLY_FAST = 0.25


class Screen:
    """Approximate ``largest_per_token``: an int8 product selects more candidates than needed, which are then ranked exactly.

    Inputs and encoder rows are rounded to 127 levels of their largest entry. ``recall``, the fraction of the truly largest
    positive scores that are found, is measured on random tokens of every 50th batch; the first tokens of a batch could all be
    from one document or one context position. If it is below ``floor``, the number of candidates is raised, and finally
    selection becomes exact for the rest of the run.

    Args:
        if_faster: Select exactly where int8 products are not clearly faster than those of the inputs' precision, measured
            once: on CPUs without instructions for them (AVX2 alone) they take more than twenty times as long.
    """

    def __init__(self, kind: Literal["int8"], floor: float, device: torch.device | str = "cpu", if_faster: bool = False):
        self.kind, self.floor, self.if_faster = kind, floor, if_faster
        self.recall = torch.ones((), device=device)
        self.batches = 0
        # Index into CANDIDATES; past its end the selection is exact.
        self.stage = 0

    def state(self) -> dict[str, Tensor]:
        """Return the state needed to resume training."""
        return {"recall": self.recall, "batches": torch.tensor(self.batches), "stage": torch.tensor(self.stage)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.recall = state["recall"].to(self.recall.device)
        self.batches, self.stage = int(state["batches"]), int(state["stage"])

    @torch.no_grad()
    def largest_per_token(self, scorer: Scorer, k: int) -> SparseCode:
        """Return each token's ``k`` largest scores, except those the coarse product misses; values are exact."""
        self.batches += 1
        if self.if_faster and not int8_is_faster(scorer.W):
            if self.batches == 1:
                log.warning("screen: int8 products are slow on this device, so selection is exact. Leave out screen.")
            return largest_per_token(scorer.tiles(), k)
        if self.stage == len(CANDIDATES) or CANDIDATES[self.stage] * k >= len(scorer.W) or not can_multiply(scorer):
            self.recall = torch.ones_like(self.recall)
            return largest_per_token(scorer.tiles(), k)
        found = self.screened(scorer, k)
        if self.batches % MEASURE_EVERY == 1:
            self._measure(scorer, found, k)
        return found

    def screened(self, scorer: Scorer, k: int) -> SparseCode:
        """Return the ``k`` largest scores among the candidates."""
        tokens, count = len(scorer.x), CANDIDATES[self.stage] * k
        candidates = largest_per_token(coarse_tiles(scorer), count)
        # Candidates from NaN or infinite coarse scores are meaningless.
        exact = pick(scorer, candidates).where(candidates.values.isfinite(), torch.nan).view(tokens, count)
        best = largest_per_token([Tile(0, exact, 0)], k)
        latents = candidates.latents.view(tokens, count).gather(1, best.latents.view(tokens, k))
        return SparseCode.from_rows(latents, best.values.view(tokens, k))

    def _measure(self, scorer: Scorer, found: SparseCode, k: int) -> None:
        # Seeded by the batch number, so that a resumed run draws the same tokens and the run's own random numbers are
        # unaffected.
        order = torch.randperm(len(scorer.x), generator=torch.Generator().manual_seed(self.batches))
        chosen = order[:MEASURE_TOKENS].to(scorer.x.device)
        some = Scorer(scorer.x[chosen], scorer.W, scorer.b)
        tokens = len(chosen)
        exact = largest_per_token(some.tiles(), k)
        wanted, have = exact.latents.view(tokens, k, 1), found.latents.view(-1, 1, k)[chosen]
        counts = exact.values.view(tokens, k) > 0
        hits = (wanted == have).any(-1) & counts
        self.recall = hits.sum() / counts.sum().clamp_min(1) if bool(counts.any()) else torch.ones_like(self.recall)
        if float(self.recall) < self.floor:
            self.stage += 1
            then = "exact selection" if self.stage == len(CANDIDATES) else f"{CANDIDATES[self.stage]} candidates each"
            log.warning("screen: recall %.4f is below screen_floor %.4f; from now on %s.", float(self.recall), self.floor, then)


def int8_is_faster(W: Tensor) -> bool:
    """Return True if an int8 product takes about two thirds of the time or less of one in the precision of ``W``."""
    tokens, d, n_latents = TIMED
    name = f"int8 product, {W.device}, {W.dtype}, {torch.get_num_threads()} threads"

    def trial() -> tuple[Callable[[], object], Callable[[], object], float]:
        x, rows = (torch.ones(n, d, dtype=W.dtype, device=W.device) for n in (tokens, n_latents))
        coarse_x, coarse_rows = x.to(torch.int8), rows.to(torch.int8)
        sums = torch.empty(tokens, n_latents, dtype=torch.int32, device=W.device)

        def in_int8() -> Tensor:
            return torch._int_mm(coarse_x, coarse_rows.T, out=sums)  # pyright: ignore[reportPrivateImportUsage]

        return in_int8, lambda: x @ rows.T, EQUALLY_FAST

    # Shares are rounded to powers of two: the next one begins where the product is 1.4 times as fast.
    return break_even(name, trial, W.device) > EQUALLY_FAST


def can_multiply(scorer: Scorer) -> bool:
    """Return True if torch has an int8 product for these sizes: on GPUs, multiples of 8 and more than 16 tokens."""
    (tokens, n_latents), d = scorer.shape, scorer.x.shape[1]
    return scorer.x.device.type == "cpu" or (tokens > 16 and n_latents % 8 == 0 and d % 8 == 0)


def coarse_tiles(scorer: Scorer) -> Iterator[Tile]:
    """Yield tiles of int8-precision scores, divided by a scale per token and therefore valid for ranking only."""
    n_latents, (height, width) = len(scorer.W), scorer.tile_shape
    b = scorer.W.new_zeros(n_latents) if scorer.b is None else scorer.b
    kernels = selection(scorer.W)
    sums = torch.empty(height * width, dtype=torch.int32, device=scorer.x.device)
    scores = torch.empty(height * width, dtype=scorer.x.dtype, device=scorer.x.device)
    # If one tile has all latents, they are quantized once instead of once per tile of tokens.
    whole = quantize(scorer.W) if width == n_latents else None
    for token in range(0, max(len(scorer.x), 1), height):
        x, x_scale = quantize(scorer.x[token : token + height])
        for first in range(0, n_latents, width):
            rows, scale = whole or quantize(scorer.W[first : first + width])
            product = sums[: len(x) * len(rows)].view(len(x), len(rows))
            coarse, shift = scores[: product.numel()].view(product.shape), b[first : first + width]
            torch._int_mm(x, rows.T, out=product)  # pyright: ignore[reportPrivateImportUsage] - int8 has no public product
            if kernels is None:
                torch.mul(product, scale, out=coarse).addcdiv_(shift.expand_as(coarse), x_scale[:, None])
            else:
                kernels.rescale_(product, scale, x_scale, shift, coarse)
            yield Tile(first, coarse, token)


def quantize(rows: Float[Tensor, "rows d"]) -> tuple[Int8[Tensor, "rows d"], Float[Tensor, " rows"]]:
    """Return int8 rows and each row's scale, which multiplies them back to the original up to rounding."""
    kernels = selection(rows)
    if kernels is not None:
        return kernels.quantize(rows, LEVELS, LEAST_SCALE)
    scale = (rows.abs().amax(1) / LEVELS).clamp_min(LEAST_SCALE)
    # In low precision the scale itself is rounded, and the largest entry may become 128, which int8 cannot hold.
    return (rows / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale
