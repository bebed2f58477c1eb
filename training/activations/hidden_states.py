"""Find the hidden states in what a module reads or returns, and put others in their place.

Modules return tensors, tuples, lists, mappings, dataclasses (transformers' ``ModelOutput``), one within another. The path to
the hidden states is the value itself, its first element, its ``last_hidden_state``, or the only tensor of floating point
numbers with three axes.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

# Keys by which modules name their hidden states.
NAMES = ("last_hidden_state", "hidden_states", "hidden_state")
TensorPath = tuple[Any, ...]


class HookError(ValueError):
    """A hook that the model does not have, or where it holds no hidden states."""


def path_in(value: Any, names: tuple[str, ...] = NAMES) -> TensorPath:
    """Return the path to the hidden states in a value.

    Args:
        names: Keys that are tried first where the value is a mapping.

    Raises:
        LookupError: If there are none, or several that may be meant; says what the value holds.
    """
    if isinstance(value, Tensor):
        return ()
    items = dict(_items(value))
    if isinstance(value, (tuple, list)):
        named = 0 if isinstance(items.get(0), Tensor) else None
    else:
        named = next((name for name in names if isinstance(items.get(name), Tensor)), None)
    if named is not None:
        return (named,)
    found = [(path, x) for path, x in _tensors(value) if x.is_floating_point() and x.ndim == 3]
    if len(found) == 1:
        return found[0][0]
    held = ", ".join(f"{_spelt(path)} {tuple(x.shape)}" for path, x in found or list(_tensors(value)))
    raise LookupError(f"got {type(value).__name__} of {held}" if held else f"got {type(value).__name__} without a tensor")


def path_in_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TensorPath:
    """Return the path to the hidden states in ``(args, kwargs)``, with which ``module`` is called.

    Raises:
        LookupError: As ``path_in``.
    """
    if args:
        try:
            return (0, 0, *path_in(args[0]))
        except LookupError:
            return (0, *path_in(args))
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return (1, *path_in(kwargs, (first, *NAMES)))


def tensor_at(value: Any, path: TensorPath) -> Tensor:
    """Return the tensor at a path."""
    for key in path:
        value = _item(value, key)
    return value


def with_tensor(value: Any, path: TensorPath, tensor: Tensor) -> Any:
    """Return the value with another tensor at a path; what holds it is copied, not written to."""
    if not path:
        return tensor
    key, *rest = path
    changed = with_tensor(_item(value, key), tuple(rest), tensor)
    if isinstance(value, tuple):
        items = [changed if index == key else item for index, item in enumerate(value)]
        # Named tuples take their items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    found = copy.copy(value)
    if isinstance(value, (list, Mapping)):
        found[key] = changed  # pyright: ignore[reportIndexIssue]
    else:
        setattr(found, key, changed)
    return found


def _item(value: Any, key: Any) -> Any:
    return value[key] if isinstance(value, (tuple, list, Mapping)) else getattr(value, key)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _tensors(value: Any, path: TensorPath = ()) -> Iterator[tuple[TensorPath, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    for key, item in _items(value):
        yield from _tensors(item, (*path, key))


def _spelt(path: TensorPath) -> str:
    return ".".join(map(str, path)) or "a tensor"


class PassLayout:
    """The axes of hidden states in the passes of one model, which is run on token ids ``(contexts, positions)``.

    Some modules lay all tokens of a batch in one row (OPT's MLPs), some have positions before contexts (XLNet's blocks).
    Where there are as many contexts as positions, shapes cannot tell the latter: the model is then run on other ids once.
    """

    def __init__(self) -> None:
        self._shape: tuple[int, int] | None = None
        self._positions_first: dict[str, bool] = {}
        self._hooks: set[str] = set()
        self._trying = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the shape of the token ids, before a pass of the whole model."""
        if self._trying:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._shape = (ids.shape[0], ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 2 else None
        if self._shape is not None and self._shape[0] == self._shape[1] > 1 and self._hooks - self._positions_first.keys():
            assert isinstance(ids, Tensor)
            self._trying = True
            try:
                # What fails here fails in the pass itself, and is told there.
                with suppress(Exception), torch.no_grad():
                    module(input_ids=ids[:1, :1].expand(2, 3), use_cache=False)
            finally:
                self._trying = False
            self._positions_first = dict.fromkeys(self._hooks, False) | self._positions_first

    def reading(self, hook: str, reader: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        """Return a reader of tensors as the module has them, for one of ``(contexts, positions, width)``."""
        self._hooks.add(hook)

        def read(x: Tensor) -> Tensor | None:
            if self._trying:
                self._positions_first.setdefault(hook, x.shape[:2] == (3, 2))
                return None
            if self._shape is None:
                return reader(x)
            contexts, positions = self._shape
            if not x.is_floating_point():
                raise _misshapen(hook, x, self._shape)
            if x.ndim == 2 and x.shape[0] == contexts * positions:
                changed = reader(x.reshape(contexts, positions, -1))
                return None if changed is None else changed.reshape(x.shape)
            if x.ndim == 3 and x.shape[:2] == (contexts, positions) and not self._positions_first.get(hook):
                return reader(x)
            if x.ndim == 3 and x.shape[:2] == (positions, contexts):
                changed = reader(x.transpose(0, 1))
                return None if changed is None else changed.transpose(0, 1)
            raise _misshapen(hook, x, self._shape)

        return read


def _misshapen(hook: str, x: Tensor, shape: tuple[int, int]) -> HookError:
    kind = "" if x.is_floating_point() else f" of {str(x.dtype).removeprefix('torch.')}"
    return HookError(
        f"hook {hook}: expected a tensor (contexts, positions, width) of {shape[0]} contexts and {shape[1]} positions, got "
        f"{tuple(x.shape)}{kind}. Choose another module or side."
    )
