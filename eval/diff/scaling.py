"""Latent scaling: how much of an exclusive latent is also present in the other model (Minder et al. 2025, arXiv:2504.02922).

A decoder norm of 0 does not prove that a concept is new: a penalty may have shrunk it (complete shrinkage), or other latents
may represent it in the other model (latent decoupling). For a latent with activations ``f`` and decoder row ``d`` of the model
in which it is larger, ``beta`` is the least-squares solution of ``beta f d ~ y`` over all tokens,

    beta = sum f <d, y> / (|d|^2 sum f^2),

with two targets ``y`` in each model ``m``, whose reconstruction is ``x_hat = sum over i of f_i d_i^m + b^m``:

- error: ``x - x_hat + f d^m``, what the other latents leave unexplained. ``nu_error`` is beta in the other model divided by
  that in the latent's own model: near 0 for a concept that the other model lacks, near 1 for one that was shrunk away;
- reconstruction: ``x_hat - b^m``. ``nu_reconstruction``, the same ratio, is large if other latents represent the concept in the
  other model.

A latent is truly exclusive if ``nu_error`` and ``nu_reconstruction`` are below ``TRUE_BELOW`` (the paper's 0.2 and 0.5).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TRUE_BELOW = (0.2, 0.5)


@dataclass(frozen=True)
class Ratios:
    """Ratios of every latent, NaN where undefined: for silent latents, and for those absent from their own model."""

    nu_error: Float[Tensor, " n_latents"]
    nu_reconstruction: Float[Tensor, " n_latents"]

    @property
    def true(self) -> Bool[Tensor, " n_latents"]:
        """Mask of latents whose ratios are both small."""
        return (self.nu_error < TRUE_BELOW[0]) & (self.nu_reconstruction < TRUE_BELOW[1])


class LatentScaling:
    """Sums over tokens from which the ratios follow; memory is four matrices of the decoder's size.

    Args:
        decoders: Decoder rows of base and tuned model, of equal width.
        biases: Decoder biases of both.
    """

    def __init__(
        self,
        decoders: tuple[Float[Tensor, "n_latents d_base"], Float[Tensor, "n_latents d_tuned"]],
        biases: tuple[Float[Tensor, " d_base"], Float[Tensor, " d_tuned"]],
    ):
        if decoders[0].shape != decoders[1].shape:
            widths = f"{decoders[0].shape[1]} and {decoders[1].shape[1]}"
            raise ValueError(f"latent scaling: expected models of one width at their hooks, got {widths}.")
        self.decoders, self.biases = decoders, biases
        self.squares = torch.zeros(len(decoders[0]), dtype=torch.float64)
        self.errors = [torch.zeros(decoder.shape, dtype=torch.float64) for decoder in decoders]
        self.outputs = [torch.zeros(decoder.shape, dtype=torch.float64) for decoder in decoders]

    def update(
        self,
        values: Float[Tensor, "tokens n_latents"],
        x: tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens d"]],
        x_hat: tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens d"]],
    ) -> None:
        """Add tokens: activations of all latents, and both models' activations and reconstructions, in raw units."""
        self.squares += values.square().sum(0).double()
        for site in (0, 1):
            self.errors[site] += (values.T @ (x[site] - x_hat[site])).double()
            self.outputs[site] += (values.T @ (x_hat[site] - self.biases[site])).double()

    def ratios(self) -> Ratios:
        """Return the ratios of every latent, of the model in which it is smaller to the one in which it is larger."""
        norms = torch.stack([decoder.norm(dim=-1) for decoder in self.decoders])
        own = norms.argmax(0)
        d = torch.where((own == 0)[:, None], self.decoders[0], self.decoders[1]).double()
        size = d.square().sum(-1) * self.squares
        error, output = [], []
        for site, decoder in enumerate(self.decoders):
            removed = self.squares * (d * decoder).sum(-1)
            error.append(((d * self.errors[site]).sum(-1) + removed) / size)
            output.append((d * self.outputs[site]).sum(-1) / size)

        def ratio(betas: list[Tensor]) -> Tensor:
            first, second = betas
            found = torch.where(own == 0, second, first) / torch.where(own == 0, first, second)
            return torch.where(torch.isfinite(found), found, torch.nan)

        return Ratios(ratio(error), ratio(output))
