"""BatchTopK: k latents per token on average, shared out over the batch."""

from ..batch_encoder import MutualLevel


class BatchTopK(MutualLevel):
    """Keep the ``tokens x k`` largest pre-activations of the whole batch, then drop the negative ones.

    In eval mode a threshold stands in for the batch. The paper averages the smallest kept value over batches; here that
    average is used until the calibration pass at the end of training puts an exact one in its place.
    Source: Bussmann, Leask and Nanda 2024, arXiv:2412.06410.
    """

    def __init__(self, k: int):
        super().__init__(k)

    def prefixes(self) -> tuple[int, ...]:
        return ()
