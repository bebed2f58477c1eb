"""Attention-output dictionaries: which heads a latent writes from, which heads and source positions it fires for.

Such a dictionary is trained on the values all heads have mixed, side by side (site ``attn_heads``), so rows of its matrices
fall into one part per head. Attention patterns are taken as given: nothing here says why a head looks where it does.

Source: Kissane et al. 2024, arXiv:2406.17759.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.dictionary import OneSiteDictionary
from ...training.activations.architecture import BlockWeights, LayerTrace
from .linear_readers import readers


@torch.no_grad()
def head_shares(dictionary: OneSiteDictionary, n_heads: int) -> Float[Tensor, "n_latents n_heads"]:
    """From which heads a latent writes: the norms of its atom's parts, as fractions of their sum. No data is looked at.

    Raises:
        ValueError: If the width does not fall into so many parts.
    """
    norms = _by_head(dictionary.atoms, n_heads).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)


@torch.no_grad()
def residual_atoms(dictionary: OneSiteDictionary, layer: BlockWeights) -> Float[Tensor, "n_latents d_model"]:
    """What one unit of each latent adds to the residual stream, in raw units: its atom through the output projection."""
    atoms = _by_head(dictionary.atoms, layer.W_O.shape[0]) * dictionary.out_scale
    return torch.einsum("lhd,hdm->lm", atoms.to(layer.W_O.dtype), layer.W_O)


@torch.no_grad()
def by_head(
    dictionary: OneSiteDictionary, at: LayerTrace, latents: Int[Tensor, " latents"]
) -> tuple[Float[Tensor, "latents contexts positions n_heads"], Float[Tensor, " latents"]]:
    """What each head adds to latents' pre-activations at every position, and the constant that is left.

    Both together are the pre-activation exactly.
    """
    vectors, constants = readers(dictionary, latents)
    parts = _by_head(vectors, at.z.shape[2]).to(at.z.dtype)
    return torch.einsum("lhd,cthd->lcth", parts, at.z), constants.to(at.z.dtype)


@torch.no_grad()
def by_source(
    dictionary: OneSiteDictionary, at: LayerTrace, latents: Int[Tensor, " latents"], positions: Int[Tensor, " targets"]
) -> Float[Tensor, "latents contexts targets n_heads sources"]:
    """What each head takes from each source position for latents' pre-activations at some positions.

    Summed over sources it is ``by_head``; sources in the future have zeros. Much of it often comes from the first token,
    on which heads rest that have nothing to do.
    """
    vectors, _ = readers(dictionary, latents)
    read = torch.einsum("lhd,cshd->lchs", _by_head(vectors, at.v.shape[2]).to(at.v.dtype), at.v)
    return torch.einsum("chts,lchs->lcths", at.pattern[:, :, positions], read)


def _by_head(rows: Float[Tensor, "rows width"], n_heads: int) -> Float[Tensor, "rows n_heads d_head"]:
    if rows.shape[1] % n_heads:
        raise ValueError(
            f"dictionary: a width of {rows.shape[1]} does not fall into {n_heads} heads. Use one trained at site attn_heads."
        )
    return rows.unflatten(1, (n_heads, -1))
