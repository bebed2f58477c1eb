"""Hooks of a recipe in TransformerLens's spelling, read as hooks of the model's own modules."""

import logging

from ..sae.formats.hooks import architecture_of, to_module
from .activations.model import LanguageModel
from .activations.sites import site_hooks
from .recipe import Recipe
from .recipe.hook_names import PLACES, SITES, theirs

log = logging.getLogger(__name__)
_told: list[str] = []
NOTE = (
    "TransformerLens by default centres what is written to the residual stream and folds the weights of norms into the next "
    "matrices (center_writing_weights, fold_ln). Activations here are those of the model itself: of a model with LayerNorm, "
    "the residual stream there is without each token's mean."
)


def module_hook(model: LanguageModel, hook: str) -> str:
    """Return the module path and side that a hook of TransformerLens's spelling stands for; others as they are.

    Raises:
        ValueError: If the model has no such layer or place.
    """
    found = theirs(hook)
    if found is None:
        return hook
    layer, place = found
    kind = str(getattr(getattr(model.module, "config", None), "model_type", ""))
    site = PLACES.get(place, "")
    # Where outputs are normalized before they are added, theirs are the normalized ones, and the sites' are not.
    if site in SITES and not (site in ("attn_out", "mlp_out") and architecture_of(kind) == "gemma2"):
        return site_hooks(model.module, layer, site)[0]
    path = to_module(f"blocks.{layer}.{place}", kind)
    if path is None or path.rpartition(":")[0] not in dict(model.module.named_modules()):
        raise ValueError(
            f"hook {hook}: expected a place that is known in {model.id}, got {place}. Give the module's own path: `sparsary "
            f"hooks {model.id}` lists them."
        )
    return path


def with_module_hooks(recipe: Recipe, model: LanguageModel) -> Recipe:
    """Return a recipe in which hooks of TransformerLens's spelling are replaced, and log what they are read as."""
    named = {hook: module_hook(model, hook) for hook in hooks_named(recipe) if theirs(hook) is not None}
    for hook, path in named.items():
        log.info("%s: read as %s.", hook, path)
    if not _told:
        _told.append(NOTE)
        log.warning("%s", NOTE)

    def own(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return tuple(named.get(hook, hook) for hook in value) if isinstance(value, tuple) else named.get(value or "", value)

    section, keys = recipe.dictionary, ("hook", "hooks", "hook_in", "hook_out")
    return recipe.model_copy(
        update={
            "dictionary": section.model_copy(update={key: own(getattr(section, key)) for key in keys}),
            "harvest": recipe.harvest.model_copy(update={"hooks": own(recipe.harvest.hooks)}),
        }
    )


def hooks_named(recipe: Recipe) -> tuple[str, ...]:
    """Return the hooks that a recipe names, each once."""
    return tuple(dict.fromkeys((*(recipe.dictionary.all_hooks if recipe.dictionary.resolved else ()), *recipe.harvest.hooks)))
