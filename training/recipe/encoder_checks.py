"""Validation of encoders by their own arguments."""

import inspect
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ...sae.encoders import ENCODERS
from ...sae.suggestions import did_you_mean
from .messages import explain


def encoder_specs(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return every encoder in unchecked values, with its key."""
    section = values.get("dictionary")
    found = [("dictionary.encoder", section)]
    if isinstance(values.get("phases"), list):
        found += [(f"phases.{i}.encoder", phase) for i, phase in enumerate(values["phases"])]
    specs = [
        (key, section["encoder"])
        for key, section in found
        if isinstance(section, dict) and isinstance(section.get("encoder"), dict)
    ]
    started = isinstance(section, dict) and section.get("start") is not None
    return [(key, with_budget(spec) if started and key == "dictionary.encoder" else spec) for key, spec in specs]


def missing_budget(spec: dict[str, Any]) -> str | None:
    """Return the argument that is the number of active latents, if an encoder needs it and its spec leaves it out."""
    name = spec.get("name")
    takes = ENCODERS[name].parameters_of() if isinstance(name, str) and name in ENCODERS else {}
    if "k" in takes:
        return None if "k" in spec else "k"
    # With a weight of its own, a penalty needs no target.
    return "target_l0" if "target_l0" in takes and not {"target_l0", "sparsity"} & spec.keys() else None


def with_budget(spec: dict[str, Any], l0: float = 1) -> dict[str, Any]:
    """Return the spec with a missing number of active latents set to ``l0``: by default to one that is valid anywhere."""
    key = missing_budget(spec)
    return spec if key is None else spec | {key: max(1, round(l0)) if key == "k" else max(1.0, round(l0, 2))}


def check_encoder(spec: dict[str, Any], key: str) -> list[str]:
    name = spec.get("name")
    # Any YAML value, also one that cannot be looked up, such as a list.
    if not isinstance(name, str) or name not in ENCODERS:
        if name is None:
            return [f"{key}.name: required, but missing. Choose one of {', '.join(ENCODERS)}."]
        return [f"{key}.name: expected one of {', '.join(ENCODERS)}, got {name!r}.{did_you_mean(str(name), ENCODERS)}"]
    try:
        encoder_schema(name).model_validate({name: value for name, value in spec.items() if name != "name"})
    except ValidationError as error:
        takes = f"{name} takes {', '.join(ENCODERS[name].parameters_of())}."
        return [explain(problem, spec, tuple(key.split(".")), takes) for problem in error.errors()]
    return []


@cache
def encoder_schema(name: str) -> type[BaseModel]:
    """Return a strict schema made from an encoder's constructor."""
    fields: dict[str, Any] = {
        key: (p.annotation, ... if p.default is inspect.Parameter.empty else p.default)
        for key, p in ENCODERS[name].parameters_of().items()
    }
    return create_model(name, __config__=ConfigDict(strict=True, extra="forbid"), **fields)
