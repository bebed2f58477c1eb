"""Attention-output dictionaries: attribution of latents to heads and source positions.

Such a dictionary is trained on the concatenated mixed values of all heads (site ``attn_heads``), so rows of its matrices split
into one part per head. Attention patterns are frozen: the analysis does not explain why a head attends where it does.

Source: Kissane et al. 2024, arXiv:2406.17759.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.one_site import OneSiteDictionary
from ...training.activations.architecture import BlockWeights, LayerTrace
from .linear_readers import readers


@torch.no_grad()
def head_shares(dictionary: OneSiteDictionary, n_heads: int) -> Float[Tensor, "n_latents n_heads"]:
    """Return the norms of each decoder direction's per-head parts as fractions of their sum; needs no data.

    Raises:
        ValueError: If the width is not divisible by ``n_heads``.
    """
    norms = _by_head(dictionary.atoms, n_heads).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)


@torch.no_grad()
def residual_atoms(dictionary: OneSiteDictionary, layer: BlockWeights) -> Float[Tensor, "n_latents d_model"]:
    """Return decoder directions mapped through the output projection, in raw units of the residual stream."""
    atoms = _by_head(dictionary.atoms, layer.W_O.shape[0]) * dictionary.out_scale
    return torch.einsum("lhd,hdm->lm", atoms.to(layer.W_O.dtype), layer.W_O)


@torch.no_grad()
def by_head(
    dictionary: OneSiteDictionary, at: LayerTrace, latents: Int[Tensor, " latents"]
) -> tuple[Float[Tensor, "latents contexts positions n_heads"], Float[Tensor, " latents"]]:
    """Return each head's contribution to latents' pre-activations at every position, and the remaining constant.

    Together they sum exactly to the pre-activation.
    """
    vectors, constants = readers(dictionary, latents)
    parts = _by_head(vectors, at.z.shape[2]).to(at.z.dtype)
    return torch.einsum("lhd,cthd->lcth", parts, at.z), constants.to(at.z.dtype)


@torch.no_grad()
def by_source(
    dictionary: OneSiteDictionary, at: LayerTrace, latents: Int[Tensor, " latents"], positions: Int[Tensor, " targets"]
) -> Float[Tensor, "latents contexts targets n_heads sources"]:
    """Return the contribution of each head and source position to latents' pre-activations at some target positions.

    Summed over sources this equals ``by_head``; future sources have zeros. The first token often has a large part of it, being
    the attention sink of idle heads.
    """
    vectors, _ = readers(dictionary, latents)
    read = torch.einsum("lhd,cshd->lchs", _by_head(vectors, at.v.shape[2]).to(at.v.dtype), at.v)
    return torch.einsum("chts,lchs->lcths", at.pattern[:, :, positions], read)


def _by_head(rows: Float[Tensor, "rows width"], n_heads: int) -> Float[Tensor, "rows n_heads d_head"]:
    if rows.shape[1] % n_heads:
        raise ValueError(
            f"dictionary: expected a width divisible by {n_heads} heads, got {rows.shape[1]}. Use one of site attn_heads."
        )
    return rows.unflatten(1, (n_heads, -1))
