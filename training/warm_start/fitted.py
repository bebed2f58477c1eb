"""Dictionaries behind maps that are fitted on pairs of activations, as a run can begin with them."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...sae import SparseDictionary
from ...sae.encoders.relu import ReLU
from .judge import ROWS, SampleRows
from .latents import PER_LATENT
from .maps import fitted_regression, fitted_rotation, mapped, unchanged
from .pairs import Pairs

# Regressions of what a dictionary writes, each after the latents are ranked anew. The quickstart's SAE, read one block earlier
# through a rotation, has an fvu of 0.0808 after one, and of 0.0793 after two to four.
REFITS = 3


def fitted_dictionaries(dictionary: SparseDictionary, pairs: Pairs) -> dict[str, SparseDictionary]:
    """Return the dictionary behind maps that are fitted in several ways, by their names.

    Regressions of outputs start from what the dictionary writes, not from its own activations: its errors count too.
    """
    x, targets = pairs.runs.x, pairs.runs.x if pairs.runs.target is None else pairs.runs.target
    inputs = outputs = fitted_rotation(pairs.own.x, x)
    if pairs.own.target is not None:
        outputs = fitted_rotation(pairs.own.target, targets)
    found = {"rotation": mapped(dictionary, inputs, outputs)}
    if not dictionary.encoder.linear or dictionary.encoder.tied:
        # What these subtract is reconstructed by what they read with: only a rotation keeps both.
        return found
    for name, back in (("rotation_regression", inputs.back), ("regression", fitted_regression(x, pairs.own.x))):
        found[name] = _written_by_regression(mapped(dictionary, replace(inputs, back=back), outputs), x, targets)
    return found


@torch.no_grad()
def _written_by_regression(
    dictionary: SparseDictionary, x: Float[Tensor, "tokens d_in"], targets: Float[Tensor, "tokens d_out"]
) -> SparseDictionary:
    """Return a dictionary with outputs that are mapped by regressions to the targets.

    Decoder directions keep their norms where latents are ranked, as training sets them to one norm, which ranks anew.
    """
    own_norms = dictionary.blocks[0].weights.W_dec.norm(dim=1)
    ranks = not isinstance(dictionary.encoder, (*PER_LATENT, ReLU))
    for _ in range(REFITS if ranks else 1):
        written = torch.cat([dictionary(rows) for rows in x.split(ROWS)])
        outputs = replace(unchanged(dictionary.d_out), forward=fitted_regression(written, targets))
        dictionary = mapped(dictionary, unchanged(dictionary.d_in), outputs)
        if ranks:
            weights = dictionary.blocks[0].weights
            norms = weights.W_dec.norm(dim=1)
            factor = torch.where((norms > 0) & (own_norms > 0), norms / own_norms, 1.0)
            assert weights.b_enc is not None
            for tensor in (weights.W_enc, weights.b_enc):
                tensor.mul_(factor if tensor.ndim == 1 else factor[:, None])
            weights.W_dec.div_(factor[:, None])
            dictionary.calibrate(SampleRows(x))
    return dictionary
