"""Mutual choice: a batch's matches go to its largest affinities, with no fixed number per token or latent."""

from ..batch_encoder import MutualLevel


class MutualChoice(MutualLevel):
    """Encoder that keeps the ``tokens x k`` largest pre-activations of a batch, then drops the negative ones.

    The count is exact; ties go to the lower token, then the lower latent. Eval mode uses one threshold for all latents instead
    of the batch, set by calibration at the end of training. Selection is that of BatchTopK; the paper adds the auxiliary loss
    (``aux_zipf_tau`` in a recipe) and feature choice as a second phase. Source: Ayonrinde 2024, arXiv:2411.02124.

    Args:
        k: Active latents per token, on average over a batch.
    """

    def __init__(self, k: int):
        super().__init__(k)

    def prefixes(self) -> tuple[int, ...]:
        return ()
