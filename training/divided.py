"""Work divided among ranks: what can be divided, a rank's part of a dictionary, and whole tensors for the files of a run.

Files hold whole tensors, so that a run continues on any number of ranks and any program can load them. The rank that writes,
and every rank while a dictionary is initialized, needs memory of the host for the whole dictionary.
"""

from collections.abc import Mapping

from torch import Tensor

from ..sae import SparseDictionary
from ..sae.checkpoint import build_dictionary
from ..sae.encoders import build_encoder
from ..sae.ranks import Shards
from .recipe import Recipe
from .recipe.encoder_checks import with_budget

# Tensors of a dictionary with one row per latent, whatever the last part of a name says of them (Adam's moments).
MATRICES = ("W_enc", "b_enc", "W_dec")
# Tensors of a run's state with one number per latent, of all layers if there are several.
COUNTS = ("silent_for", "density")


def require_divisible(recipe: Recipe) -> None:
    """Raise ``ValueError``, with the reason, unless a recipe's latents can be divided as it wants."""
    latents, n_latents = recipe.distributed.latents, recipe.dictionary.known_n_latents
    if latents == 1:
        return
    if reason := undivided_latents(recipe):
        raise ValueError(f"distributed.latents: expected 1 for {reason}, got {latents}.")
    if not divides_latents(n_latents, latents):
        raise ValueError(
            f"distributed.latents: expected a divisor of dictionary.n_latents = {n_latents}, got {latents}. Change either."
        )


def undivided_latents(recipe: Recipe) -> str:
    """Return why a recipe's dictionary stays whole, whatever the number of ranks; empty if its latents can be divided."""
    encoders = [build_encoder(with_budget(spec)) for spec in recipe.encoders]
    refusals = (f"{type(encoder).__name__}, because {encoder.undivided}" for encoder in encoders if encoder.undivided)
    return next(refusals, "")


def divides_latents(n_latents: int, ranks: int) -> bool:
    """Return True if so many ranks can hold equal parts of the latents."""
    return n_latents % ranks == 0


def divides_batch(batch_tokens: int, ranks: int, accumulate: int) -> bool:
    """Return True if so many ranks can have equal parts of every micro-batch."""
    return batch_tokens % (ranks * accumulate) == 0


def own_part(whole: SparseDictionary, shards: Shards) -> SparseDictionary:
    """Return the dictionary of this rank's latents; without shards, the whole one."""
    if shards.size == 1:
        return whole
    part = build_dictionary(whole.arguments() | {"n_latents": whole.n_latents // shards.size})
    part.load_state_dict(own_tensors(whole.state_dict(), whole.n_latents, shards, len(whole.blocks)))
    part.shards = shards
    return part


def own_tensors(tensors: dict[str, Tensor], n_latents: int, shards: Shards, layers: int = 1) -> dict[str, Tensor]:
    """Return the tensors with the rows of this rank's latents only, of those tensors that have one row per latent.

    Args:
        layers: Number of layers, of which every rank has equally many latents.
    """
    if shards.size == 1:
        return tensors
    return {
        name: shards.part(tensor, _blocks(name, layers)).clone() if per_latent(name, tensor, n_latents, layers) else tensor
        for name, tensor in tensors.items()
    }


def whole_tensors(tensors: dict[str, Tensor], n_latents: int, shards: Shards, layers: int = 1) -> dict[str, Tensor]:
    """Return the tensors with the rows of all latents, on the host. All shards take part.

    Args:
        n_latents: Number of this rank's latents.
    """
    if shards.size == 1:
        return tensors
    # In one order on all ranks, whatever the order of the optimizer's entries.
    return {
        name: shards.joined(tensor, _blocks(name, layers)) if per_latent(name, tensor, n_latents, layers) else tensor
        for name, tensor in sorted(tensors.items())
    }


def per_latent(name: str, tensor: Tensor, n_latents: int, layers: int = 1) -> bool:
    """Return True if a tensor of a dictionary, its optimizer or a run's state has one row per latent, of a layer or of all."""
    parts = name.replace("/", ".").split(".")
    if "b_dec" in parts or "W_skip" in parts or not tensor.ndim or len(tensor) * layers != n_latents * _blocks(name, layers):
        return False
    encoders = ("encoder", "later_encoders")
    return parts[0] in COUNTS or any(part in MATRICES or part.startswith(encoders) for part in parts)


def _blocks(name: str, layers: int) -> int:
    """Return the number of layers whose latents a tensor has."""
    return layers if name in COUNTS else 1


def whole_dictionary(part: SparseDictionary, instead: Mapping[str, Tensor] | None = None) -> SparseDictionary:
    """Return the whole dictionary, on the host, from this rank's part of it. All shards take part.

    Args:
        instead: Tensors that replace those of the same name, which the part keeps.
    """
    if part.shards.size == 1 and not instead:
        return part
    whole = build_dictionary(part.arguments() | {"n_latents": part.n_latents * part.shards.size})
    tensors = part.state_dict() | dict(instead or {})
    whole.load_state_dict(whole_tensors(tensors, part.n_latents, part.shards, len(part.blocks)))
    whole.to(part.device if part.shards.size == 1 else "cpu")
    whole.provenance = part.provenance
    return whole.train(part.training)
