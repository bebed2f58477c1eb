"""Calibration of penalized encoders: thresholds at which they have the target L0 on training tokens."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .dictionary import SparseDictionary
from .encoder import Encoder, scorer
from .penalised import Penalised, cut_for


@torch.no_grad()
def calibrate_cuts(
    encoders: Sequence[Encoder],
    dictionary: SparseDictionary,
    inputs: Iterable[Float[Tensor, "tokens d_in"]],
    together: bool = False,
) -> bool:
    """Shift the thresholds of penalized encoders until raw inputs have the target L0; return False without a target.

    Args:
        encoders: One per block of the dictionary.
        dictionary: Dictionary whose weights the encoders read.
        inputs: Training tokens.
        together: Shift all thresholds by one number, so that all blocks together meet the target.

    Raises:
        ValueError: If there are no tokens.
    """
    penalised = [encoder for encoder in encoders if isinstance(encoder, Penalised)]
    target = penalised[0].target_l0 if penalised else None
    if target is None:
        return False
    blocks, tokens = dictionary.blocks, 0
    pools: list[list[Tensor]] = [[] for _ in blocks]
    for batch in inputs:
        x = dictionary.normalised(batch)
        tokens += len(x)
        for encoder, block, pool in zip(penalised, blocks, pools, strict=True):
            pool.append(encoder.largest_margins(scorer(x[:, block.reads], block.weights), block.weights))
    if not tokens:
        raise ValueError("encoder: expected tokens to calibrate the thresholds on, got none.")
    wanted = round(tokens * target)
    if together:
        moves = [cut_for(torch.cat([part for pool in pools for part in pool]), wanted * len(blocks))] * len(blocks)
    else:
        moves = [cut_for(torch.cat(pool), wanted) for pool in pools]
    for encoder, block, by in zip(penalised, blocks, moves, strict=True):
        encoder.raise_cuts(by, block.weights)
    return True
