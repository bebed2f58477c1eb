"""BatchWide: encoders that spend their matches over a whole batch in training and by threshold afterwards."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .allocation import between, largest_cells
from .code import Requests, SparseCode
from .encoder import Encoder, Weights, affinities, require_argument, require_k, with_gradient

# The running threshold looks back over about so many batches.
LEVEL_BATCHES = 20
# Densities forget half of what they knew after so many tokens.
DENSITY_HALF_LIFE = 1_000_000


class BatchWide(Encoder, ABC):
    """Keeps ``tokens x k`` pairs of a batch in training; in eval mode whatever exceeds a threshold.

    ``level`` is the running mean of the smallest score that the largest ``tokens x k`` pairs of a batch contain, ``density``
    the share of tokens on which each latent is among those pairs. ``calibrate`` replaces the running figures by exact ones.
    """

    level: Float[Tensor, ""]
    density: Float[Tensor, " n_latents"]
    batches: Int[Tensor, ""]

    def __init__(self, k: int):
        super().__init__()
        require_argument("k", k, 1, fix="Set how many latents fire per token on average.")
        self.k = k

    def forward(
        self, x: Float[Tensor, "tokens d_in"], weights: Weights, grad: Float[Tensor, "tokens d_in"] | None = None
    ) -> SparseCode:
        found = affinities(x, weights)
        if self.training:
            cells = self.select(found)
            if len(x):
                self._observe(found, cells)
        else:
            cells = self._exceeding(found)
        code = SparseCode.from_cells(cells, found.reshape(-1).gather(0, cells), *found.shape)
        code = with_gradient(code, x, weights).relu()
        if not self.training:
            return code
        return SparseCode(code.latents, code.values, code.starts, Requests(prefixes=self.prefixes()))

    def prepare(self, n_latents: int) -> None:
        require_k(self.k, n_latents)
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("density", torch.zeros(n_latents))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.prepare_selection(n_latents)

    @abstractmethod
    def prepare_selection(self, n_latents: int) -> None:
        """Create what the variant itself keeps per latent."""

    @abstractmethod
    def prefixes(self) -> tuple[int, ...]:
        """Widths whose reconstructions are trained as well."""

    @abstractmethod
    def select(self, scores: Float[Tensor, "tokens n_latents"]) -> Int[Tensor, " nnz"]:
        """The cells that a training batch keeps, ascending."""

    @abstractmethod
    def threshold(self) -> Float[Tensor, "..."] | None:
        """What a score must exceed in eval mode: one number, or one per latent; ``None`` before the first batch."""

    @abstractmethod
    def calibrate(self, batches: Iterable[Float[Tensor, "tokens n_latents"]]) -> None:
        """Set the threshold from the scores of many tokens, so that it keeps as much of them as training would.

        Raises:
            ValueError: If there is no token.
        """

    def _exceeding(self, scores: Float[Tensor, "tokens n_latents"]) -> Int[Tensor, " nnz"]:
        threshold = self.threshold()
        if threshold is None:
            raise ValueError(
                "encoder: no threshold is known before the first training batch. Train the dictionary, or load a trained one."
            )
        return (scores > threshold).reshape(-1).nonzero().squeeze(-1)

    @abstractmethod
    def demand(
        self, scores: Float[Tensor, "tokens n_latents"], cells: Int[Tensor, " nnz"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " n_latents"] | None]:
        """The batch's level, and how many tokens each latent has above it; ``None`` to leave the density as it is.

        ``cells`` are those that ``select`` chose.
        """

    @torch.no_grad()
    def _observe(self, scores: Float[Tensor, "tokens n_latents"], cells: Int[Tensor, " nnz"]) -> None:
        """Move level and density towards what this batch shows."""
        tokens = scores.shape[0]
        level, counts = self.demand(scores, cells)
        # Early on a plain mean: the first batches are all there is.
        share = 1 / (self.batches.double() + 1)
        self.level.lerp_(level.to(self.level), share.clamp_min(1 / LEVEL_BATCHES).to(self.level))
        if counts is not None:
            forgotten = 1 - 0.5 ** (tokens / DENSITY_HALF_LIFE)
            self.density.lerp_(counts.to(self.density) / tokens, share.clamp_min(forgotten).to(self.density))
        self.batches += 1


class MutualLevel(BatchWide, ABC):
    """The batch-wide encoders for which one threshold serves all latents."""

    def prepare_selection(self, n_latents: int) -> None:
        pass

    def select(self, scores: Float[Tensor, "tokens n_latents"]) -> Int[Tensor, " nnz"]:
        return largest_cells(scores, scores.shape[0] * self.k)

    def demand(
        self, scores: Float[Tensor, "tokens n_latents"], cells: Int[Tensor, " nnz"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " n_latents"] | None]:
        # What was chosen is what is above the level.
        kept = scores.reshape(-1)[cells]
        counts = torch.bincount(cells[kept > 0] % scores.shape[1], minlength=scores.shape[1])
        return kept.amin().clamp_min(0).float(), counts.float()

    def threshold(self) -> Float[Tensor, "..."] | None:
        return self.level if int(self.batches) else None

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "tokens n_latents"]]) -> None:
        # Twice the budget of every batch is certain to hold the budget of all of them unless batches differ wildly.
        pools, tokens = [], 0
        for scores in batches:
            tokens += scores.shape[0]
            pools.append(scores.reshape(-1)[largest_cells(scores, 2 * scores.shape[0] * self.k)].cpu())
        if not tokens:
            raise ValueError("encoder: expected tokens to calibrate the threshold on, got none.")
        pool = cast(Tensor, torch.cat(pools)).sort(descending=True).values
        self.level.fill_(between(pool, tokens * self.k))
        self.batches.clamp_(min=1)
