"""Recipes: YAML files, loaded into a validated and frozen configuration.

All mistakes in a recipe are reported at once, each with the nearest valid name. Types are never coerced; the loader reads
YAML 1.2, where ``1e-4`` is a number and ``no`` is a string.
"""

import copy
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ...sae.files import read_text
from .encoder_checks import check_encoder, encoder_specs
from .fields import Role
from .messages import explain
from .model_pair import with_pair
from .model_schema import ModelSection, TunedSection
from .schema import (
    DictionarySection,
    ExcludeSection,
    HarvestSection,
    PhaseSection,
    Recipe,
    calibrated_on,
    peak_lr,
    total_steps,
)
from .start_schema import AlignSection
from .text_schema import ChatSection, MixPart, TextSection, TextSource
from .validation import check_together

__all__ = [
    "AlignSection",
    "ChatSection",
    "DictionarySection",
    "ExcludeSection",
    "HarvestSection",
    "MixPart",
    "ModelSection",
    "PhaseSection",
    "Recipe",
    "RecipeSource",
    "Role",
    "TextSection",
    "TextSource",
    "TunedSection",
    "calibrated_on",
    "check_recipe",
    "differences",
    "dump_recipe",
    "flat_keys",
    "load_recipe",
    "override",
    "parse_overrides",
    "parse_yaml",
    "peak_lr",
    "read_values",
    "total_steps",
]

# A YAML file, or the same keys as a mapping.
RecipeSource = str | Path | Mapping[str, Any]

# Keys that may differ when a run is resumed, because they do not affect its results.
FREE_ON_RESUME = (
    *("out_dir", "log_every", "save_every", "wandb", "eval_tokens", "harvest.hooks", "harvest.cache_gb"),
    *("model.trust_remote_code", "model.device_map", "model.truncate"),
    *("model.tuned.trust_remote_code", "model.tuned.device_map", "model.tuned.truncate"),
    "distributed",
    *(f"{section}.{key}" for section in ("text", "harvest") for key in ("on_bad_row", "max_bad_share")),
)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe, apply overrides (``{"dictionary.n_latents": 512}``) and validate it.

    A recipe may name another as its ``base``, relative to itself, and then holds only the differences.

    Raises:
        ValueError: With one line per mistake.
    """
    values = read_values(path, overrides)
    if "grid" in values:
        raise ValueError(f"{path}: grid: expected a recipe of one run here, got several. Name one member's recipe.yaml.")
    return check_recipe(values, str(path))


def read_values(source: RecipeSource, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the unvalidated values of a recipe file or mapping, merged over its base's, with overrides applied."""
    if isinstance(source, Mapping):
        values = _based(copy.deepcopy(dict(source)), Path("recipe"), ())
    else:
        values = _read_values(Path(source), ())
    for key, value in (overrides or {}).items():
        override(values, key, value)
    return values


def _read_values(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return a recipe's unchecked values merged over those of its base."""
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(
            f"{path}: expected a recipe file, got none ({error.strerror}). Give the path of a YAML file."
        ) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of recipe keys, got {type(values).__name__}.")
    return _based(values, path, above)


def _based(values: dict[str, Any], path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return values merged over those of the recipe file that they name as their base, relative to ``path``."""
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or path.resolve() in above:
        raise ValueError(
            f"{path}: base: expected the name of another recipe file, which does not lead back here, got {base!r}."
        )
    return _merged(_read_values(path.parent / base, (*above, path.resolve())), values)


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Merge ``values`` over ``base``, section by section. An encoder is replaced whole: its arguments depend on its name."""
    merged = dict(base)
    for key, value in values.items():
        nested = key != "encoder" and isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if nested else value
    return merged


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML 1.2 document; duplicate keys are errors."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(f"{where}: expected YAML, got invalid YAML ({' '.join(str(error).split())}).") from None
    except RecursionError:
        raise ValueError(f"{where}: expected YAML nested a few levels deep, got hundreds.") from None


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Parse overrides such as ``["lr=1e-4", "dictionary.encoder.k=8"]`` into a mapping; values are YAML."""
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            path = f" There is no file or folder of that name{', either' if equals else ''}." if "/" in argument else ""
            raise ValueError(f"{argument!r}: expected key.sub=value, for example lr=1e-4.{path}")
        overrides[key] = parse_yaml(value, argument)
    return overrides


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key of unchecked values, in place; an old value is replaced whole."""
    *parents, last = key.split(".")
    for parent in parents:
        nested = values.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise ValueError(f"{key}: expected {parent} to be a section, got {nested!r}.")
        values = nested
    values[last] = value


# Keys of a dictionary's section that say where its activations are from.
NAMES_OF_HOOKS = {"hook", "hooks", "hook_in", "hook_out", "layer", "layers", "site"}


def _with_named_vectors(values: dict[str, Any]) -> dict[str, Any]:
    """Name the hook of a recipe that trains on files of vectors, where it names none: no model has it."""
    harvest, section = values.get("harvest"), values.get("dictionary")
    if not isinstance(section, dict) or not isinstance(harvest, dict):
        return values
    if section.keys() & NAMES_OF_HOOKS or not harvest.get("files"):
        return values
    return values | {"dictionary": section | {"hook": "vectors:out"}}


def check_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate parsed YAML and return the recipe.

    Args:
        where: Prefix of every line of an error.

    Raises:
        ValueError: With one line per mistake.
    """
    values, problems = with_pair(_with_named_vectors(values))
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += [explain(problem, values) for problem in error.errors()]
        recipe = _without_unknown(values, error)
    for key, spec in encoder_specs(values):
        problems += check_encoder(spec, key)
    if recipe is not None:
        problems += check_together(recipe)
    if problems or recipe is None:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return recipe


def _without_unknown(values: dict[str, Any], error: ValidationError) -> Recipe | None:
    """Return the recipe without its unknown keys if nothing else is wrong, so that the other checks can run at once."""
    values = copy.deepcopy(values)
    for problem in error.errors():
        *parents, last = problem["loc"]
        section: Any = values
        for part in parents:
            if isinstance(section, list) and isinstance(part, int):
                section = section[part]
            else:
                section = section.get(part) if isinstance(section, dict) else None
        if problem["type"] != "extra_forbidden" or not isinstance(section, dict):
            return None
        section.pop(last)
    return Recipe.model_validate(values)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with defaults written out. It loads back to an equal recipe."""
    buffer = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(TypeAdapter(Recipe).dump_python(recipe, mode="json"), buffer)
    return buffer.getvalue()


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return the keys, with both values, that keep ``new`` from resuming ``old``. More ``tokens`` do not: they lengthen it."""
    before, after = flat_keys(old.model_dump(mode="json")), flat_keys(new.model_dump(mode="json"))
    if new.tokens > old.tokens:
        after["tokens"] = before["tokens"]
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not {key, key.split(".")[0]} & set(FREE_ON_RESUME)
    ]


def flat_keys(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: leaf for key, value in values.items() for name, leaf in flat_keys(value, f"{prefix}.{key}".lstrip(".")).items()
    }
