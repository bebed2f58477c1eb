"""Sanity checks that a loaded dictionary matches the activations it is applied to (right hook, normalization and scale)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..sae.dictionary import SparseDictionary
from ..sae.metrics import RunningFvu, dead_fraction

ROWS_AT_ONCE = 4096
# Values outside these bounds point to a loading error or wrong activations, not to poor training.
WORST_FVU = 0.9
NORM_RATIOS = (0.5, 1.5)
# Published dictionaries fire tens to hundreds of their thousands of latents.
MOST_DENSE = 0.25
OFF_BY = 3.0


@dataclass(frozen=True)
class Sanity:
    """Reconstruction figures on some activations: ``fvu`` about their mean, ``norm_ratio`` of output to target norms."""

    tokens: int
    l0: float
    fvu: float
    cosine: float
    norm_ratio: float
    dead_fraction: float
    warnings: tuple[str, ...]


@torch.no_grad()
def sanity(
    dictionary: SparseDictionary,
    x: Float[Tensor, "tokens d_in"],
    y: Float[Tensor, "tokens d_out"] | None = None,
    published_l0: int | float | None = None,
) -> Sanity:
    """Evaluate a dictionary on raw activations, with warnings about suspicious figures.

    Args:
        x: Inputs. Leave out the first tokens of contexts, whose norms dominate all others.
        y: Targets of a transcoder.
        published_l0: The l0 stated by a model card or folder name.

    Raises:
        ValueError: If there are fewer than two tokens, all are equal, or a transcoder has no targets.
    """
    if y is None and dictionary.arguments()["kind"] != "sae":
        raise ValueError("y: expected the transcoder's targets, got none.")
    y = x if y is None else y
    if len(x) < 2:
        raise ValueError(f"x: expected at least 2 tokens, got {len(x)}.")
    cosine = ratio = l0 = 0.0
    error = RunningFvu(y.shape[1], y.device)
    firings = torch.zeros(dictionary.n_latents, dtype=torch.long, device=x.device)
    for some, target in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
        code = dictionary.encode(some)
        guess = dictionary.decode(code, some)
        error.update(target, guess)
        cosine += float(torch.nn.functional.cosine_similarity(guess, target, dim=1).sum())
        ratio += float((guess.norm(dim=1) / target.norm(dim=1).clamp_min(1e-12)).sum())
        l0 += float(code.l0().sum())
        firings += code.firings(dictionary.n_latents)
    tokens, fvu = len(x), float(error.value())
    found = Sanity(tokens, l0 / tokens, fvu, cosine / tokens, ratio / tokens, dead_fraction(firings), ())
    return Sanity(**{**vars(found), "warnings": tuple(sanity_doubts(found, dictionary.n_latents, published_l0))})


def sanity_doubts(s: Sanity, n_latents: int, published_l0: int | float | None = None) -> list[str]:
    """Return warnings about hook, normalization and scale that the figures suggest."""
    doubts = []
    if not s.fvu < 1:
        doubts.append(
            f"fvu {s.fvu:.3g}: worse than the mean of the activations. Wrong hook, wrong normalisation or wrong scale"
        )
    elif s.fvu > WORST_FVU:
        doubts.append(f"fvu {s.fvu:.3g}: hardly better than the mean of the activations. Wrong hook, model or normalisation")
    if not NORM_RATIOS[0] < s.norm_ratio < NORM_RATIOS[1]:
        doubts.append(f"outputs are {s.norm_ratio:.3g} times as long as they should be: a scale is missing, or there twice")
    if s.l0 == 0:
        doubts.append("no latent fires: thresholds or biases are in other units than these activations")
    elif s.l0 > MOST_DENSE * n_latents:
        doubts.append(
            f"l0 {s.l0:.4g} of {n_latents} latents: a topk or threshold is missing, or the activations are not its own"
        )
    if published_l0 and not 1 / OFF_BY < s.l0 / published_l0 < OFF_BY:
        doubts.append(
            f"l0 {s.l0:.4g} where {published_l0:.4g} is published: a bias, scale or threshold is taken in other units"
        )
    return doubts
