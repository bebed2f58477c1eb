"""Matrix products summed in another order, as on another processor: what bits depend on that no test may.

A product's order of summation is drawn from the shapes, strides and alignment of its operands, and rows and columns beyond the
last whole tile have orders of their own. The same code on the same layout so gives the same bits; another layout, batch or
width need not, as with any BLAS. Sums that are exact in every order stay exact.
"""

import warnings

import torch
from torch import Tensor

# Rows and columns that a kernel computes at once; what is left over takes another path.
TILE_ROWS, TILE_COLUMNS = 4, 8


def _order(terms: int, part: int, *operands: Tensor) -> Tensor:
    seed = hash((part, *((*t.shape, *t.stride(), t.data_ptr() % 64) for t in operands)))
    return torch.randperm(terms, generator=torch.Generator().manual_seed(seed % 2**31))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices."""
    out = a.new_empty(a.shape[0], b.shape[1])
    row, column = a.shape[0] - a.shape[0] % TILE_ROWS, b.shape[1] - b.shape[1] % TILE_COLUMNS
    for i, rows in enumerate((slice(0, row), slice(row, None))):
        for j, columns in enumerate((slice(0, column), slice(column, None))):
            if out[rows, columns].numel():
                order = _order(a.shape[1], 2 * i + j, a, b)
                out[rows, columns] = torch.mm(a[rows][:, order], b[order][:, columns], out=a.new_empty(0))
    return out


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = alpha * _product(a, b) if alpha != 1 else _product(a, b)
    return product if beta == 0 else product + (bias if beta == 1 else beta * bias)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if not len(a):
        return a.new_empty(0, a.shape[1], b.shape[2])
    return torch.stack([_product(left, right) for left, right in zip(a, b, strict=True)])


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = alpha * _bmm(a, b)
    return product if beta == 0 else product + beta * bias


def _mv(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b[:, None])[:, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return _product(a[None], b[:, None])[0, 0]


def reorder_products() -> torch.library.Library:
    """From here on, in this process, as long as what is returned is kept."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That kernels are replaced is what is meant.
        warnings.simplefilter("ignore")
        for name, function in {"mm": _mm, "addmm": _addmm, "bmm": _bmm, "baddbmm": _baddbmm, "mv": _mv, "dot": _dot}.items():
            library.impl(name, function, "CPU")
    return library
