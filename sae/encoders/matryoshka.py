"""Matryoshka BatchTopK: nested dictionaries, each trained to reconstruct on its own."""

import random
from collections.abc import Sequence

from ..batch_encoder import MutualLevel
from ..encoder import require_argument

# Cumulative sums of 1/16, 1/16, 1/8, 1/4, 1/2: the group sizes in the authors' code.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class Matryoshka(MutualLevel):
    """BatchTopK over all latents, with the loss averaged over the reconstructions of prefixes of the dictionary.

    ``shares`` are the prefix widths as fractions of the dictionary, ascending, the last one 1. With ``sampled`` the widths
    between the first and the last are drawn for every batch, so that no latent is at a fixed boundary: ``sampled`` of them,
    uniform in their logarithm. They depend on the run's progress alone, and a resumed run draws the same. Sources: Bussmann et
    al. 2025, arXiv:2503.17547; random widths after Nabeshima 2024, "Matryoshka Sparse Autoencoders", with another distribution.

    Args:
        k: Active latents per token, on average over a batch.
        shares: Widths of the nested dictionaries, as fractions of all latents.
        sampled: Widths drawn for every batch in place of those between the first and the last; 0 keeps ``shares``.
    """

    def __init__(self, k: int, shares: Sequence[float] = SHARES, sampled: int = 0):
        super().__init__(k)
        require_argument("sampled", sampled, 0, fix="0 keeps the shares.")
        self.shares, self.sampled = required_shares(shares), sampled
        if sampled and len(self.shares) == 1:
            raise ValueError(
                f"dictionary.encoder.shares: expected two or more with sampled = {sampled}, which draws between the first "
                f"and the last, got {self.shares}. The shares [0.0625, 1.0] draw them from a sixteenth of all latents on."
            )
        self._n_latents = 0

    def prepare_selection(self, n_latents: int) -> None:
        self._n_latents = n_latents

    def prefixes(self) -> tuple[int, ...]:
        return widths_of(self.shares_now(), self._n_latents * self.n_shards)

    def shares_now(self) -> list[float]:
        """Return the fractions of this batch."""
        if not self.sampled:
            return self.shares
        drawn = random.Random(f"prefixes {self.progress}")
        between = sorted(self.shares[0] ** drawn.random() for _ in range(self.sampled))
        return [self.shares[0], *between, 1.0]


def required_shares(shares: Sequence[float]) -> list[float]:
    """Return the shares as a list.

    Raises:
        ValueError: If they are not ascending, above 0, with 1 as the last.
    """
    found = list(shares)
    if not found or sorted(set(found)) != found or found[0] <= 0 or found[-1] != 1.0:
        raise ValueError(
            f"dictionary.encoder.shares: expected ascending shares above 0, the last one 1, got {found}. "
            "They are cumulative: [0.0625, 0.125, 0.25, 0.5, 1.0]."
        )
    return found


def widths_of(shares: Sequence[float], n_latents: int) -> tuple[int, ...]:
    """Return the widths of nested dictionaries with these shares of the latents."""
    return tuple(max(1, round(share * n_latents)) for share in shares)
