"""Data flow in a model: which hooked tensors depend on which, found by one forward pass rather than by module names.

In that pass the tensor at each hook is replaced by a copy, which is a node of the autograd graph; a tensor depends on another
if it is connected to the other's node in this graph. Values play no role, so a model without weights suffices.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from .routers import routing


@dataclass(frozen=True)
class Mark:
    """Autograd nodes at a hook: that of the copy and, if it has one, that of the tensor it was copied from."""

    node: Node
    source: Node | None
    axes: int


class Dataflow:
    """Dependency graph of one forward pass. ``marks`` are in execution order; for a module that runs repeatedly, its first run.

    ``routers`` are the paths among ``watched`` of modules that route tokens to experts.

    Args:
        module: A language model.
        hooks: Module paths with a side; hooks that do not run, or hold no tensor, get no mark.
        starts: Hooks at the start of blocks. ``depends`` does not search past them, so it stays within a block.
        watched: Module paths that may be routers.

    Raises:
        Exception: Any error of the model's forward pass.
    """

    def __init__(self, module: nn.Module, hooks: Iterable[str], starts: Collection[str], watched: Iterable[str] = ()):
        self.marks: dict[str, Mark] = {}
        self.routers: list[str] = []
        handles = []
        try:
            for hook in hooks:
                path, _, side = hook.rpartition(":")
                part = module.get_submodule(path)
                handles.append(_attach(part, side, self._marker(hook)))
            handles += [module.get_submodule(path).register_forward_hook(self._watcher(path)) for path in watched]
            ids = torch.zeros((1, 3), dtype=torch.long, device=next(module.parameters()).device)
            with torch.enable_grad(), _askable(module, ids):
                module(input_ids=ids, use_cache=False, **({"attention_mask": torch.ones_like(ids)} if ids.is_meta else {}))
        finally:
            for handle in handles:
                handle.remove()
        self._own = {mark.node for mark in self.marks.values()}
        self._starts = {self.marks[hook].node for hook in starts if hook in self.marks}

    def _marker(self, hook: str) -> Callable[[Tensor], Tensor | None]:
        def mark(x: Tensor) -> Tensor | None:
            # Another thread may run the model at the same time, without gradients.
            if hook in self.marks or not torch.is_grad_enabled():
                return None
            source = x.grad_fn
            # Parameters are frozen, so the graph starts at the first hook.
            copy = (x if x.requires_grad else x.detach().requires_grad_(True)).clone()
            assert copy.grad_fn is not None
            self.marks[hook] = Mark(copy.grad_fn, source, x.ndim)
            return copy

        return mark

    def _watcher(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if routing(output, module) is not None and path not in self.routers:
                self.routers.append(path)

        return watch

    def source(self, hook: str) -> Node | None:
        """Return the node that produced the tensor at a hook: the same at all hooks that see this tensor."""
        mark = self.marks[hook]
        node = mark.source
        while node in self._own and node not in self._starts:
            (node, _), *_ = node.next_functions
        return node

    def depends(self, target: str, on: str, without: Collection[Node | None] = ()) -> bool:
        """Return True if the tensor at ``target`` depends on the one at ``on`` by a path that avoids the nodes ``without``."""
        wanted, todo = self.marks[on].node, [self.marks[target].node]
        # Nor by a path through the start of another block.
        seen: set[Any] = {*without, *(self._starts - {wanted})} - {todo[0]}
        while todo:
            node = todo.pop()
            if node is wanted:
                return True
            for before, _ in node.next_functions:
                if before is not None and before not in seen:
                    seen.add(before)
                    todo.append(before)
        return False


@contextmanager
def _askable(module: Any, ids: Tensor) -> Iterator[None]:
    """Use eager attention on the meta device, where other implementations cannot inspect the values of the mask."""
    before = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not ids.is_meta or before in (None, "eager"):
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def _attach(module: nn.Module, side: str, reader: Callable[[Tensor], Tensor | None]) -> Any:
    """Register ``reader`` on the first floating-point tensor on that side; a tensor it returns replaces it."""

    def shown(value: Any) -> Any:
        leaves, structure = tree_flatten(value)
        place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
        changed = None if place is None else reader(leaves[place])
        if changed is None or place is None:
            return None
        leaves[place] = changed
        return tree_unflatten(leaves, structure)

    if side == "in":
        return module.register_forward_pre_hook(lambda _, args, kwargs: shown((args, kwargs)), with_kwargs=True)
    return module.register_forward_hook(lambda _, _args, output: shown(output))
