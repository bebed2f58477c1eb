"""Latents of a dictionary divided among ranks: a rank's part of a dictionary, and whole tensors for the files of a run.

Files hold whole tensors, so that a run continues on any number of ranks and any program can load them. The rank that writes,
and every rank while a dictionary is initialized, needs memory of the host for the whole dictionary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..sae import SparseDictionary
from ..sae.checkpoint import build_dictionary
from ..sae.dictionary import OneSiteDictionary
from ..sae.ranks import Shards

# Tensors of a dictionary with one row per latent, whatever the last part of a name says of them (Adam's moments).
MATRICES = ("W_enc", "b_enc", "W_dec")


def require_divisible(dictionary: SparseDictionary, encoders: list[Any], latents: int) -> None:
    """Raise ``ValueError``, with the reason, unless the latents of a dictionary can be divided among that many ranks."""
    if latents == 1:
        return
    key = "distributed.latents"
    if not isinstance(dictionary, OneSiteDictionary):
        raise ValueError(f"{key}: expected 1 for a cross-layer transcoder, whose layers are not divided, got {latents}.")
    for encoder in encoders:
        if encoder.undivided:
            name = type(encoder).__name__
            raise ValueError(f"{key}: expected 1 for {name}, because {encoder.undivided}, got {latents}.")
    if dictionary.n_latents % latents:
        raise ValueError(
            f"{key}: expected a divisor of dictionary.n_latents = {dictionary.n_latents}, got {latents}. Change either."
        )


def own_part(whole: SparseDictionary, shards: Shards) -> SparseDictionary:
    """Return the dictionary of this rank's latents; without shards, the whole one."""
    if shards.size == 1:
        return whole
    part = build_dictionary(whole.arguments() | {"n_latents": whole.n_latents // shards.size})
    part.load_state_dict(own_tensors(whole.state_dict(), whole.n_latents, shards))
    part.shards = shards
    return part


def own_tensors(tensors: dict[str, Tensor], n_latents: int, shards: Shards) -> dict[str, Tensor]:
    """Return the tensors with the rows of this rank's latents only, of those tensors that have one row per latent."""
    if shards.size == 1:
        return tensors
    return {
        name: shards.part(tensor).clone() if per_latent(name, tensor, n_latents) else tensor for name, tensor in tensors.items()
    }


def whole_tensors(tensors: dict[str, Tensor], n_latents: int, shards: Shards) -> dict[str, Tensor]:
    """Return the tensors with the rows of all latents, on the host. All shards take part.

    Args:
        n_latents: Number of this rank's latents.
    """
    if shards.size == 1:
        return tensors
    # In one order on all ranks, whatever the order of the optimizer's entries.
    return {
        name: torch.cat([part.cpu() for part in shards.gather(tensor)]) if per_latent(name, tensor, n_latents) else tensor
        for name, tensor in sorted(tensors.items())
    }


def per_latent(name: str, tensor: Tensor, n_latents: int) -> bool:
    """Return True if a tensor of a dictionary, its optimizer or a run's state has one row per latent."""
    parts = name.replace("/", ".").split(".")
    if "b_dec" in parts or "W_skip" in parts or not tensor.ndim or len(tensor) != n_latents:
        return False
    return parts[0] in ("silent_for", "density") or any(part in MATRICES or part.startswith("encoder") for part in parts)


def whole_dictionary(part: SparseDictionary, instead: Mapping[str, Tensor] | None = None) -> SparseDictionary:
    """Return the whole dictionary, on the host, from this rank's part of it. All shards take part.

    Args:
        instead: Tensors that replace those of the same name, which the part keeps.
    """
    if part.shards.size == 1 and not instead:
        return part
    whole = build_dictionary(part.arguments() | {"n_latents": part.n_latents * part.shards.size})
    tensors = part.state_dict() | dict(instead or {})
    whole.load_state_dict(whole_tensors(tensors, part.n_latents, part.shards))
    whole.to(part.device if part.shards.size == 1 else "cpu")
    whole.provenance = part.provenance
    return whole.train(part.training)
