"""Expansion of a recipe's ``grid:`` into members: ordinary recipes, each with a readable name and its own directory.

A mapping of keys to lists expands to all combinations, a list of mappings to hand-picked members::

    grid: {dictionary.n_latents: [512, 1024], dictionary.encoder.k: [8, 16], seed: [0, 1]}
    grid: [{lr: 1e-3}, {name: wide, dictionary.n_latents: 2048, dictionary.encoder: {name: mutual_choice, k: 8}}]
"""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import Recipe, RecipeSource, check_recipe, flat_keys, override, read_values

# Keys, or whole sections, that belong to the stream, model or accelerator that all members share.
SHARED = ("model", "text", "harvest", "precision", "accumulate", "distributed")
# Longer names of members' directories do not fit every file system.
NAME_LENGTH = 120


@dataclass(frozen=True)
class Grid:
    """Recipes that train together, in directories below ``out_dir``. A recipe without a grid is alone, in ``out_dir``."""

    out_dir: str
    recipes: tuple[Recipe, ...]

    @property
    def names(self) -> list[str]:
        """Names of the members, which are the last parts of their directories."""
        return [Path(recipe.out_dir).name for recipe in self.recipes]


def load_grid(source: RecipeSource, overrides: Mapping[str, Any] | None = None) -> Grid:
    """Load a recipe, apply overrides, and validate it and all members of its grid, if it has one.

    Raises:
        ValueError: With one line per mistake; those of a single member under its name.
    """
    return check_grid(read_values(source, overrides), "recipe" if isinstance(source, Mapping) else str(source))


def check_grid(values: dict[str, Any], where: str) -> Grid:
    """Validate parsed YAML and return the members; ``where`` is the prefix of every line of an error."""
    if "grid" not in values:
        recipe = check_recipe(values, where)
        return Grid(recipe.out_dir, (recipe,))
    base = {key: value for key, value in values.items() if key != "grid"}
    changes = _changes(values["grid"], where)
    names = _names(changes, where)
    problems: dict[str, list[str]] = {}
    recipes: dict[str, Recipe] = {}
    for name, change in zip(names, changes, strict=True):
        try:
            recipes[name] = check_recipe(_changed(base, change, name), where)
        except ValueError as error:
            problems[name] = [line.removeprefix(f"{where}: ") for line in str(error).splitlines()]
    lines = told_together(problems, len(changes)) + unshared(recipes)
    if lines:
        raise ValueError("\n".join(f"{where}: {line}" for line in lines))
    return Grid(str(base["out_dir"]), tuple(recipes.values()))


def told_together(problems: Mapping[str, list[str]], members: int) -> list[str]:
    """Return problems that all members share once, and the others under each member's name."""
    counts = Counter(line for lines in problems.values() for line in dict.fromkeys(lines))
    common = [line for line, count in counts.items() if count == members]
    return common + [f"grid {name}: {line}" for name, lines in problems.items() for line in lines if line not in common]


def unshared(recipes: Mapping[str, Recipe]) -> list[str]:
    """Return one line for each key that members must share and do not."""
    values = {name: flat_keys(recipe.model_dump(mode="json", include=set(SHARED))) for name, recipe in recipes.items()}
    (first, expected), *others = values.items() or [("", {})]
    found: dict[str, str] = {}
    for name, own in others:
        for key in sorted(expected.keys() | own.keys()):
            if own.get(key) != expected.get(key):
                line = (
                    f"grid: {key}: expected one value for all members, which share what they read and run on, got "
                    f"{expected.get(key)!r} in {first} and {own.get(key)!r} in {name}. Make a recipe of each."
                )
                found.setdefault(key, line)
    return list(found.values())


def _changes(grid: Any, where: str) -> list[dict[str, Any]]:
    """Return every member's changes by dotted key, including ``name`` if given."""
    form = "a mapping of keys to lists of values, or a list of mappings of keys to values"
    if not isinstance(grid, (dict, list)) or not grid:
        raise ValueError(f"{where}: grid: expected {form}, got {grid!r}.")
    if isinstance(grid, dict):
        axes = flat_keys(grid) or {"": {}}
        problems = [f"grid.{key}: {problem}" for key, choices in axes.items() if (problem := _axis_problem(key, choices))]
        changes = [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())] if not problems else []
    else:
        changes = grid
        problems = [f"grid.{number}: {problem}" for number, change in enumerate(grid) if (problem := _change_problem(change))]
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return changes


def _axis_problem(key: str, choices: Any) -> str:
    if key in ("out_dir", "name", "base", "grid"):
        return _key_problem(key)
    if not isinstance(choices, list) or not choices:
        return f"expected a list of values, got {choices!r}. Write {key}: [...], or leave it out of the grid."
    twice = [choice for number, choice in enumerate(choices) if choice in choices[:number]]
    return f"expected values that differ, got {twice[0]!r} twice." if twice else ""


def _change_problem(change: Any) -> str:
    if not isinstance(change, dict) or not change or not all(isinstance(key, str) for key in change):
        return f"expected a mapping of the keys this member changes, got {change!r}."
    return next((_key_problem(key) for key in change if key in ("out_dir", "base", "grid")), "")


def _key_problem(key: str) -> str:
    if key == "out_dir":
        return "out_dir: every member's is out_dir/NAME. Set out_dir outside of the grid."
    if key == "name":
        return "name: combinations are named by what they change. Only members of a list are given a name."
    return f"{key}: expected a recipe's key, got one that stands above recipes. Leave it out of the grid."


def _names(changes: Sequence[dict[str, Any]], where: str) -> list[str]:
    """Return every member's directory name: its given name, or its changes, by the shortest unambiguous keys."""
    keys = list(dict.fromkeys(key for change in changes for key in change if key != "name"))
    short = {key: _shortest(key, keys) for key in keys}
    names, problems = [], []
    for number, change in enumerate(changes):
        given = change.get("name")
        parts = [f"{short[key]}={_word(value)}" for key, value in change.items() if key != "name"]
        name = given if given is not None else re.sub(r"[^\w.,=+-]+", "-", ",".join(parts))
        if not isinstance(name, str) or not re.fullmatch(r"[\w.,=+-]+", name) or name.startswith("."):
            problems.append(f"grid.{number}.name: expected letters, digits and any of - _ . , = +, got {name!r}.")
        elif len(name) > NAME_LENGTH:
            problems.append(f"grid: {name[:40]}...: too long for a directory. Write the grid as a list, each with a name.")
        elif name in names:
            problems.append(f"grid: expected members that differ, got {name} twice. Take one out, or give each a name.")
        names.append(str(name))
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in dict.fromkeys(problems)))
    return names


def _shortest(key: str, keys: list[str]) -> str:
    """Return the shortest suffix of a dotted key that no other key ends in."""
    parts = key.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    return next(end for end in ends if sum(other == end or other.endswith(f".{end}") for other in keys) == 1 or end == key)


def _word(value: Any) -> str:
    """Return a value as part of a name; an encoder as its variant and arguments."""
    if isinstance(value, dict):
        return "-".join(_word(part) if key == "name" else f"{key}{_word(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "+".join(map(_word, value))
    # Spelled as in YAML.
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _changed(base: dict[str, Any], change: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a member's unchecked values. Changes apply in order: first the encoder, then its k."""
    values = copy.deepcopy(base)
    for key, value in change.items():
        if key != "name":
            override(values, key, copy.deepcopy(value))
    if isinstance(values.get("out_dir"), str):
        values["out_dir"] = str(Path(values["out_dir"]) / name)
    if isinstance(values.get("wandb"), dict):
        values["wandb"]["name"] = f"{values['wandb'].get('name') or ''} {name}".strip()
    return values
