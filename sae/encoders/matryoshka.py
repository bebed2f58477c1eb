"""Matryoshka BatchTopK: nested dictionaries, each trained to reconstruct on its own."""

from collections.abc import Sequence

from ..batch_encoder import MutualLevel

# Cumulative sums of 1/16, 1/16, 1/8, 1/4, 1/2: the group sizes in the authors' code.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class Matryoshka(MutualLevel):
    """BatchTopK over all latents, with the loss averaged over the reconstructions of prefixes of the dictionary.

    ``shares`` are the prefix widths as fractions of the dictionary, ascending, the last one 1. Source: Bussmann et al. 2025,
    arXiv:2503.17547.

    Args:
        k: Active latents per token, on average over a batch.
        shares: Widths of the nested dictionaries, as fractions of all latents.
    """

    def __init__(self, k: int, shares: Sequence[float] = SHARES):
        super().__init__(k)
        self.shares = list(shares)
        if not self.shares or sorted(set(self.shares)) != self.shares or self.shares[0] <= 0 or self.shares[-1] != 1.0:
            raise ValueError(
                f"dictionary.encoder.shares: expected ascending shares above 0, the last one 1, got {self.shares}. "
                "They are cumulative: [0.0625, 0.125, 0.25, 0.5, 1.0]."
            )
        self._n_latents = 0

    def prepare_selection(self, n_latents: int) -> None:
        self._n_latents = n_latents

    def prefixes(self) -> tuple[int, ...]:
        return tuple(max(1, round(share * self._n_latents * self.n_shards)) for share in self.shares)
