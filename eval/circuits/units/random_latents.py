"""Dictionaries of random atoms that fire as often as trained ones: what circuits owe to what was learned."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ....sae import SAE
from ....sae.batch_encoder import MutualLevel
from ....sae.batch_selection import between
from ....sae.dictionary import OneSiteDictionary
from ....sae.encoder import Encoder, scorer
from ....sae.encoders.feature_choice import FeatureChoice
from ....sae.encoders.gated import Gated
from ....sae.encoders.gradient_topk import GradientTopK
from ....sae.encoders.group_max import GroupMax
from ....sae.encoders.jumprelu import PACE, JumpReLU
from ....sae.encoders.matching_pursuit import MatchingPursuit
from ....sae.encoders.relu import ReLU
from ....sae.encoders.residual_pursuit import ResidualPursuit
from ....sae.encoders.signed_topk import SignedTopK
from ....sae.encoders.threshold import Threshold
from ....sae.encoders.topk import TopK
from ....sae.tiled_scores import Scorer, largest_of_batch, largest_per_latent

# A threshold that is kept as a logarithm cannot be 0.
TINY = 1e-6
# By how much a latent that fires everywhere clears its threshold, in normalised units.
MARGIN = 1e-3


# These choose a number of latents that does not depend on the atoms, or at most that many.
COUNTED = (TopK, GradientTopK, MatchingPursuit, SignedTopK, GroupMax, ResidualPursuit)


@torch.no_grad()
def random_like(dictionary: OneSiteDictionary, x: Float[Tensor, "tokens d_in"], seed: int = 0) -> OneSiteDictionary:
    """A dictionary of the same kind, width and encoder, whose atoms are random and whose l0 on raw inputs ``x`` is the same.

    Atoms are uniform on the unit sphere; an SAE reads with its atoms, a transcoder with other random directions. Centre,
    scales, output bias and skip stay. Encoders that choose ``k`` latents a token choose as many; where one threshold serves
    all latents it is set so that as many fire in total; where each has its own, every latent fires on as many tokens as the
    trained one of its number.

    Raises:
        ValueError: If ``x`` has no tokens, or the encoder is of a kind that is not known here.
    """
    if not len(x):
        raise ValueError("x: expected tokens on which to match the l0, got none.")
    copied = copy.deepcopy(dictionary).requires_grad_(False).eval()
    fired = copied.encode(x).firings(copied.n_latents)
    generator = torch.Generator().manual_seed(seed)
    copied.W_dec.copy_(_directions(copied.W_dec, generator))
    if copied.W_enc is not None:
        copied.W_enc.copy_(copied.W_dec if isinstance(copied, SAE) else _directions(copied.W_enc, generator))
    if copied.b_enc is not None:
        copied.b_enc.zero_()
    _match(copied.encoder, copied.b_enc, scorer(copied.normalised(x), copied.weights), fired)
    return copied


def _directions(like: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    return F.normalize(torch.randn(like.shape, generator=generator), dim=-1).to(like)


def _match(encoder: Encoder, b_enc: Tensor | None, scores: Scorer, fired: Int[Tensor, " n_latents"]) -> None:
    """Set what decides whether a latent fires, so that on these inputs as many do."""
    if isinstance(encoder, COUNTED):
        return
    if isinstance(encoder, MutualLevel):
        count = int(fired.sum())
        encoder.level.fill_(between(largest_of_batch(scores, count + 1)[0].values.sort(descending=True).values, count))
        encoder.batches.clamp_(min=1)
        return
    cuts = _cuts(scores, fired)
    assert b_enc is not None
    # Where a latent has to fire on less than nothing, it is lifted.
    b_enc.copy_((-cuts).clamp_min(0.0))
    _set_thresholds(encoder, b_enc, cuts.clamp_min(0.0))


def _set_thresholds(encoder: Encoder, b_enc: Tensor, thresholds: Float[Tensor, " n_latents"]) -> None:
    """What pre-activations must exceed, latent by latent."""
    if isinstance(encoder, FeatureChoice):
        encoder.thresholds.copy_(thresholds)
        encoder.own_batches.clamp_(min=1)
    elif isinstance(encoder, Threshold):
        encoder.threshold.copy_(thresholds)
    elif isinstance(encoder, JumpReLU):
        encoder.log_threshold.copy_(thresholds.clamp_min(TINY).log() / PACE)
    elif isinstance(encoder, (ReLU, Gated)):
        if isinstance(encoder, Gated):
            # The gate takes the threshold; magnitudes are what it is taken from.
            encoder.r_mag.zero_()
            encoder.b_mag.copy_(b_enc)
        b_enc.sub_(thresholds)
    else:
        raise ValueError(
            f"random_like: the l0 of the encoder {type(encoder).__name__} cannot be matched here. Say in "
            "eval/circuits/units/random_latents.py what makes its latents fire."
        )


def _cuts(scores: Scorer, counts: Int[Tensor, " n_latents"]) -> Float[Tensor, " n_latents"]:
    """What exactly so many of each latent's scores exceed, if they differ there."""
    last, next_ = (largest_per_latent(scores, counts + more).smallest for more in (0, 1))
    cuts = torch.where(counts > 0, (last + next_) / 2, next_)
    return torch.where(counts < scores.shape[0], cuts, last - MARGIN)
