"""Base class of recipe sections, and the types of their values."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from ...sae.files import at_home


class Section(BaseModel):
    """Base class of recipe sections: strict (no unknown keys, no coercion) and frozen (a run's state is in ``state.py``)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


# YAML has lists where a frozen section has tuples.
Place = Annotated[str, AfterValidator(at_home)]
Places = Annotated[tuple[Place, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
OnBadRow = Literal["skip", "error"]
ObjectiveName = Literal["reconstruction", "kl"]
# Roles of a chat's messages, and of what the template puts around them.
Role = Literal["system", "developer", "user", "assistant", "tool", "template"]
Roles = Annotated[tuple[Role, ...], Field(strict=False)]


def _hooks(value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, (list, tuple)) and value and all(isinstance(hook, str) for hook in value):
        return tuple(value)
    if value is None or isinstance(value, str):
        return value
    raise ValueError("a hook, or a list of hooks")


def _layers(value: Any) -> Literal["all"] | tuple[int, ...] | None:
    if isinstance(value, (list, tuple)) and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in value):
        return tuple(value)
    if value in (None, "all"):
        return value
    raise ValueError("all, or a list of layers")


def _columns(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    if isinstance(value, str):
        return value
    raise ValueError("a column, or a list of columns")


def _token(value: Any) -> int | str:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("a token, as text or as its id")


def _rate(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value > 0:
            return float(value)
        raise ValueError("greater than 0")
    raise ValueError("a valid number, or auto")


def _betas(value: Any) -> tuple[float, float] | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_share(each) for each in value):
        return (float(value[0]), float(value[1]))
    raise ValueError("two numbers from 0 to below 1, or auto")


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


# Unions with validators of their own, because pydantic would report an error for every part.
_listed = PlainSerializer(lambda value: list(value) if isinstance(value, tuple) else value)
Hooks = Annotated[str | tuple[str, ...] | None, PlainValidator(_hooks), _listed]
Columns = Annotated[str | tuple[str, ...], PlainValidator(_columns), _listed]
Token = Annotated[int | str, PlainValidator(_token)]
Rate = Annotated[float | Literal["auto"], PlainValidator(_rate)]
Betas = Annotated[tuple[float, float] | Literal["auto"], PlainValidator(_betas), _listed]
Layers = Annotated[Literal["all"] | tuple[int, ...] | None, PlainValidator(_layers), _listed]
