"""Replacement of MLPs by per-layer transcoders or a cross-layer transcoder, behind one interface.

A transcoder reads the MLP's input, after the norm, and writes its output. In models with a norm after the MLP (Gemma 2 and 3)
it writes that norm's input (site ``mlp``) or its output (Gemma Scope), as its checkpoint's hooks say. A transcoder that
normalizes the stream itself, without the model's gain (the first Gemma Scope), is turned into one that reads the MLP's input.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.dictionary import SparseDictionary
from ...sae.one_site import OneSiteDictionary
from ...sae.sparse_code import SparseCode
from ...training.activations.architecture import Architecture
from ...training.activations.insertions import Insertion, TokenPlace
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
    after_norm: bool


class Replacement:
    """Encoder and decoder directions, biases and skip paths of the transcoders that replace MLPs.

    All are in raw units per unit of a latent's value. ``layers`` are the layers of a cross-layer transcoder's sites, by default
    all layers of the model. ``hooks`` are those that dictionaries read and write, by layer; by default those of a stack's
    provenances, else those of site ``mlp``.

    Raises:
        ValueError: If a dictionary belongs to another model, is not a transcoder of an MLP, has an encoder without
            pre-activations, or is in training mode.
    """

    def __init__(
        self,
        anatomy: Architecture,
        dictionaries: ReplacementDictionaries,
        layers: Sequence[int] | None = None,
        hooks: Mapping[int, tuple[str, str]] | None = None,
    ):
        self.anatomy = anatomy
        hooks = hooks or {}
        if isinstance(dictionaries, CrossLayerTranscoder):
            members = _sites_by_layer(anatomy, dictionaries, layers, hooks)
        elif isinstance(dictionaries, SparseDictionary):
            raise ValueError(
                f"dictionaries: expected a cross-layer transcoder, a stack or transcoders by layer, got one dictionary of kind "
                f"{dictionaries.arguments()['kind']!r}. Give a transcoder as {{layer: transcoder}}."
            )
        else:
            by_layer = dict(dictionaries) if not isinstance(dictionaries, Stack) else {}
            if isinstance(dictionaries, Stack):
                by_layer, found = _stack_by_layer(anatomy, dictionaries)
                hooks = {**found, **hooks}
            members = {
                layer: _Member(by_layer[layer], index, 0, _writes_after_norm(anatomy, layer, hooks))
                for index, layer in enumerate(sorted(by_layer))
            }
        if not members:
            raise ValueError("dictionaries: expected a transcoder of at least one layer, got none.")
        for layer, member in members.items():
            _require_fitting(anatomy, layer, member)
            members[layer] = replace(member, dictionary=_reading_mlp_input(anatomy, layer, member.dictionary, hooks))
        self._members = members
        self.layers = tuple(members)

    def insertions(self) -> list[Insertion]:
        """Return the dictionaries as arguments for ``model_spliced``."""
        hooks: dict[int, list[tuple[str, str]]] = {}
        found: dict[int, SparseDictionary] = {}
        for layer, member in self._members.items():
            hooks.setdefault(member.insertion, []).append(self.hooks(layer))
            found[member.insertion] = member.dictionary
        return [Insertion(found[i], *(tuple(side) for side in zip(*hooks[i], strict=True))) for i in sorted(found)]

    def hooks(self, layer: int) -> tuple[str, str]:
        """Return the hook that the layer's transcoder reads, and the one that it replaces."""
        reads, writes = self.anatomy.blocks[layer].sites()["mlp"]
        after = _after_norm(self.anatomy, layer) if self.after_norm(layer) else None
        return reads, after or writes

    def after_norm(self, layer: int) -> bool:
        """Return True if the layer has a transcoder that writes the output of the norm after the MLP."""
        return layer in self._members and self._members[layer].after_norm

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
    def writes_into(self, layer: int, latents: Int[Tensor, " n"], written: int) -> Float[Tensor, "n d_model"]:
        """Return the latents' decoder directions in one of the written layers."""
        member = self._members[layer]
        dictionary, block = member.dictionary, member.dictionary.blocks[member.site]
        start = self.written(layer).index(written) * self.anatomy.d_model
        part = slice(start, start + self.anatomy.d_model)
        scale = dictionary.out_scale if dictionary.out_scale.ndim == 0 else dictionary.out_scale[block.writes][part]
        return (block.weights.W_dec[:, part][latents] * scale).to(self.anatomy.W_E.dtype)

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
    anatomy: Architecture,
    dictionary: CrossLayerTranscoder,
    layers: Sequence[int] | None,
    hooks: Mapping[int, tuple[str, str]],
) -> dict[int, _Member]:
    chosen = list(range(anatomy.n_layers)) if layers is None else list(layers)
    if len(chosen) != dictionary.n_layers or chosen != sorted(set(chosen)):
        raise ValueError(
            f"layers: expected {dictionary.n_layers} ascending layers, those of the cross-layer transcoder, got {chosen}. "
            "Give the layers it was trained on."
        )
    return {
        layer: _Member(dictionary, 0, site, 0 <= layer < anatomy.n_layers and _writes_after_norm(anatomy, layer, hooks))
        for site, layer in enumerate(chosen)
    }


def _stack_by_layer(anatomy: Architecture, stack: Stack) -> tuple[dict[int, SparseDictionary], dict[int, tuple[str, str]]]:
    """Return dictionaries and their hooks by layer."""
    found: dict[int, SparseDictionary] = {}
    hooks: dict[int, tuple[str, str]] = {}
    for hook, dictionary in stack.items():
        provenance = stack.provenances[hook]
        require_model(anatomy, provenance)
        for layer, pair in mlp_hooks(anatomy, provenance).items():
            found[layer], hooks[layer] = dictionary, pair
    return found, hooks


def _after_norm(anatomy: Architecture, layer: int) -> str | None:
    """Return the hook at the output of the norm after the MLP, if there is one."""
    paths = anatomy.post_norm_paths(layer)
    return None if paths is None else f"{paths[1]}:out"


def _writes_after_norm(anatomy: Architecture, layer: int, hooks: Mapping[int, tuple[str, str]]) -> bool:
    return layer in hooks and 0 <= layer < anatomy.n_layers and hooks[layer][1] == _after_norm(anatomy, layer)


def _reading_mlp_input(
    anatomy: Architecture, layer: int, dictionary: SparseDictionary, hooks: Mapping[int, tuple[str, str]]
) -> SparseDictionary:
    """Return a transcoder that reads the MLP's input.

    One with ``row_norm`` reads the norm's input and divides it by its root mean square itself: the model's norm does the same
    (with its epsilon) and multiplies by its gain, by which encoder directions are divided here.
    """
    norm, reads = anatomy.layers[layer].mlp_norm, f"{anatomy.blocks[layer].mlp_norm}:in"
    reads_stream = layer in hooks and hooks[layer][0] == reads
    if dictionary.row_norm is None and not reads_stream:
        return dictionary
    fits = isinstance(dictionary, Transcoder) and dictionary.row_norm == "constant_norm" and reads_stream
    if not isinstance(dictionary, Transcoder) or not fits or norm.centred or bool((norm.weight == 0).any()):
        raise ValueError(
            f"dictionaries: layer {layer}: expected row_norm null for a transcoder of the MLP's input, or constant_norm for "
            f"one that reads {reads}, the input of an RMS norm, got {dictionary.row_norm or 'null'} at "
            f"{hooks[layer][0] if layer in hooks else 'an unknown hook'}. Its pre-activations are not linear in the MLP's "
            "input."
        )
    if dictionary.W_skip is not None:
        raise ValueError(
            f"dictionaries: layer {layer}: expected no skip path beside row_norm, got one, which reads the stream."
        )
    # Everything but the encoder is shared.
    folded = copy.deepcopy(dictionary, {id(tensor): tensor for tensor in (dictionary.W_dec, dictionary.b_dec)})
    gain = norm.weight.to(folded.in_centre)
    with torch.no_grad():
        folded.weights.W_enc.div_(gain)
        folded.in_centre.mul_(gain)
        folded.in_scale.fill_(1.0)
    folded.row_norm = None
    return folded


def require_model(anatomy: Architecture, provenance: Mapping[str, object]) -> None:
    """Raise ``ValueError`` if a checkpoint records that it was trained on another model."""
    model = provenance.get("model")
    trained_on = model.get("id") if isinstance(model, Mapping) else None
    if trained_on is not None and trained_on != anatomy.model.id:
        raise ValueError(f"dictionaries: expected dictionaries trained on {anatomy.model.id}, got one trained on {trained_on}.")


def mlp_hooks(anatomy: Architecture, provenance: Mapping[str, object]) -> dict[int, tuple[str, str]]:
    """Return the hooks that a dictionary reads and writes, by the layer whose MLP it replaces.

    Raises:
        ValueError: If they are not those of an MLP: its input or the norm before it, its output or the norm after it.
    """
    known: dict[tuple[str, str | None], int] = {}
    for layer, block in enumerate(anatomy.blocks):
        reads, writes = block.sites().get("mlp", (None, None))
        if reads is None:
            continue
        befores = [reads] if block.mlp_norm is None else [reads, f"{block.mlp_norm}:out", f"{block.mlp_norm}:in"]
        known |= {(before, after): layer for before in befores for after in (writes, _after_norm(anatomy, layer))}
    found: dict[int, tuple[str, str]] = {}
    for hooks in zip(*hooks_of_provenance(provenance), strict=True):
        if hooks not in known:
            reads = "reads and writes " + hooks[0] if hooks[0] == hooks[1] else f"goes from {hooks[0]} to {hooks[1]}"
            raise ValueError(
                f"dictionaries: expected transcoders of MLPs of {anatomy.model.id}, got a dictionary that {reads}. Train one "
                "with dictionary.kind: transcoder and dictionary.site: mlp."
            )
        found[known[hooks]] = hooks
    return found


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
