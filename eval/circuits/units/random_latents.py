"""Random dictionaries that fire as often as trained ones: a control for how much circuits owe to training."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ....sae import SAE
from ....sae.batch_encoder import MutualLevel
from ....sae.batch_selection import between
from ....sae.encoder import Encoder, Weights, scorer
from ....sae.encoders.feature_choice import FeatureChoice
from ....sae.encoders.gated import Gated
from ....sae.encoders.gradient_topk import GradientTopK
from ....sae.encoders.group_max import GroupMax
from ....sae.encoders.jumprelu import PACE, JumpReLU
from ....sae.encoders.lista import Lista
from ....sae.encoders.matching_pursuit import MatchingPursuit
from ....sae.encoders.multi_topk import MultiTopK
from ....sae.encoders.relu import ReLU
from ....sae.encoders.residual_pursuit import ResidualPursuit
from ....sae.encoders.signed_topk import SignedTopK
from ....sae.encoders.threshold import Threshold
from ....sae.encoders.topk import TopK
from ....sae.one_site import OneSiteDictionary
from ....sae.tiled_scores import Scorer, largest_of_batch, largest_per_latent

# Thresholds stored as logarithms cannot be 0.
TINY = 1e-6
# Margin by which a latent that fires everywhere exceeds its threshold, in normalized units.
MARGIN = 1e-3


# Encoders with a fixed (maximum) number of active latents, for any decoder directions.
COUNTED = (TopK, MultiTopK, GradientTopK, MatchingPursuit, SignedTopK, GroupMax, ResidualPursuit)


@torch.no_grad()
def random_like(dictionary: OneSiteDictionary, x: Float[Tensor, "tokens d_in"], seed: int = 0) -> OneSiteDictionary:
    """Return a dictionary of the same kind, width and encoder with random directions and the same l0 on raw inputs ``x``.

    Decoder directions are uniform on the unit sphere. An SAE encodes with its decoder directions, a transcoder with other
    random directions. Pre-encoder bias, scales, output bias and skip path are kept. Encoders that choose ``k`` latents per
    token keep ``k``. A threshold shared by all latents is set to match the total number of firings; per-latent thresholds match
    the number of tokens on which the trained latent of the same index fires.

    Raises:
        ValueError: If ``x`` has no tokens, or the type of encoder is not supported.
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
    _match(copied.encoder, copied.b_enc, copied.normalised(x), copied.weights, fired)
    return copied


def _directions(like: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    return F.normalize(torch.randn(like.shape, generator=generator), dim=-1).to(like)


def _match(encoder: Encoder, b_enc: Tensor | None, x: Tensor, weights: Weights, fired: Int[Tensor, " n_latents"]) -> None:
    """Set the thresholds so that latents fire as often on these inputs."""
    if isinstance(encoder, COUNTED):
        return
    if isinstance(encoder, Lista):
        if encoder.has_thresholds:
            encoder.fit_levels([x], weights, int(fired.sum()) / len(x))
        return
    scores = scorer(x, weights)
    if isinstance(encoder, MutualLevel):
        count = int(fired.sum())
        encoder.level.fill_(between(largest_of_batch(scores, count + 1)[0].values.sort(descending=True).values, count))
        encoder.batches.clamp_(min=1)
        return
    cuts = _cuts(scores, fired)
    assert b_enc is not None
    # Thresholds are not negative: a latent with a negative cut gets a bias instead.
    b_enc.copy_((-cuts).clamp_min(0.0))
    _set_thresholds(encoder, b_enc, cuts.clamp_min(0.0))


def _set_thresholds(encoder: Encoder, b_enc: Tensor, thresholds: Float[Tensor, " n_latents"]) -> None:
    """Set the threshold on each latent's pre-activation."""
    if isinstance(encoder, FeatureChoice):
        encoder.thresholds.copy_(thresholds)
        encoder.own_batches.clamp_(min=1)
    elif isinstance(encoder, Threshold):
        encoder.threshold.copy_(thresholds)
    elif isinstance(encoder, JumpReLU):
        encoder.log_threshold.copy_(thresholds.clamp_min(TINY).log() / PACE)
    elif isinstance(encoder, (ReLU, Gated)):
        if isinstance(encoder, Gated):
            # Only the gate is thresholded; magnitudes keep the bias.
            encoder.r_mag.zero_()
            encoder.b_mag.copy_(b_enc)
        b_enc.sub_(thresholds)
    else:
        raise ValueError(
            f"random_like: expected an encoder whose l0 can be matched, got {type(encoder).__name__}. Add it to "
            "eval/circuits/units/random_latents.py."
        )


def _cuts(scores: Scorer, counts: Int[Tensor, " n_latents"]) -> Float[Tensor, " n_latents"]:
    """Return the value that exactly ``counts`` scores of each latent exceed, barring ties."""
    last, next_ = (largest_per_latent(scores, counts + more).smallest for more in (0, 1))
    cuts = torch.where(counts > 0, (last + next_) / 2, next_)
    return torch.where(counts < scores.shape[0], cuts, last - MARGIN)
