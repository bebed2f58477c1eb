"""Encoders with thresholds that are calibrated, and those that select over a whole batch in training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .batch_selection import between
from .encoder import Encoder, Weights, require_argument, require_k, scorer, with_gradient
from .sparse_code import AuxTerms, SparseCode
from .tiled_scores import Scorer, above, largest_of_batch, smallest_of

# Averaging window of the running threshold, in batches.
LEVEL_BATCHES = 20
NO_THRESHOLD = "encoder: no threshold is known before the first training batch. Train the dictionary, or load a trained one."


class Calibrated(Encoder, ABC):
    """Base class of encoders whose thresholds of eval mode are calibrated on training tokens at the end of a run."""

    @property
    @abstractmethod
    def has_thresholds(self) -> bool:
        """Return True if these arguments leave thresholds to calibrate."""

    @abstractmethod
    def calibrate_on(self, inputs: Iterable[Float[Tensor, "tokens d_in"]], weights: Weights) -> None:
        """Set the thresholds, so that they keep as many latents of these inputs as training would.

        Args:
            inputs: Normalized, centered inputs in batches. Encoders that select several times pass over them as often.

        Raises:
            ValueError: If there are no tokens.
        """


class BatchWide(Calibrated, ABC):
    """Base class of encoders that keep ``tokens x k`` pairs of a batch in training and apply a threshold in eval mode.

    ``level`` is the running mean of the smallest score among the ``tokens x k`` largest pairs of a batch, ``density`` the
    running fraction of tokens on which each latent is among those pairs. ``calibrate`` replaces running thresholds with exact
    ones.
    """

    level: Float[Tensor, ""]
    density: Float[Tensor, " n_latents"]
    batches: Int[Tensor, ""]

    def __init__(self, k: int):
        super().__init__()
        require_argument("k", k, 1, fix="Set how many latents fire per token on average.")
        self.k = k
        # Half-life of the running densities in tokens, set by the trainer.
        self.density_half_life = 250_000.0

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_out"] | None = None
    ) -> SparseCode:
        scores = scorer(x, weights)
        if not self.training:
            return with_gradient(above(scores.tiles(), self.known_threshold(), *scores.shape), x, weights).relu()
        found = self.select(scores)
        if len(x):
            self._observe(found, scores.batch_tokens)
        code = with_gradient(found.code, x, weights).relu()
        return SparseCode(code.latents, code.values, code.starts, AuxTerms(prefixes=self.prefixes()))

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("density", torch.zeros(n_latents))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.prepare_selection(n_latents)

    @property
    def has_thresholds(self) -> bool:
        return True

    def calibrate_on(self, inputs: Iterable[Float[Tensor, "tokens d_in"]], weights: Weights) -> None:
        self.calibrate(scorer(x, weights) for x in inputs)

    @abstractmethod
    def prepare_selection(self, n_latents: int) -> None:
        """Create the subclass's own per-latent state."""

    @abstractmethod
    def prefixes(self) -> tuple[int, ...]:
        """Return the prefix widths whose reconstructions are trained as well."""

    @abstractmethod
    def select(self, scores: Scorer) -> "Selected":
        """Return the selection of a training batch and its demand for latents."""

    @abstractmethod
    def threshold(self) -> Float[Tensor, "..."] | None:
        """Return the threshold of eval mode, one for all latents or one per latent; ``None`` before the first batch."""

    @abstractmethod
    def calibrate(self, batches: Iterable[Scorer]) -> None:
        """Set the threshold from the scores of many tokens, so that it keeps as many of them as training would.

        Raises:
            ValueError: If there are no tokens.
        """

    def known_threshold(self) -> Float[Tensor, "..."]:
        """Return the threshold of eval mode.

        Raises:
            ValueError: Before the first batch.
        """
        threshold = self.threshold()
        if threshold is None:
            raise ValueError(NO_THRESHOLD)
        return threshold

    @torch.no_grad()
    def _observe(self, found: "Selected", tokens: int) -> None:
        # A plain mean over the first batches, an exponential one afterwards.
        share = 1 / (self.batches.double() + 1)
        if found.level is not None:
            self.level.lerp_(found.level.to(self.level), share.clamp_min(1 / LEVEL_BATCHES).to(self.level))
        if found.demand is not None:
            forgotten = 1 - 0.5 ** (tokens / self.density_half_life)
            self.density.lerp_(found.demand.to(self.density) / tokens, share.clamp_min(forgotten).to(self.density))
        self.batches += 1


@dataclass(frozen=True)
class Selected:
    """Selection of a batch: its code, its level, and the number of tokens on which each latent is above that level.

    ``None`` leaves the running value unchanged.
    """

    code: SparseCode
    level: Float[Tensor, ""] | None
    demand: Float[Tensor, " n_latents"] | None


class MutualLevel(BatchWide, ABC):
    """Base class of batch-wide encoders with one threshold for all latents."""

    def __init__(self, k: int):
        super().__init__(k)
        # Guess of the next batch's level. It saves work without changing results, so it is not saved.
        self._cut: float | None = None

    def prepare_selection(self, n_latents: int) -> None:
        pass

    def select(self, scores: Scorer) -> Selected:
        code, self._cut = largest_of_batch(scores, scores.batch_tokens * self.k, self._cut)
        if not len(scores.x):
            return Selected(code, None, None)
        # Selected entries are those above the level.
        demand = torch.zeros(len(scores.W), device=code.values.device)
        demand.index_add_(0, code.latents, (code.values > 0).float())
        return Selected(code, smallest_of(code, scores.selecting).clamp_min(0).float(), scores.ranks.sum(demand))

    def threshold(self) -> Float[Tensor, "..."] | None:
        return self.level if int(self.batches) else None

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Scorer]) -> None:
        self.level.fill_(level_for(batches, self.k))
        self.batches.clamp_(min=1)


@torch.no_grad()
def level_for(batches: Iterable[Scorer], per_token: int | float) -> float:
    """Return the score that ``per_token`` scores per token exceed, on average over all batches.

    Raises:
        ValueError: If there are no tokens.
    """
    # A pool of twice every batch's budget contains the overall budget unless batches differ wildly.
    pools, tokens = [], 0
    for scores in batches:
        tokens += len(scores.x)
        pools.append(largest_of_batch(scores, math.ceil(2 * len(scores.x) * per_token))[0].values.cpu())
    if not tokens:
        raise ValueError("encoder: expected tokens to calibrate the threshold on, got none.")
    pool = cast(Tensor, torch.cat(pools)).sort(descending=True).values
    return between(pool, round(tokens * per_token))
