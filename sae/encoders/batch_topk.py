"""BatchTopK: k latents per token on average, distributed over the batch."""

from ..batch_encoder import MutualLevel


class BatchTopK(MutualLevel):
    """Encoder that keeps the ``tokens x k`` largest pre-activations of a batch, then drops the negative ones.

    Eval mode uses a threshold instead of the batch. The paper averages the smallest kept value over batches; here that average
    is used until calibration at the end of training replaces it with an exact threshold. Source: Bussmann, Leask and Nanda
    2024, arXiv:2412.06410.

    Args:
        k: Active latents per token, on average over a batch.
    """

    def __init__(self, k: int):
        super().__init__(k)

    def prefixes(self) -> tuple[int, ...]:
        return ()
