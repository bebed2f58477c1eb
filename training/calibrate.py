"""Final calibration of a trained dictionary, so that it can encode tokens one at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..sae import SparseDictionary
from .activations.stream import ActivationStream
from .shortfalls import Shortfall, shortfall
from .stages import stage


def finish(dictionary: SparseDictionary, stream: ActivationStream, tokens: int, batch_tokens: int) -> list[Shortfall]:
    """Calibrate thresholds on ``tokens`` training tokens, normalize a free decoder to unit norm and return any shortfall.

    The same dictionary and stream give the same result, so an interrupted calibration is simply repeated.
    """
    # Not the norms of a pursuit: they decide what it selects and how far a step goes.
    if not dictionary.encoder.unit_atoms and not dictionary.encoder.tied:
        dictionary.fold_norms()
    counted = CountedInputs(stream, tokens, batch_tokens, dictionary.device)
    if not dictionary.calibrate(counted):
        return []
    return calibration_shortfall(tokens, counted.seen)


class CountedInputs:
    """Training inputs in batches, shown as a stage whenever they are passed over; ``seen`` counts the tokens of a pass."""

    def __init__(self, stream: ActivationStream, tokens: int, batch_tokens: int, device: torch.device):
        self.stream, self.tokens, self.batch_tokens, self.device = stream, tokens, batch_tokens, device
        self.seen = 0

    def __iter__(self) -> Iterator[Float[Tensor, "tokens d_in"]]:
        self.seen = 0
        with stage("calibration", self.tokens) as shown:
            for x in inputs(self.stream, self.tokens, self.batch_tokens, self.device):
                self.seen += len(x)
                yield x
                shown.update(self.seen)


def calibration_shortfall(tokens: int, have: int) -> list[Shortfall]:
    """Return the shortfall of a calibration on ``tokens`` tokens of which ``have`` are available."""
    return shortfall("calibration_tokens", tokens, have, "tokens", "thresholds are calibrated on all available training tokens")


def inputs(
    stream: ActivationStream, tokens: int, batch_tokens: int, device: torch.device
) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """Yield shuffled training inputs in batches, at most ``tokens`` tokens in total."""
    seen = 0
    while seen < tokens:
        x = stream.sample(min(batch_tokens, tokens - seen), seen).x.to(device)
        if not len(x):
            return
        seen += len(x)
        yield x
