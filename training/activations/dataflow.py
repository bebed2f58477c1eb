"""Data flow in a model: which hooks' tensors depend on which, told by one pass and not by the names of modules.

In the pass every tensor at a hook is replaced by a copy of itself, which is a node of autograd's graph; a tensor depends on
another if its node is reached from there. Values play no part, so a model without weights will do.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Mark:
    """A hook's place in the graph: the copy's node, and that of the tensor it was copied from, if that has one."""

    node: Node
    source: Node | None
    axes: int


class Dataflow:
    """The graph of one pass. ``marks`` are in the order in which the pass came by; of a module's runs the first counts.

    Args:
        module: A language model.
        hooks: Module paths with a side; those that do not run, or hold no tensor, have no mark.
        starts: Hooks of which everything depends on something else is left out.

    Raises:
        Exception: Whatever the model raises if it cannot be run.
    """

    def __init__(self, module: nn.Module, hooks: Iterable[str], starts: Collection[str]):
        self.marks: dict[str, Mark] = {}
        handles = []
        try:
            for hook in hooks:
                path, _, side = hook.rpartition(":")
                part = module.get_submodule(path)
                handles.append(_attach(part, side, self._marker(hook)))
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
            # Another thread may run the model meanwhile, without gradients.
            if hook in self.marks or not torch.is_grad_enabled():
                return None
            source = x.grad_fn
            # Parameters are frozen: the first hook starts the graph.
            copy = (x if x.requires_grad else x.detach().requires_grad_(True)).clone()
            assert copy.grad_fn is not None
            self.marks[hook] = Mark(copy.grad_fn, source, x.ndim)
            return copy

        return mark

    def source(self, hook: str) -> Node | None:
        """The node that made the tensor at a hook: the same at all hooks where this tensor can be seen."""
        mark = self.marks[hook]
        node = mark.source
        while node in self._own and node not in self._starts:
            (node, _), *_ = node.next_functions
        return node

    def depends(self, target: str, on: str, without: Collection[Node | None] = ()) -> bool:
        """Whether the tensor at a hook depends on that at another, along a way that passes none of some nodes."""
        wanted, todo = self.marks[on].node, [self.marks[target].node]
        # Also not past the start of another block.
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
    """On the meta device, where a model cannot look whether its mask hides anything, use the attention that does not."""
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
    """Show ``reader`` the first tensor of floating point numbers on that side, and put in its place what is returned."""

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
