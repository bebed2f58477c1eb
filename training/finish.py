"""What is done once to a trained dictionary, so that it can be used one token at a time."""

from collections.abc import Iterator

import torch

from sae import SparseDictionary
from sae.batch_wide import BatchWide
from sae.encoder import scorer
from sae.scores import Scorer

from .activations.stream import Stream


def finish(dictionary: SparseDictionary, stream: Stream, tokens: int, batch_tokens: int) -> bool:
    """Calibrate thresholds on up to ``tokens`` training tokens and bring free atoms to unit norm; False if nothing was to do.

    The same dictionary and stream give the same result: an interrupted end of a run is done over.
    """
    changed = not dictionary.encoder.unit_atoms
    if changed:
        dictionary.fold_norms()
    if isinstance(dictionary.encoder, BatchWide):
        dictionary.encoder.calibrate(scores(dictionary, stream, tokens, batch_tokens))
        changed = True
    return changed


@torch.no_grad()
def scores(dictionary: SparseDictionary, stream: Stream, tokens: int, batch_tokens: int) -> Iterator[Scorer]:
    """Pre-activations of shuffled training tokens, a batch at a time."""
    seen = 0
    while seen < tokens:
        x = stream.sample(min(batch_tokens, tokens - seen), seen).to(dictionary.W_dec.device)
        if not len(x):
            return
        seen += len(x)
        yield scorer(dictionary.centre(x / dictionary.in_scale), dictionary.weights)
