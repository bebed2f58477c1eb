"""Activations of several places in a model: the columns of each, and the forms in which they are given."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rows import ArrayLike, Rows, as_rows


@dataclass(frozen=True)
class Site:
    """One location in a model that a dictionary reconstructs: the columns it reads and the columns it writes."""

    reads: slice
    writes: slice


def columns_by_site(widths: Sequence[int]) -> list[slice]:
    """Return the columns of each site where activations are concatenated along the feature axis.

    >>> columns_by_site([3, 5])
    [slice(0, 3, None), slice(3, 8, None)]
    """
    ends = list(accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def concatenated(x: Rows, widths: Sequence[int], name: str = "x", device: torch.device | str = "cpu") -> Float[Tensor, "..."]:
    """Return the activations of all sites concatenated along the feature axis; tensors keep precision and gradient.

    They may also be a list with one tensor or array per site, or ``(..., sites, width)`` if all widths are equal.

    >>> concatenated([torch.zeros(2, 3), torch.ones(2, 5)], [3, 5]).shape
    torch.Size([2, 8])
    >>> concatenated(torch.zeros(2, 4, 3), [3, 3, 3, 3]).shape
    torch.Size([2, 12])

    Raises:
        ValueError: If a site is missing or has another width, or the sites have different numbers of tokens.
    """
    if is_listed(x, widths):
        parts = [_tensor(each, f"{name}[{i}]", device) for i, each in enumerate(x)]  # pyright: ignore
        shapes = [tuple(each.shape) for each in parts]
        if len(parts) != len(widths) or [shape[-1] for shape in shapes] != list(widths):
            wanted, given = ", ".join(map(str, widths)), ", ".join(str(shape[-1]) for shape in shapes)
            raise ValueError(
                f"{name}: expected {len(widths)} sites of widths {wanted}, got {len(parts)} of {given}. Give one tensor per "
                "site, in the dictionary's order."
            )
        if len({shape[:-1] for shape in shapes}) > 1:
            raise ValueError(f"{name}: expected the same tokens at all sites, got shapes {', '.join(map(str, shapes))}.")
        return torch.cat(parts, dim=-1)
    x = _tensor(x, name, device)
    return x.flatten(-2) if is_stacked(x, widths) else x


def in_form_of(given: Rows, y: Float[Tensor, "..."], widths: Sequence[int]) -> "Float[Tensor, '...'] | list[Tensor]":
    """Return concatenated activations in the form in which others were given to ``concatenated``: list, stack, or neither.

    Args:
        given: Activations in that form, of a dictionary whose inputs have the same sites.
        y: Concatenated activations.
        widths: Widths of the sites of ``y``.
    """
    if is_listed(given, widths):
        return list(y.split(list(widths), dim=-1))
    stacked = y.ndim == getattr(given, "ndim", y.ndim) - 1
    return y.unflatten(-1, (len(widths), widths[0])) if stacked else y


def is_listed(x: Rows, widths: Sequence[int]) -> bool:
    """Return True for a list with one matrix or larger array per site."""
    if len(widths) < 2 or not isinstance(x, list | tuple) or not x:
        return False
    return all(isinstance(each, Tensor | ArrayLike) and getattr(each, "ndim", 0) >= 2 for each in x)


def is_stacked(x: Float[Tensor, "..."], widths: Sequence[int]) -> bool:
    """Return True for activations ``(..., sites, width)``."""
    return len(widths) > 1 and x.ndim >= 3 and tuple(x.shape[-2:]) == (len(widths), widths[0]) and len(set(widths)) == 1


def _tensor(values: Rows, name: str, device: torch.device | str) -> Float[Tensor, "..."]:
    return values if isinstance(values, Tensor) else as_rows(values, name, device)


def added_at_columns(parts: Sequence[tuple[slice, Float[Tensor, "tokens _"]]], width: int) -> Float[Tensor, "tokens width"]:
    """Return the sum of parts that are each zero outside their columns.

    >>> added_at_columns([(slice(0, 3), torch.ones(1, 3)), (slice(2, 3), torch.ones(1, 1))], 4)
    tensor([[1., 1., 2., 0.]])
    """
    return _AddedAtColumns.apply(width, [columns for columns, _ in parts], *(part for _, part in parts))  # pyright: ignore[reportReturnType]


class _AddedAtColumns(torch.autograd.Function):
    """Sum in one tensor. Autograd would pad every part, or copy the gradient of the sum for every assignment to a slice."""

    @staticmethod
    def forward(ctx: Any, width: int, columns: list[slice], *parts: Tensor) -> Tensor:
        ctx.columns = columns
        total = parts[0].new_zeros(len(parts[0]), width)
        for place, part in zip(columns, parts, strict=True):
            total[:, place] += part
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Contiguous, because the gradients of a part's values and of its matrix both read it.
        return None, None, *(grads[0][:, place].contiguous() for place in ctx.columns)
