"""Gradients of every document's own losses, for documents that share contexts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def document_numbers(document_ids: Int[Tensor, "contexts positions"]) -> Int[Tensor, "contexts positions"]:
    """Return the number, within its context, of the document whose next token each position predicts; -1 if it predicts none.

    Documents of a single token, padding, and the last position of a document predict nothing of their own.

    >>> document_numbers(torch.tensor([[7, 7, 7, 8, 9, 9, -1, -1]]))
    tensor([[ 0,  0, -1, -1,  1, -1, -1, -1]])
    """
    predicts = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, :-1] >= 0)
    # Between two documents lies at least the last position of the first one.
    begins = predicts & ~nn.functional.pad(predicts[:, :-1], (1, 0))
    return nn.functional.pad(torch.where(predicts, begins.long().cumsum(1) - 1, -1), (0, 1), value=-1)


def contexts_of_equal_passes(numbers: Int[Tensor, "contexts positions"]) -> list[Int[Tensor, " _"]]:
    """Return the contexts by their number of documents, so that none takes the passes of a fuller one.

    >>> [rows.tolist() for rows in contexts_of_equal_passes(torch.tensor([[0, -1, 1], [0, 0, 0], [0, 0, -1]]))]
    [[1, 2], [0]]
    """
    last = numbers.amax(1)
    return [(last == number).nonzero().flatten() for number in last.unique()]


def document_gradients(
    losses: Float[Tensor, "contexts predictions"],
    local: Float[Tensor, "contexts positions width"],
    seen: Sequence[Tensor],
    numbers: Int[Tensor, "contexts positions"],
) -> list[Tensor]:
    """Return the gradient of each document's summed losses with respect to its own positions of every tensor in ``seen``.

    Attention reaches across documents, so a backward pass serves one document of every context: there are as many passes as
    documents in the fullest context. They start at ``local``, which is passed to once for all documents.

    Args:
        local: Tensor that every path from ``seen`` to the losses leads through, and of which each position has its own loss:
            the logits, or the input of the layer that computes them.
        numbers: Numbers of the documents, see ``document_numbers``.
    """
    gradients = [torch.zeros_like(x) for x in seen]
    if not losses.requires_grad:
        return gradients
    (of_all,) = torch.autograd.grad(losses.sum(), local)
    last = int(numbers.max())
    for number in range(last + 1):
        here = (numbers == number).unsqueeze(-1)
        # Not a product, in which zero times a loss that is not finite would spread to other documents.
        own = torch.where(here.to(of_all.device), of_all, 0)
        # A tensor that the losses do not depend on has gradient zero.
        found = torch.autograd.grad(local, seen, own, retain_graph=number < last, allow_unused=True)
        for total, gradient in zip(gradients, found, strict=True):
            if gradient is not None:
                total.copy_(torch.where(here, gradient, total))
    return gradients


class UnembeddingInput:
    """Input of the layer that computes a model's logits, in the passes that are run while it is ``watched``."""

    def __init__(self, module: nn.Module):
        found = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None  # pyright: ignore
        self.layer = found if isinstance(found, nn.Linear) else None
        self.inputs: list[Tensor] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context manager that keeps the inputs."""
        if self.layer is None:
            yield
            return
        handle = self.layer.register_forward_pre_hook(lambda _, inputs: self.inputs.extend(inputs))
        try:
            yield
        finally:
            handle.remove()

    def local(self, logits: Float[Tensor, "contexts positions vocabulary"], seen: Iterable[Tensor]) -> Tensor:
        """Return the input if the logits depend on ``seen`` through it alone, position by position; otherwise the logits."""
        if len(self.inputs) == 1:
            (x,) = self.inputs
            if x.grad_fn is not None and x.shape[:-1] == logits.shape[:-1] and _separates(x, logits, seen):
                return x
        return logits


def _separates(x: Tensor, end: Tensor, starts: Iterable[Tensor]) -> bool:
    """Return True if every path of the graph from ``starts`` to ``end`` leads through ``x``."""
    starts = list(starts)
    begun = {start.grad_fn for start in starts} - {None}
    known: set[Any] = {x.grad_fn, None}
    left: list[Any] = [end.grad_fn]
    while left:
        node = left.pop()
        if node in known:
            continue
        known.add(node)
        # Leaves have a node of their own, which holds the tensor.
        if node in begun or any(getattr(node, "variable", None) is start for start in starts):
            return False
        left += [before for before, _ in node.next_functions]
    return True
