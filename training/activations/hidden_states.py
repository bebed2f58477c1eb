"""Locate the hidden states in the inputs or outputs of a module, and replace them.

Modules return tensors, tuples, lists, mappings or dataclasses (transformers' ``ModelOutput``), possibly nested. The hidden
states are the value itself, its first element, its ``last_hidden_state``, or the only floating-point tensor with three axes.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

# Keys that modules use for their hidden states.
NAMES = ("last_hidden_state", "hidden_states", "hidden_state")
TensorPath = tuple[Any, ...]


class HookError(ValueError):
    """Error for a hook that the model does not have, or that holds no hidden states."""


def path_in(value: Any, names: tuple[str, ...] = NAMES) -> TensorPath:
    """Return the path to the hidden states in a value.

    Args:
        names: Keys that are tried first if the value is a mapping.

    Raises:
        LookupError: If there are none, or several candidates; the message lists what the value holds.
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
    """Return the path to the hidden states in ``(args, kwargs)``, the arguments of a call of ``module``.

    Raises:
        LookupError: See ``path_in``.
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
    """Return the value with the tensor at a path replaced; its containers are copied, not modified."""
    if not path:
        return tensor
    key, *rest = path
    changed = with_tensor(_item(value, key), tuple(rest), tensor)
    if isinstance(value, tuple):
        items = [changed if index == key else item for index, item in enumerate(value)]
        # Named tuples take their items as separate arguments.
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
    """Axis order of hidden states in forward passes of one model on token ids ``(contexts, positions)``.

    Some modules flatten all tokens of a batch into one axis (OPT's MLPs), some put positions before contexts (XLNet's
    blocks). With as many contexts as positions, shapes do not reveal the latter: the model is then run once on other ids.
    """

    def __init__(self) -> None:
        self._shape: tuple[int, int] | None = None
        self._positions_first: dict[str, bool] = {}
        self._hooks: set[str] = set()
        self._trying = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the shape of the token ids, before a forward pass of the whole model."""
        if self._trying:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._shape = (ids.shape[0], ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 2 else None
        if self._shape is not None and self._shape[0] == self._shape[1] > 1 and self._hooks - self._positions_first.keys():
            assert isinstance(ids, Tensor)
            self._trying = True
            try:
                # A failure here recurs in the pass itself, which reports it.
                with suppress(Exception), torch.no_grad():
                    module(input_ids=ids[:1, :1].expand(2, 3), use_cache=False)
            finally:
                self._trying = False
            self._positions_first = dict.fromkeys(self._hooks, False) | self._positions_first

    def reading(self, hook: str, reader: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        """Wrap a reader of ``(contexts, positions, width)`` to accept tensors in the module's own layout."""
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
