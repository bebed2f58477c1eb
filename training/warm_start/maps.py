"""Linear maps between the activations that a dictionary was trained on and those of a run, and the dictionary behind a map.

Maps are fitted on pairs of activations of the same tokens: a rotation with one scale and a shift (orthogonal Procrustes;
Schönemann 1966), or least-squares regressions. A dictionary is read through a map back to its own activations, and writes
through a map from them. If both are one rotation, its function is the old one in mapped coordinates: latents have the same
values, and decoder directions the same norms.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...sae import SparseDictionary
from ...sae.encoders.gated import Gated
from ...transcoders import Transcoder

# Ridge of a regression, as a share of the mean variance per dimension.
RIDGE = 1e-6


@dataclass(frozen=True)
class AffineMap:
    """Map ``x -> matrix x + offset`` of activations, in float64."""

    matrix: Float[Tensor, "d_to d_from"]
    offset: Float[Tensor, " d_to"]

    def __call__(self, x: Float[Tensor, "tokens d_from"]) -> Float[Tensor, "tokens d_to"]:
        """Return the mapped rows, in their own precision."""
        return (x.double() @ self.matrix.T + self.offset).to(x.dtype)


@dataclass(frozen=True)
class SideMaps:
    """Maps of the activations at one side of a dictionary: from its own to the run's, and back.

    ``scale`` is the factor between their deviations; units of the dictionary change by it, so that values stay.
    """

    forward: AffineMap
    back: AffineMap
    scale: float


def unchanged(width: int) -> SideMaps:
    """Return the maps of activations that stay as they are."""
    same = AffineMap(torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    return SideMaps(same, same, 1.0)


def fitted_rotation(own: Float[Tensor, "tokens d"], runs: Float[Tensor, "tokens d"]) -> SideMaps:
    """Return the rotation, possibly with a reflection, the scale and the shift that map paired activations best."""
    own, runs = own.double(), runs.double()
    means = own.mean(0), runs.mean(0)
    own, runs = own - means[0], runs - means[1]
    U, _, Vh = torch.linalg.svd(runs.T @ own)
    return rotation_maps(U @ Vh, float(runs.norm() / own.norm()), *means)


def rotation_maps(
    rotation: Float[Tensor, "d d"], scale: float, own_mean: Float[Tensor, " d"], runs_mean: Float[Tensor, " d"]
) -> SideMaps:
    """Return the maps of a rotation and a scale about the means, from a dictionary's own activations to the run's."""
    there, back = scale * rotation, rotation.T / scale
    return SideMaps(AffineMap(there, runs_mean - there @ own_mean), AffineMap(back, own_mean - back @ runs_mean), scale)


def fitted_regression(x: Float[Tensor, "tokens d_from"], y: Float[Tensor, "tokens d_to"]) -> AffineMap:
    """Return the affine map from ``x`` that predicts ``y`` best, by least squares with a small ridge."""
    x, y = x.double(), y.double()
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    matrix = torch.linalg.solve(gram, x.T @ y).T
    return AffineMap(matrix, means[1] - matrix @ means[0])


@torch.no_grad()
def mapped(dictionary: SparseDictionary, inputs: SideMaps, outputs: SideMaps) -> SparseDictionary:
    """Return a copy of an SAE or transcoder that reads and writes mapped activations; for an SAE both sides are the same.

    It encodes what ``inputs.back`` makes of an activation, and writes what ``outputs.forward`` makes of its own output.
    """
    found = copy.deepcopy(dictionary)
    weights, old = found.blocks[0].weights, dictionary.blocks[0].weights
    in_scale, out_scale = dictionary.in_scale.double(), dictionary.out_scale.double()
    new_in, new_out = in_scale * inputs.scale, out_scale * outputs.scale
    # In the units of the dictionary, which are other ones behind the map.
    back, forward = inputs.back.matrix * (new_in / in_scale), outputs.forward.matrix * (out_scale / new_out)
    bias = forward @ dictionary.b_dec.double() + outputs.forward.offset / new_out
    own_centre = torch.zeros(found.d_in).double() if dictionary.shift is None else dictionary.shift.double()
    if isinstance(found, Transcoder):
        centre = (inputs.forward.matrix @ (own_centre * in_scale) + inputs.forward.offset) / new_in
        found.in_centre.copy_(centre)
    else:
        centre = own_centre if dictionary.shift is None else bias
    # The difference that moving the center there and back makes: zero for a rotation of centered inputs.
    rest = back @ centre + inputs.back.offset / in_scale - own_centre
    if isinstance(found, Transcoder) and found.W_skip is not None:
        skip = forward @ found.W_skip.double()
        bias = bias + skip @ rest
        found.W_skip.copy_(skip @ back)
    found.b_dec.copy_(bias)
    weights.W_dec.copy_(old.W_dec.double() @ forward.T)
    if weights.W_enc is not weights.W_dec:
        weights.W_enc.copy_(old.W_enc.double() @ back)
    if weights.b_enc is not None:
        moved = old.W_enc.double() @ rest
        weights.b_enc.add_(moved)
        if isinstance(found.encoder, Gated):
            found.encoder.b_mag.add_(found.encoder.r_mag.double().exp() * moved)
    found.in_scale.copy_(new_in)
    found.out_scale.copy_(new_out)
    return found
