"""Latents of any encoder in one form, and thresholds written into any encoder.

Latents of any encoder are written as ``FittedLatents``: values ``W_enc x + b_enc`` of normalized, centered inputs, active above
a ``cut`` or, for encoders that rank, without one. Scales, biases and decoder norms are folded in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae import Encoder, SparseDictionary
from ...sae.batch_encoder import BatchWide, MutualLevel
from ...sae.encoders import encoder_spec
from ...sae.encoders.feature_choice import FeatureChoice
from ...sae.encoders.gated import Gated
from ...sae.encoders.jumprelu import LEAST, PACE, JumpReLU
from ...sae.encoders.relu import ReLU
from ...sae.encoders.threshold import Threshold
from ...transcoders.cross_layer import CrossLayerTranscoder

# Relative tolerance for equal decoder norms, as after rounding to float32.
EQUAL = 1e-5
# Encoders with a threshold for every latent.
PER_LATENT = (JumpReLU, Gated, FeatureChoice)


@dataclass(frozen=True)
class FittedLatents:
    """Latents of one block: value ``W_enc x + b_enc`` where it exceeds ``cut``; ``None`` for encoders that rank.

    ``gain`` is the factor between a gated encoder's gate and its value. Tied encoders have no ``b_enc``.
    """

    W_enc: Float[Tensor, "n_latents d_in"]
    b_enc: Float[Tensor, " n_latents"] | None
    W_dec: Float[Tensor, "n_latents d_out"]
    cut: Float[Tensor, " n_latents"] | None
    gain: Float[Tensor, " n_latents"] | None = None

    def scaled(self, factor: Float[Tensor, " n_latents"]) -> "FittedLatents":
        """Return the same latents with values multiplied by ``factor`` and decoder directions divided by it."""
        b_enc, cut = (None if each is None else each * factor for each in (self.b_enc, self.cut))
        return replace(self, W_enc=self.W_enc * factor[:, None], b_enc=b_enc, W_dec=self.W_dec / factor[:, None], cut=cut)

    def rows(self, latents: Int[Tensor, " some"]) -> "FittedLatents":
        """Return some of the latents."""
        b_enc, cut, gain = (None if each is None else each[latents] for each in (self.b_enc, self.cut, self.gain))
        return FittedLatents(self.W_enc[latents], b_enc, self.W_dec[latents], cut, gain)


def encoders_of(dictionary: SparseDictionary) -> list[Encoder]:
    """Return the encoder of every block."""
    return dictionary.encoders if isinstance(dictionary, CrossLayerTranscoder) else [dictionary.encoder]


def cuts_of(encoder: Encoder, n_latents: int) -> Float[Tensor, " n_latents"] | None:
    """Return the value above which each latent is active in eval mode; ``None`` for encoders that rank."""
    if isinstance(encoder, ReLU):
        return torch.zeros(n_latents)
    if isinstance(encoder, JumpReLU):
        return encoder.thresholds()
    if isinstance(encoder, Threshold):
        return encoder.threshold.clamp_min(0)
    level = encoder.threshold() if isinstance(encoder, BatchWide) else None
    return None if level is None else level.clamp_min(0).expand(n_latents)


def fitted_latents(dictionary: SparseDictionary) -> list[FittedLatents]:
    """Return the latents of every block in the dictionary's own units, in float64."""
    found = []
    for block, encoder in zip(dictionary.blocks, encoders_of(dictionary), strict=True):
        weights = block.weights
        W_enc, W_dec = weights.W_enc.detach().double(), weights.W_dec.detach().double()
        b_enc = None if weights.b_enc is None else weights.b_enc.detach().double()
        cut, gain = cuts_of(encoder, len(W_dec)), None
        if isinstance(dictionary, CrossLayerTranscoder) and dictionary.chooses_jointly:
            cut = dictionary.level.clamp_min(0).expand(len(W_dec)) if int(dictionary.batches) else None
        cut = None if cut is None else cut.detach().double()
        if isinstance(encoder, Gated):
            assert b_enc is not None
            gain, b_mag = encoder.r_mag.detach().double().exp(), encoder.b_mag.detach().double()
            # The gate W x + b > 0 in terms of the value gain W x + b_mag.
            W_enc, b_enc, cut = W_enc * gain[:, None], b_mag, b_mag - gain * b_enc
        found.append(FittedLatents(W_enc, b_enc, W_dec, cut, gain))
    return found


def holds_cuts(dictionary: SparseDictionary, latents: list[FittedLatents]) -> bool:
    """Return True if the dictionary's encoder can be given the cuts of these latents exactly."""
    encoder = dictionary.encoder
    cuts = [each.cut for each in latents]
    if any(cut is None for cut in cuts):
        return False
    if isinstance(encoder, PER_LATENT):
        return True
    every = torch.cat([cut for cut in cuts if cut is not None])
    if isinstance(encoder, ReLU):
        return not bool(every.any())
    joint = isinstance(dictionary, CrossLayerTranscoder) and dictionary.chooses_jointly
    return (isinstance(encoder, MutualLevel) or joint) and bool(every.max() - every.min() <= EQUAL * every.max())


def same_rule(source: SparseDictionary, dictionary: SparseDictionary) -> bool:
    """Return True if both dictionaries select latents by ranking, with the same encoder and arguments."""
    own, now = encoder_spec(source.encoder), encoder_spec(dictionary.encoder)
    joint = [getattr(each, "joint", False) for each in (source, dictionary)]
    return own == now and joint[0] == joint[1]


def set_cuts(encoder: Encoder, cut: Float[Tensor, " n_latents"]) -> None:
    """Set the thresholds of an encoder as far as it has any."""
    for kind, write in CUTS.items():
        if isinstance(encoder, kind):
            write(encoder, cut)


def _jumprelu_cuts(encoder: JumpReLU, cut: Tensor) -> None:
    encoder.log_threshold.copy_(cut.clamp_min(LEAST).log() / PACE)


def _level(encoder: MutualLevel, cut: Tensor) -> None:
    encoder.level.copy_(cut.mean())
    encoder.batches.clamp_(min=1)


def _feature_cuts(encoder: FeatureChoice, cut: Tensor) -> None:
    encoder.thresholds.copy_(cut)
    encoder.own_batches.clamp_(min=1)


CUTS: dict[type[Encoder], Callable[[Any, Tensor], None]] = {
    JumpReLU: _jumprelu_cuts,
    MutualLevel: _level,
    FeatureChoice: _feature_cuts,
}
