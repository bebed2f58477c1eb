"""What a recipe leaves open until the model is known: which hooks a site of a layer has, and how large a dictionary is."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .activations.model import LanguageModel, skeleton
from .activations.sites import TWO_SIDED, n_layers, site_hooks, sites_of
from .recipe import DictionarySection, ModelSection, Recipe
from .recipe.grid import told_together
from .recipe.validation import unharvested


def resolved(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The same recipes with hooks in place of layers and sites, and with all that they need together in ``harvest.hooks``.

    Of the model only the configuration is read, and nothing if all hooks are named. Resolved recipes stay as they are.

    Raises:
        ValueError: If the model lacks a layer or site, or the kind of dictionary cannot stand there, or hooks are missing from
            ``harvest.hooks``; with one line for each member it concerns, or one for all.
    """
    models: dict[ModelSection, LanguageModel] = {}
    sections: list[DictionarySection] = []
    problems: dict[str, list[str]] = {}
    for recipe in recipes:
        section = recipe.dictionary
        try:
            if not section.resolved:
                model = models.get(recipe.model) or models.setdefault(recipe.model, skeleton(recipe.model))
                section = _named(section, model)
        except ValueError as error:
            problems[Path(recipe.out_dir).name] = [str(error)]
        else:
            lines = unharvested(recipe, "dictionary.site", section.all_hooks)
            problems |= {Path(recipe.out_dir).name: lines} if lines else {}
        sections.append(section)
    if problems:
        raise ValueError("\n".join(told_together(problems, len(recipes))))
    needed = sorted({hook for section in sections for hook in section.all_hooks}, key=_by_layer)
    return [
        recipe.model_copy(
            update={
                "dictionary": section,
                "harvest": recipe.harvest.model_copy(update={"hooks": recipe.harvest.hooks or tuple(needed)}),
            }
        )
        for recipe, section in zip(recipes, sections, strict=True)
    ]


def _by_layer(hook: str) -> list[int | str]:
    """Layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", hook)]


def _named(section: DictionarySection, model: LanguageModel) -> DictionarySection:
    """The section with the hooks of its layer and site."""
    assert section.site is not None
    if section.kind == "cross_layer_transcoder":
        layers = tuple(range(n_layers(model.module))) if section.layers == "all" else section.layers
        assert isinstance(layers, tuple)
    else:
        assert section.layer is not None
        layers = (section.layer,)
    pairs = [site_hooks(model.module, layer, section.site) for layer in layers]
    two_sided = section.kind != "sae"
    if two_sided != (section.site in TWO_SIDED):
        choices = ", ".join(site for site in sites_of(model.module) if (site in TWO_SIDED) == two_sided)
        does = "reads one tensor and predicts another" if two_sided else "reconstructs one tensor"
        raise ValueError(f"dictionary.site: kind {section.kind} {does}: expected one of {choices}, got {section.site!r}.")
    reads, writes = (tuple(side) for side in zip(*pairs, strict=True))
    hooks: dict[str, Any] = {"hook_in": reads, "hook_out": writes}
    if section.kind == "sae":
        hooks = {"hook": reads[0]}
    elif section.kind == "transcoder":
        hooks = {"hook_in": reads[0], "hook_out": writes[0]}
    return section.model_copy(update={"layer": None, "layers": None, "site": None} | hooks)


def dictionary_arguments(recipe: Recipe, widths: Mapping[str, int]) -> dict[str, Any]:
    """What ``build_dictionary`` takes for a resolved recipe, given the width at every hook.

    Raises:
        ValueError: If the layers of a cross-layer transcoder are not equally wide.
    """
    section = recipe.dictionary
    reads, writes = ([widths[hook] for hook in hooks] for hooks in (section.hooks_in, section.hooks_out))
    for key, sizes in (("hook_in", reads), ("hook_out", writes)):
        if len(set(sizes)) > 1:
            raise ValueError(f"dictionary.{key}: expected one width at all layers, got {', '.join(map(str, sizes))}.")
    arguments = {"kind": section.kind, "d_in": sum(reads), "encoder": section.encoder}
    match section.kind:
        case "sae":
            return arguments | {"n_latents": section.n_latents}
        case "transcoder":
            return arguments | {"d_out": sum(writes), "n_latents": section.n_latents, "skip": section.skip}
        case "cross_layer_transcoder":
            sizes = {"d_out": sum(writes), "n_latents": len(reads) * section.n_latents, "n_layers": len(reads)}
            return arguments | sizes | {"joint": section.joint}
