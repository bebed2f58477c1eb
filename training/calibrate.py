"""What is done once to a trained dictionary, so that it can be used one token at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..sae import SparseDictionary
from .activations.stream import ActivationStream


def finish(dictionary: SparseDictionary, stream: ActivationStream, tokens: int, batch_tokens: int) -> bool:
    """Calibrate thresholds on up to ``tokens`` training tokens and bring free atoms to unit norm; False if nothing was to do.

    The same dictionary and stream give the same result: an interrupted end of a run is done over.
    """
    changed = not dictionary.encoder.unit_atoms
    if changed:
        dictionary.fold_norms()
    return dictionary.calibrate(inputs(stream, tokens, batch_tokens, dictionary.device)) or changed


def inputs(
    stream: ActivationStream, tokens: int, batch_tokens: int, device: torch.device
) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """Shuffled training tokens, a batch at a time."""
    seen = 0
    while seen < tokens:
        x = stream.sample(min(batch_tokens, tokens - seen), seen).x.to(device)
        if not len(x):
            return
        seen += len(x)
        yield x
