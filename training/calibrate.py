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
    if not dictionary.encoder.unit_atoms:
        dictionary.fold_norms()
    seen = 0

    def counted() -> Iterator[Float[Tensor, "tokens d_in"]]:
        # The generator starts only if the encoder has something to calibrate.
        nonlocal seen
        with stage("calibration", tokens) as shown:
            for x in inputs(stream, tokens, batch_tokens, dictionary.device):
                seen += len(x)
                yield x
                shown.update(seen)

    if not dictionary.calibrate(counted()):
        return []
    return calibration_shortfall(tokens, seen)


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
