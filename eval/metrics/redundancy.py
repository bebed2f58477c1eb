"""Metric: similarity of decoder directions to each other and to the encoder, from the weights alone."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..undefined import Undefined
from .base import DictionaryOutputs, MetricGroup, Setting

# Rows of a block of cosines: with 131,072 latents, a block takes 0.5 GB in float32.
BLOCK = 1024
# Above this number, latents are subsampled, because the cost is quadratic.
LATENTS_COMPARED = 32_768
NEAR_COPY = 0.9


class Redundancy(MetricGroup):
    """Cosines between decoder directions, and between each latent's encoder and decoder rows."""

    name = "redundancy"
    version = 1
    reads_model = False

    def __init__(self, setting: Setting):
        self.setting = setting

    def fit(self, piece: DictionaryOutputs) -> None:
        pass

    def score(self, piece: DictionaryOutputs) -> None:
        pass

    def report(self) -> dict[str, Any]:
        dictionary = self.setting.dictionary
        largest = max_cosines(dictionary.atoms.detach())
        entries: dict[str, Any] = {"decoder_latents_compared": largest.numel()}
        names = ("decoder_max_cosine_mean", "decoder_max_cosine_median", "decoder_max_cosine_p90")
        if dictionary.n_latents == 1:
            alone = Undefined("there is one latent only")
            entries |= dict.fromkeys((*names, "decoder_near_copies_fraction"), alone)
        else:
            middle, high = torch.quantile(largest, largest.new_tensor([0.5, 0.9])).tolist()
            entries |= dict(zip(names, (float(largest.mean()), middle, high), strict=True))
            entries["decoder_near_copies_fraction"] = float((largest > NEAR_COPY).double().mean())
        return entries | self._encoder()

    def _encoder(self) -> dict[str, Any]:
        dictionary = self.setting.dictionary
        names = ("encoder_decoder_cosine_mean", "encoder_decoder_cosine_median")
        if dictionary.tied:
            return dict.fromkeys(names, Undefined("encoder and decoder are one matrix"))
        if not self.setting.reads_target:
            return dict.fromkeys(names, Undefined("what is read and what is written are two spaces"))
        weights = dictionary.blocks[0].weights
        cosine = F.cosine_similarity(weights.W_enc.detach().double(), weights.W_dec.detach().double(), dim=-1)
        return dict(zip(names, (float(cosine.mean()), float(cosine.median())), strict=True))


def max_cosines(atoms: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, " compared"]:
    """Return each latent's largest absolute cosine with another decoder direction, in float64.

    Above ``LATENTS_COMPARED`` latents, only evenly spaced ones are compared with all others.
    """
    directions = F.normalize(atoms.float(), dim=-1)
    step = -(-len(directions) // LATENTS_COMPARED)
    found = []
    for rows in torch.arange(0, len(directions), step, device=atoms.device).split(BLOCK):
        cosines = (directions[rows] @ directions.T).abs_()
        # Exclude each latent's cosine with itself.
        cosines[torch.arange(len(rows), device=atoms.device), rows] = 0
        found.append(cosines.max(dim=-1).values.double())
    return torch.cat(found)
