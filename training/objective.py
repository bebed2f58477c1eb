"""Objective: dictionary and batch to a loss and the numbers worth logging."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae import SparseDictionary
from sae.losses import auxk, normalized_mse

from .activations.stream import Batch


@dataclass(frozen=True)
class Terms:
    """What one batch showed: named scalars, still on the device, and how often each latent fired."""

    named: dict[str, Float[Tensor, ""]]
    firings: Int[Tensor, " n_latents"]


class Objective(nn.Module):
    """Reconstruction plus AuxK. A module, so that data-parallel wrappers see its forward pass.

    ``variance`` is the targets' mean squared distance from their mean, in raw units; it makes the first term an fvu.
    """

    variance: Float[Tensor, ""]

    def __init__(self, dictionary: SparseDictionary, variance: float, auxk_weight: float, auxk_latents: int):
        super().__init__()
        self.dictionary = dictionary
        self.auxk_weight = auxk_weight
        self.auxk_latents = auxk_latents
        self.register_buffer("variance", torch.tensor(variance), persistent=False)

    def forward(self, batch: Batch, dead: Bool[Tensor, " n_latents"]) -> tuple[Float[Tensor, ""], Terms]:
        d = self.dictionary
        y = batch.x if batch.target is None else batch.target
        code = d.encode(batch.x, batch.grad)
        y_hat = d.decode(code)
        reconstruction = normalized_mse(y, y_hat, self.variance)
        loss = reconstruction
        named = {"fvu": reconstruction.detach(), "l0": code.l0().float().mean()}
        if self.auxk_weight > 0:
            error = (y - y_hat) / d.out_scale
            auxiliary = auxk(d.centre(batch.x / d.in_scale), error, d.weights, dead, self.auxk_latents)
            loss = loss + self.auxk_weight * auxiliary
            named["auxk"] = auxiliary.detach()
        named["loss"] = loss.detach()
        return loss, Terms(named, code.firings(d.n_latents))


def combine(pieces: list[Terms]) -> Terms:
    """The terms of a batch from those of its equal pieces."""
    if len(pieces) == 1:
        return pieces[0]
    named = {key: torch.stack([piece.named[key] for piece in pieces]).mean() for key in pieces[0].named}
    return Terms(named, torch.stack([piece.firings for piece in pieces]).sum(0))
