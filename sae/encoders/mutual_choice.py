"""Mutual choice: the matches of a batch go to its largest affinities, whatever tokens and latents they belong to."""

from ..batch_encoder import MutualLevel


class MutualChoice(MutualLevel):
    """Keep the ``tokens x k`` largest pre-activations of the whole batch, then drop the negative ones.

    The count is exact and ties go to the lower token, then the lower latent. In eval mode one threshold for all latents
    stands in for the batch; a calibration pass at the end of training sets it. Selection is that of BatchTopK; what the
    paper adds is the auxiliary loss (``aux_zipf_tau`` in a recipe) and feature choice as a second phase.
    Source: Ayonrinde 2024, arXiv:2411.02124.
    """

    def __init__(self, k: int):
        super().__init__(k)

    def prefixes(self) -> tuple[int, ...]:
        return ()
