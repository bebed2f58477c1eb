"""Spellings of hooks in a recipe: sites, and the names of TransformerLens."""

import re
from collections.abc import Iterable

from ...sae.formats.hooks import to_module
from ...sae.suggestions import did_you_mean
from .schema import Recipe

# Sites of a transformer block; their modules are found in the model.
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_heads", "attn_out", "mlp_in", "mlp_out", "mlp", "router")
# TransformerLens's names of the sites.
PLACES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_heads",
    "hook_attn_out": "attn_out",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
}
# Those that recipes take as they are. Their hook_mlp_in is before the norm, which no site is.
READ = (*(place for place in PLACES if place != "hook_mlp_in"), "mlp.hook_pre", "mlp.hook_post")


def theirs(hook: str) -> tuple[int, str] | None:
    """Return layer and place of a hook in TransformerLens's spelling that a recipe may name; None for other hooks."""
    found = re.fullmatch(rf"blocks\.(\d+)\.({'|'.join(map(re.escape, READ))})(?::out)?", hook)
    return (int(found[1]), found[2]) if found else None


def unharvested(recipe: Recipe, key: str, hooks: Iterable[str]) -> list[str]:
    """Return one line for each hook that is missing from ``harvest.hooks``, if those are given."""
    given = recipe.harvest.hooks
    return [
        f"{key}: expected one of harvest.hooks ({', '.join(given)}), got {hook!r}.{did_you_mean(hook, given)}"
        for hook in hooks
        if given and hook not in given
    ]


def check_hook(key: str, hook: str, model: str) -> list[str]:
    path, _, side = hook.rpartition(":")
    if theirs(hook) is not None:
        return []
    named = re.fullmatch(r"(?:blocks\.(\d+)\.)?((?:\w+\.)*hook_\w+)(?::(?:in|out))?", hook)
    if named is None and side in ("in", "out") and path:
        return []
    layer, place = named.groups() if named else (None, hook)
    module = to_module(hook.removesuffix(f":{side}"), model) if named else None
    site = PLACES.get(place, place)
    site = "mlp" if site in SITES and key.endswith(("hook_in", "hook_out")) else site
    fix = ""
    if module is not None:
        fix = f" In this model that is {module}."
    elif site in SITES:
        fix = f" Give dictionary.layer: {layer or 'N'} and dictionary.site: {site} in place of hooks."
    elif named:
        fix = " That is TransformerLens's name of a place for which there is no site. Give the module's own path in this model."
    wanted = "a module path and a side" + ("" if fix else f", like {hook.split(':')[0]}:out")
    return [f"{key}: expected {wanted}, got {hook!r}.{fix}"]
