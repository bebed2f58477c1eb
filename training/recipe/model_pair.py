"""Recipes of two models: ``models: [BASE, TUNED]`` in place of ``model``, with each hook given once for both."""

from collections.abc import Mapping
from typing import Any, TypeGuard

NAMES = ("base", "tuned")
# Keys of a dictionary section that name hooks.
HOOK_KEYS = ("hook", "hooks", "hook_in", "hook_out")


def with_pair(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return unchecked values with ``models`` written as ``model`` with ``tuned``, and one line per mistake.

    Keys of ``model`` hold for both models; those of the base also hold for the tuned model, which overrides them.

    >>> pair, _ = with_pair({"models": ["gpt2", "runs/tuned"], "dictionary": {"kind": "crosscoder", "hook": "h.2:out"}})
    >>> pair["model"], pair["dictionary"]["hooks"]
    ({'id': 'gpt2', 'tuned': {'id': 'runs/tuned'}}, ['base/h.2:out', 'tuned/h.2:out'])
    """
    if "models" not in values:
        return values, []
    given, shared = values["models"], values.get("model")
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(isinstance(each, str | Mapping) for each in given):
        wanted = "a list of two models, the base and the tuned one, each an id, a directory or a section like model"
        return {key: value for key, value in values.items() if key != "models"}, [f"models: expected {wanted}, got {given!r}."]
    first, second = ({"id": each} if isinstance(each, str) else dict(each) for each in given)
    shared = dict(shared) if isinstance(shared, Mapping) else {}
    shared.pop("tuned", None)
    base = shared | first
    # The revision is one of the base's repository.
    tuned = {key: value for key, value in base.items() if key not in ("id", "revision")} | second
    changed = {key: value for key, value in values.items() if key != "models"} | {"model": base | {"tuned": tuned}}
    if isinstance(values.get("dictionary"), Mapping):
        changed["dictionary"] = _with_both(dict(values["dictionary"]))
    harvest = values.get("harvest")
    if isinstance(harvest, Mapping) and _are_plain(harvest.get("hooks")):
        changed["harvest"] = dict(harvest) | {"hooks": [f"{name}/{hook}" for name in NAMES for hook in harvest["hooks"]]}
    return changed, []


def _with_both(section: dict[str, Any]) -> dict[str, Any]:
    """Return a crosscoder's section whose hooks name their model: one is that of both, the second of two is the tuned one's."""
    if section.get("kind") != "crosscoder":
        return section
    given = section.get("hooks", section.get("hook"))
    hooks = [given] if isinstance(given, str) else given
    if not _are_plain(hooks) or len(hooks) > 2:
        return section
    section.pop("hook", None)
    first, *others = hooks
    return section | {"hooks": [f"{name}/{hook}" for name, hook in zip(NAMES, (first, *(others or [first])), strict=True)]}


def _are_plain(hooks: Any) -> TypeGuard[list[str]]:
    """Return True for a list of hooks that name no model."""
    return isinstance(hooks, list | tuple) and bool(hooks) and all(isinstance(h, str) and "/" not in h for h in hooks)


def pair_problems(model: Any, hooks: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return one line for each hook that does not say which of two models it belongs to, or does with one model.

    Args:
        model: Model section of the recipe.
        hooks: Hooks by the recipe key that names them.
    """
    problems = []
    for key, several in hooks.items():
        for hook in several:
            name, slash, _ = hook.partition("/")
            if model.tuned is not None and (not slash or name not in NAMES):
                problems.append(
                    f"{key}: expected a hook of the base or the tuned model, like base/{hook.rpartition('/')[2]}, got {hook!r}."
                )
            elif model.tuned is None and slash and name in NAMES:
                problems.append(
                    f"{key}: expected a hook of one model, got {hook!r}. Name both models: models: [{model.id}, TUNED]."
                )
    return problems
