"""Resolution of recipes against their language model: layers and sites become hooks, whose widths are looked up."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..sae.files import natural_order
from .activations.hidden_states import HookError
from .activations.limits import context_problems, tokenizer_problems, untrained_positions
from .activations.model import LanguageModel, each_model, load_model, load_model_for, skeleton
from .activations.model_source import load_tokenizer, section_content
from .activations.prompt import HookInfo
from .activations.sites import TWO_SIDED, hooks_with_sites, n_layers, site_hooks, sites_of
from .activations.vector_files import VectorFiles
from .content import Content
from .recipe import AlignSection, DictionarySection, ModelSection, Recipe, TextSection
from .recipe.encoder_checks import with_budget
from .recipe.grid import told_together
from .recipe.hook_names import theirs, unharvested
from .recipe.start_schema import MLP_START
from .tokens import tokenizer_digest
from .transformer_lens_hooks import hooks_named, module_hook, with_module_hooks
from .warm_start.alignment import StartAlignment, recorded_model, require_alignable
from .warm_start.mlp import mlp_source
from .warm_start.source import StartSource, read_start, with_start

log = logging.getLogger(__name__)
# Assumed width if only running the model would show it and its configuration has no hidden size.
ANY_WIDTH = 1024


class ModelOutline:
    """A language model without weights, built lazily and once from its configuration.

    ``assumed`` holds the hooks whose width cannot be known before the model runs.
    """

    def __init__(self, section: ModelSection, given: LanguageModel | None = None):
        self.section, self._given = section, given
        self.assumed: set[str] = set()
        self._widths: dict[tuple[str, ...], dict[str, int]] = {}
        self._text_problems: dict[TextSection, list[str]] = {}

    @cached_property
    def model(self) -> LanguageModel:
        """Model without weights, or with weights if it cannot be built otherwise."""
        if self._given is not None:
            return self._given
        try:
            return skeleton(self.section)
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model's constructor raises
            log.info("%s could not be built without its weights (%s): loading them.", self.section.id, _brief(error))
            return load_model(self.section)

    def loaded(self) -> LanguageModel:
        """Return the model with its weights: the one in memory if there is one."""
        return load_model(self.section) if self._given is None else self._given

    def loaded_for(self, hooks: tuple[str, ...]) -> LanguageModel:
        """Return a model that gives the activations at these hooks, and possibly nothing else; as ``loaded`` in memory."""
        return load_model_for(self.section, hooks, self.model) if self._given is None else self._given

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the model, loaded on first use."""
        return load_tokenizer(self.section) if self._given is None else self._given.tokenizer

    @cached_property
    def content(self) -> Content:
        """Content digests of model and tokenizer, computed on first use."""
        return section_content(self.section) if self._given is None else self._given.content()

    def tokenizer_sha256(self) -> str | None:
        """Return the digest of the tokenizer: equal for those that give equal ids; ``None`` if there is no tokenizer."""
        return None if self.tokenizer is None else tokenizer_digest(self.tokenizer)

    def widths(self, hooks: tuple[str, ...]) -> dict[str, int]:
        """Return the width of every hook; at ``assumed`` ones, the model's hidden size.

        Raises:
            ValueError: If the configuration cannot be loaded, or a hook does not exist or holds no hidden states.
        """
        if hooks not in self._widths:
            for hook in hooks:
                self.model.find(hook)
            try:
                found = self.model.widths(hooks)
            except HookError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a model's code raises
                log.info("%s could not be run without its weights (%s).", self.section.id, _brief(error))
                config = getattr(self.model.module, "config", None)
                found = dict.fromkeys(hooks, getattr(config, "hidden_size", None) or ANY_WIDTH)
                self.assumed.update(hooks)
            self._widths[hooks] = found
        return self._widths[hooks]

    def hooks(self) -> list[HookInfo]:
        """Return the hooks at the sites of every block; a width that is known only when the model runs is ``None``.

        Raises:
            ValueError: If the configuration cannot be loaded, or the model's blocks are not found.
        """
        found = hooks_with_sites(self.model.module)
        widths = self.widths(tuple(found))
        known = {hook: None if hook in self.assumed else width for hook, width in widths.items()}
        return [HookInfo(hook, known[hook], layer, sites) for hook, (layer, sites) in found.items()]

    def text_problems(self, text: TextSection) -> list[str]:
        """Return one line for each way in which the text's contexts or the tokenizer do not fit the model."""
        if text not in self._text_problems:
            length, found = text.context_length, []
            for model in each_model(self.model):
                found += context_problems(model, length) or untrained_positions(model, length)
                found += tokenizer_problems(model, self.tokenizer, text)
            self._text_problems[text] = found
        return self._text_problems[text]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with its hooks named, in the dictionary and in ``harvest.hooks``, and the outline of its model.

    ``resolve_recipes`` creates it once per command; harvesting, planning and training require it.
    """

    recipe: Recipe
    outline: ModelOutline = field(compare=False, repr=False)
    # What a warm start begins with; ``None`` without one, and for a run that resumes.
    source: StartSource | None = field(default=None, compare=False, repr=False)

    @property
    def widths(self) -> dict[str, int]:
        """Width of every harvested hook. If the recipe names its hooks, this first reads the model's configuration."""
        return self.outline.widths(self.recipe.harvest.hooks)

    def content(self) -> Content:
        """Return the current content digests of the model and tokenizer, or of the files of vectors."""
        return self.vectors.content if self.vectors is not None else self.outline.content

    @cached_property
    def vectors(self) -> VectorFiles | None:
        """Files of vectors that the recipe names in place of a model, opened once; ``None`` if it names none."""
        return VectorFiles(self.recipe.harvest) if self.recipe.harvest.files else None

    @property
    def stream_key(self) -> tuple[Any, ...]:
        """Key of everything that decides which batches the recipe gets, in which order. Equal keys share a stream."""
        recipe, section = self.recipe, self.recipe.dictionary
        return recipe.batch_tokens, section.hooks_in, section.hooks_out, recipe.seed, recipe.uses_kl

    def another_run(self, out_dir: str, seed: int | None = None) -> "ResolvedRecipe":
        """Return the recipe with another directory and, optionally, another seed."""
        seed = self.recipe.seed if seed is None else seed
        return replace(self, recipe=self.recipe.model_copy(update={"out_dir": out_dir, "seed": seed}))


def resolve_recipe(recipe: Recipe) -> ResolvedRecipe:
    """Resolve one recipe; see ``resolve_recipes``."""
    return resolve_recipes([recipe])[0]


def resolve_recipes(recipes: Sequence[Recipe], model: LanguageModel | None = None) -> list[ResolvedRecipe]:
    """Replace layers and sites by hooks, and set ``harvest.hooks`` to the hooks that the recipes need together.

    This reads only the model's configuration, and not even that if all hooks are named. A recipe that was resolved and saved
    before stays as it is.

    Raises:
        ValueError: If the model lacks a layer or site, the kind of dictionary does not fit the site, or hooks are missing from
            ``harvest.hooks``. The message has one line for each affected member, or one for all.
    """
    outlines: dict[ModelSection, ModelOutline] = {}
    sections: list[DictionarySection] = []
    problems: dict[str, list[str]] = {}
    sources: list[StartSource | None] = []
    recipes = list(recipes)
    for number, recipe in enumerate(recipes):
        section, outline = recipe.dictionary, outlines.setdefault(recipe.model, ModelOutline(recipe.model, model))
        source = None
        try:
            if any(theirs(hook) for hook in hooks_named(recipe)):
                recipe = recipes[number] = with_module_hooks(recipe, outline.model)
                section = recipe.dictionary
            if not section.resolved:
                section = _named(section, outline.model)
            section, source = with_start(recipe.model_copy(update={"dictionary": section}), _reader(recipe, outline))
        except ValueError as error:
            problems[Path(recipe.out_dir).name] = [str(error)]
        else:
            lines = unharvested(recipe, "dictionary.site", section.all_hooks)
            problems |= {Path(recipe.out_dir).name: lines} if lines else {}
        sections.append(section)
        sources.append(source)
    if problems:
        raise ValueError("\n".join(told_together(problems, len(recipes))))
    needed = tuple(sorted({hook for section in sections for hook in section.all_hooks}, key=natural_order))
    found = []
    for recipe, section, source in zip(recipes, sections, sources, strict=True):
        harvest = recipe.harvest.model_copy(update={"hooks": recipe.harvest.hooks or needed})
        changed = recipe.model_copy(update={"dictionary": section, "harvest": harvest})
        found.append(ResolvedRecipe(changed, outlines[recipe.model], source))
    return found


def _reader(recipe: Recipe, outline: ModelOutline) -> Callable[[DictionarySection], StartSource]:
    """Return what reads a recipe's start: from files, or from the weights of the model."""

    def read(section: DictionarySection) -> StartSource:
        if section.start is None or section.start.path != MLP_START:
            source = read_start(section)
            align = None if section.start is None else section.start.align
            return source if align is None else replace(source, alignment=_alignment(source, align, section, recipe, outline))
        return mlp_source(section, outline.model, lambda: outline.loaded_for(section.all_hooks))

    return read


def _alignment(
    source: StartSource, align: AlignSection, section: DictionarySection, recipe: Recipe, outline: ModelOutline
) -> StartAlignment:
    """Return the alignment of a start, by the model that its files record where the section names no source.

    Raises:
        ValueError: If no map can be folded into the dictionary, or its files record no model and none is named.
    """
    require_alignable(source.place, source.dictionary)
    run_hooks = (section.hooks_in, section.hooks_out)
    # Names of vectors that are no model's say nothing.
    hooks = source.hooks if source.recorded and all(source.hooks) else run_hooks
    found = StartAlignment(align, hooks, run_hooks, outline)
    if align.store is not None or align.files or align.unpaired:
        return found
    model = None if align.model is None else ModelSection.model_validate(align.model.model_dump())
    model = model or recorded_model(source.recorded, recipe.model)
    if model is None:
        raise ValueError(
            f"dictionary.start.align: {source.place} does not record the model that it was trained on. Name it (align: MODEL), "
            "its store or files, or choose align: unpaired."
        )
    own = ModelOutline(model)
    named = (tuple(module_hook(own.model, hook) if theirs(hook) else hook for hook in side) for side in hooks)
    return replace(found, own=own, hooks=(next(named), next(named)))


def _named(section: DictionarySection, model: LanguageModel) -> DictionarySection:
    """Return the section with the hooks of its layers and site."""
    assert section.site is not None
    if section.kind in ("cross_layer_transcoder", "crosscoder"):
        layers = tuple(range(n_layers(model.module))) if section.layers == "all" else section.layers
        assert isinstance(layers, tuple)
    else:
        assert section.layer is not None
        layers = (section.layer,)
    pairs = [site_hooks(model.module, layer, section.site) for layer in layers]
    two_sided = section.two_sided
    if two_sided != (section.site in TWO_SIDED):
        choices = ", ".join(site for site in sites_of(model.module) if (site in TWO_SIDED) == two_sided)
        does = "predicts one tensor from another" if two_sided else "reconstructs what it reads"
        raise ValueError(
            f"dictionary.site: expected one of {choices}, because kind {section.kind} {does}, got {section.site!r}."
        )
    reads, writes = (tuple(side) for side in zip(*pairs, strict=True))
    hooks: dict[str, Any] = {"hook_in": reads, "hook_out": writes}
    if section.kind == "sae":
        hooks = {"hook": reads[0]}
    elif section.kind == "crosscoder":
        hooks = {"hooks": reads}
    elif section.kind == "transcoder":
        hooks = {"hook_in": reads[0], "hook_out": writes[0]}
    return section.model_copy(update={"layer": None, "layers": None, "site": None} | hooks)


def dictionary_arguments(recipe: Recipe, widths: Mapping[str, int]) -> dict[str, Any]:
    """Return the arguments of ``build_dictionary`` for a recipe with named hooks, given the width of every hook.

    Raises:
        ValueError: If the layers of a cross-layer dictionary differ in width.
    """
    section = recipe.dictionary
    reads, writes = ([widths[hook] for hook in hooks] for hooks in (section.hooks_in, section.hooks_out))
    for key, sizes in (("hook_in", reads), ("hook_out", writes)):
        if len(set(sizes)) > 1 and section.built_kind == "cross_layer_transcoder":
            key = "hooks" if section.causal else key
            raise ValueError(f"dictionary.{key}: expected one width at all layers, got {', '.join(map(str, sizes))}.")
    n_latents, spec = section.known_n_latents, section.known_encoder
    # A budget that is the start's l0 on the initial sample is not known yet.
    spec = spec if section.start is None else with_budget(spec)
    arguments = {"kind": section.built_kind, "d_in": sum(reads), "encoder": spec}
    arguments |= {} if section.row_norm is None else {"row_norm": section.row_norm}
    match section.built_kind:
        case "sae":
            return arguments | {"n_latents": n_latents}
        case "crosscoder":
            names = list(section.hooks_in)
            return {"kind": section.kind, "widths": reads, "n_latents": n_latents, "names": names, "encoder": spec}
        case "transcoder":
            return arguments | {"d_out": sum(writes), "n_latents": n_latents, "skip": section.skip}
        case "cross_layer_transcoder":
            sizes = {"d_out": sum(writes), "n_latents": len(reads) * n_latents, "n_layers": len(reads)}
            return arguments | sizes | {"joint": section.joint} | ({"skip": True} if section.skip else {})
