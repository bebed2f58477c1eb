"""Feature choice: every latent selects its own number of tokens, so that no latent stays unused."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batch_encoder import LEVEL_BATCHES, BatchWide, Selected
from ..batch_selection import between
from ..encoder import require_argument
from ..sparse_code import SparseCode
from ..tiled_scores import Scorer, largest_per_latent, level_of_batch
from ..zipf import fit_zipf, integer_budgets, zipf

# Damping of rank changes: a latent keeps half of its log budget.
HYSTERESIS = 0.5
# Batches between two measurements of every latent's demand.
DEMAND_EVERY = 8


class FeatureChoice(BatchWide):
    """Encoder that keeps, per latent ``i``, its ``m_i`` strongest tokens of a batch; the ``m_i`` sum to ``tokens x k``.

    ``budget: uniform`` gives every latent the same ``m``; ``zipf`` gives the latent of rank ``r`` the share that a
    Zipf-Mandelbrot law, fitted to measured densities, predicts for rank ``r``. These are the densities that mutual choice would
    produce: the fraction of tokens on which a latent is above the common level. They come from the preceding training phase if
    there is one; otherwise budgets are uniform for the first ``rerank_every`` batches. Ranks are updated from demand every
    ``rerank_every`` batches.

    In eval mode every latent has its own threshold; calibration at the end of training sets it to the value that ``m_i /
    tokens`` of the tokens exceed. Budgets count selected pairs; a pair with a pre-activation of at most 0 does not fire.

    The paper does not specify the schedule. On the embedded model (k 16, a million tokens, seed 0) mutual choice alone ended at
    FVU 0.028, and feature choice over the last fifth of the run at 0.033 with no dead latents; starting at 30 or 50 % of the
    run, re-ranking every 50 batches, or fitting the law to measured densities all stayed within 4 % of that. A batch of 2048
    tokens does not contain exactly each latent's share of tokens, but the budget enforces it; thresholds do not, and
    reconstruct 5 % better. Source: Ayonrinde 2024, arXiv:2411.02124.

    Args:
        k: Active latents per token, on average over a batch.
        budget: Distribution of the budget over latents.
        rerank_every: Training batches between two updates of the ranks.
    """

    undivided = "its budgets follow the rank of every latent among all"
    thresholds: Float[Tensor, " n_latents"]
    rank: Int[Tensor, " n_latents"]
    law: Float[Tensor, "2"]
    ranked_at: Int[Tensor, ""]
    batch_tokens: Int[Tensor, ""]
    own_batches: Int[Tensor, ""]

    def __init__(self, k: int, budget: Literal["zipf", "uniform"] = "zipf", rerank_every: int = 1000):
        super().__init__(k)
        require_argument("rerank_every", rerank_every, 1, fix="It counts batches.")
        self.budget, self.rerank_every = budget, rerank_every

    def prepare_selection(self, n_latents: int) -> None:
        self.smallest_batch = -(-n_latents // self.k)
        self.register_buffer("thresholds", torch.zeros(n_latents))
        self.register_buffer("rank", torch.arange(n_latents))
        self.register_buffer("law", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("ranked_at", torch.full((), -1))
        # Batches seen since feature choice began; the preceding phase says nothing about per-latent thresholds.
        self.register_buffer("own_batches", torch.zeros((), dtype=torch.long))
        # Size of the last training batch: a budget of m corresponds to a density of m / batch_tokens.
        self.register_buffer("batch_tokens", torch.full((), self.smallest_batch))

    def prefixes(self) -> tuple[int, ...]:
        return ()

    def threshold(self) -> Float[Tensor, "..."] | None:
        return self.thresholds if int(self.own_batches) else None

    def select(self, scores: Scorer) -> Selected:
        tokens, n_latents = scores.batch_tokens, len(scores.W)
        if tokens == 0:
            none = torch.empty(0, dtype=torch.long, device=scores.x.device)
            return Selected(SparseCode(none, scores.x.new_empty(0), none), None, None)
        if self.budget == "zipf":
            # Also at the first batch, if the preceding phase has measured densities.
            due = int(self.batches) if int(self.ranked_at) < 0 else int(self.batches - self.ranked_at) >= self.rerank_every
            if due:
                self.rerank()
            elif int(self.ranked_at) < 0:
                self.ranked_at.zero_()
        # Measuring demand reads all scores once more, and demand changes slowly.
        counts = int(self.own_batches) % DEMAND_EVERY == 0
        level = max(level_of_batch(scores, tokens * self.k), 0.0) if counts else None
        found = largest_per_latent(scores, self.budgets(tokens, n_latents), level)
        self.batch_tokens.fill_(tokens)
        self.own_batches += 1
        share = (1 / self.own_batches.double()).clamp_min(1 / LEVEL_BATCHES)
        self.thresholds.lerp_(found.smallest.clamp_min(0).to(self.thresholds), share.to(self.thresholds))
        return Selected(found.code, None if level is None else torch.tensor(level), found.above)

    def budgets(self, tokens: int, n_latents: int) -> Int[Tensor, " n_latents"]:
        """Return each latent's number of matches among ``tokens`` tokens.

        Raises:
            ValueError: If there are fewer matches than latents.
        """
        if tokens * self.k < n_latents:
            raise ValueError(
                f"batch_tokens: expected at least one match per latent, got {tokens} tokens x k {self.k} = {tokens * self.k} "
                f"matches for {n_latents} latents. Set batch_tokens to at least {-(-n_latents // self.k)}, or raise k."
            )
        return _budgets_by_rank(n_latents, *self.law.tolist(), tokens * self.k, tokens).to(self.rank.device)[self.rank]

    @torch.no_grad()
    def rerank(self) -> None:
        """Fit the law once, to the first measured densities, and move the ranks toward the current densities."""
        first = not bool(self.law.any())
        if first:
            self.law.copy_(torch.tensor(fit_zipf(self.density), dtype=torch.float64))
        expected = zipf(len(self.density), *self.law.tolist()).to(self.density)[self.rank]
        # Clamped because log(0) is undefined; latents that never fire rank last.
        demand = self.density.double().clamp_min(1e-12).log()
        wanted = demand if first else (1 - HYSTERESIS) * demand + HYSTERESIS * expected.double().log()
        order = wanted.argsort(descending=True, stable=True)
        self.rank[order] = torch.arange(len(order), device=order.device)
        self.ranked_at.copy_(self.batches)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Scorer]) -> None:
        n_latents = self.density.shape[0]
        latents, values, tokens = [], [], 0
        rates = self.budgets(int(self.batch_tokens), n_latents).double() / int(self.batch_tokens)
        for scores in batches:
            here = len(scores.x)
            tokens += here
            # Twice a latent's share of every batch covers its overall share, unless its tokens are concentrated in one batch.
            room = (2 * rates * here).ceil().long() + 8
            code = largest_per_latent(scores, room).code
            latents.append(code.latents.cpu())
            values.append(code.values.cpu())
        if not tokens:
            raise ValueError("encoder: expected tokens to calibrate the thresholds on, got none.")
        counts = (rates.cpu() * tokens).round().long()
        latent, value = torch.cat(latents), torch.cat(values)
        # Descending by value within each latent: two stable sorts.
        by_value = value.argsort(descending=True)
        order = by_value[latent[by_value].argsort(stable=True)]
        pools = value[order].split(torch.bincount(latent, minlength=n_latents).tolist())
        found = [between(pool, int(count)) for pool, count in zip(pools, counts, strict=True)]
        self.thresholds.copy_(torch.tensor(found))
        self.own_batches.clamp_(min=1)


@lru_cache(maxsize=8)
def _budgets_by_rank(n_latents: int, alpha: float, shift: float, total: int, most: int) -> Int[Tensor, " n_latents"]:
    """Return cached budgets by rank: they change only with the law and the batch size, and take milliseconds to compute."""
    return integer_budgets(zipf(n_latents, alpha, shift), total, most)
