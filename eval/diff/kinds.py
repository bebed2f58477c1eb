"""Kinds of latents of two models, by the share of the tuned model in their decoder norms.

The relative norm ``|d_tuned| / (|d_base| + |d_tuned|)`` is near 0 for latents of the base alone, near 1 for those of the tuned
model alone, and near 1/2 for shared ones (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model
Diffing"). The bounds are those of Minder et al. 2025, arXiv:2504.02922. A latent with weight in both models whose two decoder
rows point in different directions is ``rotated``: that is how a concept looks whose effect the tuned model replaces by another.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

KINDS = ("base_only", "shared", "rotated", "tuned_only", "uneven", "dead")
BASE_ONLY, SHARED, ROTATED, TUNED_ONLY, UNEVEN, DEAD = KINDS
EXCLUSIVE = (BASE_ONLY, TUNED_ONLY)
# Latents that write something else in the tuned model.
CHANGED = (BASE_ONLY, TUNED_ONLY, ROTATED)
# Relative norms up to the first and from the last bound are exclusive; those between the middle ones are shared.
BOUNDS = (0.1, 0.4, 0.6, 0.9)
# Largest cosine of the decoder rows of a rotated latent.
ROTATED_BELOW = 0.8
# Histogram bins of relative norms.
BINS = 40


def kinds_of(
    relative: Float[Tensor, " n_latents"],
    firings: Int[Tensor, " n_latents"],
    cosines: Float[Tensor, " n_latents"] | None = None,
) -> list[str]:
    """Return the kind of every latent from its relative norm; those that fire on no token are dead.

    >>> kinds_of(torch.tensor([0.02, 0.5, 0.97, 0.75, 1.0]), torch.tensor([3, 9, 1, 4, 0]))
    ['base_only', 'shared', 'tuned_only', 'uneven', 'dead']

    Args:
        cosines: Cosine between the two decoder rows of each latent; ``None`` if the models differ in width.
    """
    low, middle, upper, high = BOUNDS
    rotated = [False] * len(relative) if cosines is None else (cosines < ROTATED_BELOW).tolist()
    names = []
    for value, count, turned in zip(relative.tolist(), firings.tolist(), rotated, strict=True):
        if not count:
            names.append(DEAD)
        elif value <= low or value >= high:
            names.append(BASE_ONLY if value <= low else TUNED_ONLY)
        elif turned:
            names.append(ROTATED)
        else:
            names.append(SHARED if middle <= value <= upper else UNEVEN)
    return names


def of_kinds(kinds: list[str], *wanted: str) -> Bool[Tensor, " n_latents"]:
    """Return a mask of the latents of some kinds."""
    return torch.tensor([kind in wanted for kind in kinds])


def decoder_cosines(base: Float[Tensor, "n_latents d"], tuned: Float[Tensor, "n_latents d"]) -> Float[Tensor, " n_latents"]:
    """Return the cosine between the two decoder rows of every latent; 0 where one of them is 0."""
    return F.cosine_similarity(base, tuned, dim=-1)


def histogram(values: Float[Tensor, " n"]) -> list[int]:
    """Return the counts of values from 0 to 1 in ``BINS`` equal bins.

    >>> sum(histogram(torch.tensor([0.0, 0.5, 1.0])))
    3
    """
    return torch.histc(values.float(), BINS, 0.0, 1.0).int().tolist()
