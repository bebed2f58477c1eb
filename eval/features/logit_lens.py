"""Direct effect of latents on the logits, through the final norm's linear part and the unembedding (logit lens).

Later layers are ignored. The final norm's division is left out, so the effects of one latent are comparable with each other,
and those of two latents only up to that division. The mean over the vocabulary is subtracted, because softmax is invariant to
it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...sae.dictionary import SparseDictionary
from ...sae.one_site import OneSiteDictionary
from ...training.activations.architecture import Architecture
from ...training.activations.model import LanguageModel, each_model
from ...training.activations.model_pair import NAMES, ModelPair, own_hook, side_of
from ...transcoders.stack import hooks_of_provenance
from ..virtual_weights.attention_heads import residual_atoms

# Sites whose tensor is the residual stream or is added to it.
ADDED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp")


class Unembedding(NamedTuple):
    """Residual-stream vectors that latents write, in raw units, and the vectors by which tokens' logits read them."""

    written: Float[Tensor, "n_latents d_model"]
    readers: Float[Tensor, "vocabulary d_model"]

    def blocks(self, size: int = 256) -> Iterator[Float[Tensor, "latents vocabulary"]]:
        """Yield logit effects of one unit of activation, for a block of latents at a time."""
        for written in self.written.split(size):
            effects = written @ self.readers.T
            yield effects - effects.mean(-1, keepdim=True)


@torch.no_grad()
def unembedding(
    dictionary: SparseDictionary, model: LanguageModel, provenance: Mapping[str, Any], side: str | None = None
) -> Unembedding | str:
    """Return the path from latents to logits, or the reason why it is undefined.

    A crosscoder writes the same stream at several sites: the path is that from its last.

    Args:
        side: Of two models, the one whose logits are reached; default: that of the last hook.
    """
    hooks = hooks_of_provenance(provenance)[1]
    places = list(zip(dictionary.sites, hooks, strict=True))
    if isinstance(model.module, ModelPair):
        side = side or side_of(hooks[-1])
        places = [(site, own_hook(hook)) for site, hook in places if side_of(hook) == side]
        model = each_model(model)[NAMES.index(side)]
        if not places:
            return f"it writes to no hook of the {side} model"
    try:
        anatomy = Architecture(model)
    except ValueError as error:
        return str(error)
    written = torch.zeros(dictionary.n_latents, anatomy.d_model, device=model.device)
    for site, hook in places[-1:] if dictionary.shares_code else places:
        atoms = _written(dictionary, anatomy, hook, site.writes)
        if isinstance(atoms, str):
            return atoms
        written += atoms.to(written)
    return Unembedding(written, anatomy.final_norm.fold(anatomy.W_U).float())


def _written(dictionary: SparseDictionary, anatomy: Architecture, hook: str, writes: slice) -> Tensor | str:
    for block, layer in zip(anatomy.blocks, anatomy.layers, strict=True):
        names = [name for name, (_, written) in block.sites().items() if written == hook]
        if "attn_heads" in names and isinstance(dictionary, OneSiteDictionary):
            return residual_atoms(dictionary, layer)
        if any(name in ADDED for name in names):
            return (dictionary.atoms * dictionary.out_scale)[:, writes]
    return f"{hook} is not the residual stream, nor added to it, and no projection from it to the stream is known"
