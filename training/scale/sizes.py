"""Sizes of a recipe that decide what its training costs, from the recipe and a configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...sae.batch_encoder import Calibrated
from ...sae.checkpoint import build_dictionary
from ...sae.encoders import build_encoder
from ...transcoders.cross_layer import CrossLayerTranscoder
from ..activations.sites import n_layers
from ..divided import undivided_latents
from ..recipe import DictionarySection, Recipe
from ..recipe.encoder_checks import with_budget
from ..resolve_hooks import ModelOutline, ResolvedRecipe, dictionary_arguments, resolve_recipes

# Bytes of the parameters of a language model.
MODEL_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class BlockSizes:
    """One encoder and one decoder matrix; ``tied`` if they are the same tensor. ``active`` is entries per token."""

    n_latents: int
    d_in: int
    d_out: int
    active: float
    tied: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Row lengths of the distinct matrices."""
        return (self.d_in,) if self.tied else (self.d_in, self.d_out)

    @property
    def matrix_numbers(self) -> int:
        return self.n_latents * sum(self.widths)


@dataclass(frozen=True)
class DictionarySizes:
    """Sizes of one dictionary in training.

    ``budgeted`` encoders select from scores one tile at a time; others keep all scores. ``batch_wide`` ones exchange counts
    with other ranks. ``passes`` over the latents are made per step: one, or one per atom of a pursuit. ``unsplittable`` is the
    reason why latents cannot be split over ranks; empty if they can.
    """

    blocks: tuple[BlockSizes, ...]
    d_in: int
    d_out: int
    other_numbers: int
    budgeted: bool = True
    batch_wide: bool = False
    passes: int = 1
    unsplittable: str = ""

    @property
    def n_latents(self) -> int:
        return sum(block.n_latents for block in self.blocks)

    @property
    def parameters(self) -> int:
        return self.other_numbers + sum(block.matrix_numbers for block in self.blocks)

    @property
    def least_split(self) -> int:
        """Number of latents that ranks must divide: of one layer, if there are several."""
        return self.blocks[0].n_latents


@dataclass(frozen=True)
class ModelSizes:
    """Language model: its parameters, and the share of its layers that must run to reach the last hook."""

    parameters: int
    share: float
    bytes_per_number: int


@dataclass(frozen=True)
class RunSizes:
    """Everything about a recipe, or about a grid whose members train together, that its costs depend on."""

    dictionaries: tuple[DictionarySizes, ...]
    # Rows of all hooks that a batch holds, by stream.
    row_numbers: tuple[int, ...]
    tokens: int
    batch_tokens: int
    accumulate: int
    fused: bool
    clipped: bool
    half: bool
    model: ModelSizes | None
    live: bool
    harvest_tokens: int
    stored_bytes_per_token: float
    # Tokens that the model reads for each that is trained on.
    read_per_token: float
    # Ranks that divide the latents, as the recipe has it.
    latents: int = 1

    @property
    def parameters(self) -> int:
        return sum(each.parameters for each in self.dictionaries)


@dataclass(frozen=True)
class Given:
    """Figures that replace what a language model's configuration or a finished run would tell; ``None`` if not given."""

    d_model: int | None = None
    parameters: int | None = None
    layers: int | None = None
    l0: float | None = None


def active_per_token(encoder: dict[str, Any], n_latents: int, l0: float | None) -> float:
    """Return the number of entries per token of an encoder with these arguments.

    Raises:
        ValueError: If the encoder has neither a budget nor a target, and no ``l0`` is given.
    """
    found = encoder.get("k") or encoder.get("target_l0") or l0
    if found is None:
        raise ValueError(
            f"--l0: expected the latents per token, because {encoder['name']} has no k or target_l0, got none. Give --l0 N."
        )
    return min(float(found), n_latents)


def sizes_of(recipe: Recipe, widths: dict[str, int], l0: float | None = None) -> DictionarySizes:
    """Return the sizes of the dictionary of a recipe with named hooks.

    Args:
        widths: Width of every hook.
        l0: Latents per token, for encoders without a budget.
    """
    with torch.device("meta"):
        dictionary = build_dictionary(dictionary_arguments(recipe, widths))
    spec = with_budget(recipe.dictionary.known_encoder)
    blocks = []
    for block in dictionary.blocks:
        W_enc, W_dec = block.weights.W_enc, block.weights.W_dec
        active = active_per_token(spec, W_enc.shape[0], l0)
        blocks.append(BlockSizes(W_enc.shape[0], W_enc.shape[1], W_dec.shape[1], active, W_enc is W_dec))
    total = sum(parameter.numel() for parameter in dictionary.parameters())
    encoder = build_encoder(spec)
    wide = isinstance(encoder, Calibrated) and encoder.has_thresholds
    joint = isinstance(dictionary, CrossLayerTranscoder) and dictionary.chooses_jointly
    return DictionarySizes(
        blocks=tuple(blocks),
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        other_numbers=total - sum(block.matrix_numbers for block in blocks),
        budgeted="k" in spec,
        batch_wide=wide or joint,
        passes=int(spec["k"]) if dictionary.tied else 1,
        unsplittable=undivided_latents(recipe),
    )


def run_sizes(recipes: Sequence[Recipe], given: Given) -> RunSizes:
    """Return the sizes of recipes that train together.

    Args:
        given: Figures for a language model that cannot be loaded, which then is not looked for.

    Raises:
        ValueError: If the model's configuration cannot be loaded and its width is not given, or a recipe needs a figure.
    """
    members = _members(recipes, given)
    widths = [_widths(member, given) for member in members]
    first, named = recipes[0], [member.recipe for member in members]
    hooks = {member.stream_key: member.recipe.dictionary.all_hooks for member in members}
    every = {hook: width for each in widths for hook, width in each.items()}
    dtype = first.harvest.dtype
    stored = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0 + 2 / first.harvest.block}[dtype]
    if first.harvest.gradients:
        stored += 4.0 if dtype == "float32" else 2.0
    context = first.text.context_length
    return RunSizes(
        dictionaries=tuple(sizes_of(recipe, width, given.l0) for recipe, width in zip(named, widths, strict=True)),
        row_numbers=tuple(sum(every[hook] for hook in stream) for stream in hooks.values()),
        tokens=first.tokens,
        batch_tokens=first.batch_tokens,
        accumulate=first.accumulate,
        fused=first.optimizer == "auto" and first.accumulate == 1,
        clipped=first.grad_clip is not None,
        half=first.precision == "bf16",
        model=_model_sizes(members, given),
        live=first.harvest.store is None,
        harvest_tokens=first.harvest.tokens or 0,
        # 16 bytes label a token.
        stored_bytes_per_token=16 + stored * sum(every.values()),
        read_per_token=context / max(1, context - first.harvest.exclude_leading),
        latents=first.distributed.latents,
    )


def named_recipes(recipes: Sequence[Recipe], given: Given) -> list[tuple[Recipe, dict[str, int]]]:
    """Return recipes with hooks named, and the widths of these, as ``run_sizes`` takes them."""
    return [(member.recipe, _widths(member, given)) for member in _members(recipes, given)]


def _members(recipes: Sequence[Recipe], given: Given) -> list[ResolvedRecipe]:
    if given.d_model is not None:
        return [_unloaded(recipe, given) for recipe in recipes]
    try:
        members = resolve_recipes(recipes)
        for member in members:
            _ = member.widths
    except ValueError as error:
        if recipes[0].model.id == "embedded":
            raise
        raise ValueError(f"{error}\nWithout the model's configuration, give --d-model and --parameters.") from None
    return members


def _widths(member: ResolvedRecipe, given: Given) -> dict[str, int]:
    hooks = member.recipe.dictionary.all_hooks
    return member.widths if given.d_model is None else dict.fromkeys(hooks, given.d_model)


def _unloaded(recipe: Recipe, given: Given) -> ResolvedRecipe:
    """Return a recipe with hooks named by layer, for a language model of which only sizes are known."""
    section = recipe.dictionary
    named = section if section.resolved else _by_layer(section, given)
    return ResolvedRecipe(recipe.model_copy(update={"dictionary": named}), ModelOutline(recipe.model))


def _by_layer(section: DictionarySection, given: Given) -> DictionarySection:
    if section.kind not in ("cross_layer_transcoder", "crosscoder"):
        hook = {"hook": f"layers.{section.layer}:out"}
        pair = {"hook_in": f"layers.{section.layer}:in", "hook_out": f"layers.{section.layer}:out"}
        return section.model_copy(update=hook if section.kind == "sae" else pair)
    if section.layers == "all" and given.layers is None:
        raise ValueError(
            "--layers: expected the number of layers, because dictionary.layers is all, got none. Give --layers N."
        )
    layers = range(given.layers or 0) if section.layers == "all" else section.layers
    assert layers is not None
    reads, writes = tuple(f"layers.{i}:in" for i in layers), tuple(f"layers.{i}:out" for i in layers)
    sides = {"hooks": writes} if section.kind == "crosscoder" else {"hook_in": reads, "hook_out": writes}
    return section.model_copy(update=sides)


def _model_sizes(members: Sequence[ResolvedRecipe], given: Given) -> ModelSizes | None:
    """Return the size of the language model; ``None`` if nothing tells it."""
    section, parameters, layers = members[0].recipe.model, given.parameters, given.layers
    if given.d_model is None:
        module = members[0].outline.model.module
        parameters = parameters or sum(parameter.numel() for parameter in module.parameters())
        layers = n_layers(module)
    if parameters is None:
        return None
    found = [hook_layer(hook) for member in members for hook in member.recipe.dictionary.all_hooks]
    last = max((layer for layer in found if layer is not None), default=None)
    share = 1.0 if last is None or layers is None else min(1.0, (last + 1) / layers)
    return ModelSizes(parameters, share, MODEL_BYTES[section.dtype])


def hook_layer(hook: str) -> int | None:
    """Return the number of the block in a hook's path; ``None`` if there is none.

    >>> hook_layer("transformer.h.2.mlp:out"), hook_layer("embedding:out")
    (2, None)
    """
    numbers = [part for part in hook.split(":")[0].split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def split(sizes: DictionarySizes, latents: int) -> DictionarySizes:
    """Return the part of a dictionary that one of ``latents`` ranks holds; entries are spread evenly over them."""
    blocks = tuple(
        replace(block, n_latents=block.n_latents // latents, active=block.active / latents) for block in sizes.blocks
    )
    return replace(sizes, blocks=blocks, other_numbers=-(-sizes.other_numbers // latents))
