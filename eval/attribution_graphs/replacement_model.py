"""Replacement of MLPs by per-layer transcoders or a cross-layer transcoder, behind one interface."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.dictionary import SparseDictionary
from ...sae.one_site import OneSiteDictionary
from ...sae.sparse_code import SparseCode
from ...training.activations.architecture import Architecture
from ...training.activations.splice import Insertion, TokenPlace
from ...transcoders.cross_layer import CrossLayerTranscoder
from ...transcoders.stack import Stack, hooks_of_provenance
from ...transcoders.transcoder import Transcoder
from ..virtual_weights.linear_readers import Readers, readers

# A stack with its provenances, transcoders by layer, or a cross-layer transcoder; other dictionaries raise an error.
ReplacementDictionaries = Stack | Mapping[int, SparseDictionary] | SparseDictionary


@dataclass(frozen=True)
class _Member:
    dictionary: SparseDictionary
    insertion: int
    site: int


class Replacement:
    """Encoder and decoder directions, biases and skip paths of the transcoders that replace MLPs.

    All are in raw units per unit of a latent's value. ``layers`` are the layers of a cross-layer transcoder's sites, by default
    all layers of the model.

    Raises:
        ValueError: If a dictionary belongs to another model, is not a transcoder of an MLP, has an encoder without
            pre-activations, or is in training mode.
    """

    def __init__(self, anatomy: Architecture, dictionaries: ReplacementDictionaries, layers: Sequence[int] | None = None):
        self.anatomy = anatomy
        if isinstance(dictionaries, CrossLayerTranscoder):
            members = _sites_by_layer(anatomy, dictionaries, layers)
        elif isinstance(dictionaries, SparseDictionary):
            raise ValueError(
                f"dictionaries: expected a cross-layer transcoder, a stack or transcoders by layer, got one dictionary of kind "
                f"{dictionaries.arguments()['kind']!r}. Give a transcoder as {{layer: transcoder}}."
            )
        else:
            by_layer = _stack_by_layer(anatomy, dictionaries) if isinstance(dictionaries, Stack) else dict(dictionaries)
            members = {layer: _Member(by_layer[layer], index, 0) for index, layer in enumerate(sorted(by_layer))}
        if not members:
            raise ValueError("dictionaries: expected a transcoder of at least one layer, got none.")
        for layer, member in members.items():
            _require_fitting(anatomy, layer, member)
        self._members = members
        self.layers = tuple(members)

    def insertions(self) -> list[Insertion]:
        """Return the dictionaries as arguments for ``model_spliced``."""
        hooks: dict[int, list[tuple[str, str]]] = {}
        found: dict[int, SparseDictionary] = {}
        for layer, member in self._members.items():
            hooks.setdefault(member.insertion, []).append(self.anatomy.blocks[layer].sites()["mlp"])
            found[member.insertion] = member.dictionary
        return [Insertion(found[i], *(tuple(side) for side in zip(*hooks[i], strict=True))) for i in sorted(found)]

    def place(self, layer: int) -> TokenPlace:
        """Return a layer's index among the insertions, and its site there."""
        member = self._members[layer]
        return member.insertion, member.site

    def encode(self, layer: int, x: Float[Tensor, "tokens d_model"]) -> SparseCode:
        """Return the code of the layer's MLP inputs."""
        member = self._members[layer]
        return member.dictionary.encode_at(member.site, x)

    def decode(
        self, layer: int, codes: Mapping[int, SparseCode], x: Float[Tensor, "tokens d_model"]
    ) -> Float[Tensor, "tokens d_model"]:
        """Return the reconstruction of the layer's MLP output from the codes of all layers up to it."""
        member = self._members[layer]
        earlier = [one for one, other in self._members.items() if other.insertion == member.insertion and one <= layer]
        return member.dictionary.decode_at(member.site, [codes[one] for one in earlier], x).to(self.anatomy.W_E.dtype)

    def reads(self, layer: int, latents: Int[Tensor, " n"]) -> Readers:
        """Return the latents' encoder directions and constants on the MLP input, after the norm."""
        member = self._members[layer]
        if isinstance(member.dictionary, OneSiteDictionary):
            vectors, constants = readers(member.dictionary, latents)
        else:
            vectors, constants = _cross_layer_readers(member.dictionary, member.site, latents)
        return Readers(vectors.to(self.anatomy.W_E.dtype), constants.to(self.anatomy.W_E.dtype))

    def written(self, layer: int) -> tuple[int, ...]:
        """Return the layers whose MLP outputs the layer's latents write to."""
        own = self._members[layer]
        if not isinstance(own.dictionary, CrossLayerTranscoder):
            return (layer,)
        return tuple(one for one in self.layers if one >= layer)

    @torch.no_grad()
    def writes(self, layer: int, latents: Int[Tensor, " n"]) -> Float[Tensor, "n written d_model"]:
        """Return the latents' decoder directions in each of the written layers."""
        member = self._members[layer]
        dictionary, block = member.dictionary, member.dictionary.blocks[member.site]
        scale = dictionary.out_scale if dictionary.out_scale.ndim == 0 else dictionary.out_scale[block.writes]
        rows = block.weights.W_dec[latents] * scale
        return rows.to(self.anatomy.W_E.dtype).unflatten(1, (-1, self.anatomy.d_model))

    @torch.no_grad()
    def bypass(self, layer: int) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_model"] | None]:
        """Return the constant output of the layer's transcoder, and the matrix of its skip path, if any."""
        dictionary, site = self._members[layer].dictionary, self._members[layer].site
        dtype = self.anatomy.W_E.dtype
        if isinstance(dictionary, CrossLayerTranscoder):
            there = dictionary.sites[site].writes
            return (dictionary.b_dec[there] * dictionary.out_scale[there]).to(dtype), None
        assert isinstance(dictionary, Transcoder)
        if dictionary.W_skip is None:
            return (dictionary.b_dec * dictionary.out_scale).to(dtype), None
        bias = (dictionary.b_dec - dictionary.W_skip @ dictionary.shift) * dictionary.out_scale
        return bias.to(dtype), (dictionary.W_skip * (dictionary.out_scale / dictionary.in_scale)).to(dtype)


@torch.no_grad()
def _cross_layer_readers(dictionary: SparseDictionary, site: int, latents: Int[Tensor, " n"]) -> Readers:
    assert isinstance(dictionary, CrossLayerTranscoder)
    block = dictionary.blocks[site]
    assert block.weights.b_enc is not None
    W_enc = block.weights.W_enc[latents]
    constants = block.weights.b_enc[latents] - W_enc @ dictionary.in_centre[block.reads]
    return Readers(W_enc / dictionary.in_scale[block.reads], constants)


def _sites_by_layer(
    anatomy: Architecture, dictionary: CrossLayerTranscoder, layers: Sequence[int] | None
) -> dict[int, _Member]:
    chosen = list(range(anatomy.n_layers)) if layers is None else list(layers)
    if len(chosen) != dictionary.n_layers or chosen != sorted(set(chosen)):
        raise ValueError(
            f"layers: expected {dictionary.n_layers} ascending layers, those of the cross-layer transcoder, got {chosen}. "
            "Give the layers it was trained on."
        )
    return {layer: _Member(dictionary, 0, site) for site, layer in enumerate(chosen)}


def _stack_by_layer(anatomy: Architecture, stack: Stack) -> dict[int, SparseDictionary]:
    found: dict[int, SparseDictionary] = {}
    for hook, dictionary in stack.items():
        provenance = stack.provenances[hook]
        require_model(anatomy, provenance)
        found[layers_of(anatomy, provenance)[0]] = dictionary
    return found


def require_model(anatomy: Architecture, provenance: Mapping[str, object]) -> None:
    """Raise ``ValueError`` if a checkpoint records that it was trained on another model."""
    model = provenance.get("model")
    trained_on = model.get("id") if isinstance(model, Mapping) else None
    if trained_on is not None and trained_on != anatomy.model.id:
        raise ValueError(f"dictionaries: expected dictionaries trained on {anatomy.model.id}, got one trained on {trained_on}.")


def layers_of(anatomy: Architecture, provenance: Mapping[str, object]) -> tuple[int, ...]:
    """Return the layers whose MLPs a dictionary replaces, by the hooks of its provenance.

    Raises:
        ValueError: If it reads or writes anything else.
    """
    layers = {block.sites().get("mlp"): layer for layer, block in enumerate(anatomy.blocks)}
    found = []
    for hooks in zip(*hooks_of_provenance(provenance), strict=True):
        if hooks not in layers:
            reads = "reads and writes " + hooks[0] if hooks[0] == hooks[1] else f"goes from {hooks[0]} to {hooks[1]}"
            raise ValueError(
                f"dictionaries: expected transcoders of MLPs of {anatomy.model.id}, got a dictionary that {reads}. Train one "
                "with dictionary.kind: transcoder and dictionary.site: mlp."
            )
        found.append(layers[hooks])
    return tuple(found)


def _require_fitting(anatomy: Architecture, layer: int, member: _Member) -> None:
    dictionary = member.dictionary
    if not 0 <= layer < anatomy.n_layers:
        raise ValueError(f"dictionaries: expected layers 0 to {anatomy.n_layers - 1}, got {layer}.")
    kind = dictionary.arguments()["kind"]
    if not isinstance(dictionary, Transcoder | CrossLayerTranscoder):
        raise ValueError(
            f"dictionaries: layer {layer}: expected a transcoder, got a dictionary of kind {kind!r}, which reconstructs its "
            "own input. Train one with dictionary.kind: transcoder."
        )
    site = dictionary.sites[member.site]
    widths = site.reads.stop - site.reads.start, site.writes.stop - site.writes.start
    if widths != (anatomy.d_model, anatomy.d_model):
        raise ValueError(
            f"dictionaries: layer {layer}: expected d_in = d_out = {anatomy.d_model}, the width of {anatomy.model.id}, got "
            f"{widths[0]} and {widths[1]}."
        )
    if dictionary.training:
        raise ValueError(
            f"dictionaries: layer {layer}: expected eval mode, as codes depend on the batch in training. Call eval()."
        )
    if dictionary.blocks[member.site].weights.b_enc is None:
        raise ValueError(
            f"dictionaries: layer {layer}: expected an encoder with pre-activations, got {type(dictionary.encoder).__name__}, "
            "which selects latents sequentially, so they are not linear functions of its input. Use topk, for example."
        )
