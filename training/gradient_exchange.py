"""Sum of the gradients of all ranks, from the entries of sparse codes where that is cheaper than from dense matrices.

The weight gradients of a step are sums over active entries. Ranks therefore exchange the entries with the rows of their tokens,
about ``tokens x (d_in + d_out + 2 k)`` numbers, and each computes the whole batch's update, where data-parallel training would
all-reduce ``2 x n_latents x d`` numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sae.ranks import Ranks
from ..sae.sparse_code import SparseCode
from ..sae.sparse_grad import Product, SparseGrad
from ..sae.sparse_ops import spread

# Entries cost more than their bytes: every rank adds up those of all ranks, while it computes a dense matrix from its own. By
# docs/studies/exchange.py, two processes on one machine: 1.2 times as slow at 0.55 of the bytes, 3 times as fast at 0.14.
ENTRY_WORK = 2.0


@dataclass(frozen=True)
class ExchangedBytes:
    """Bytes that a rank receives when matrices' gradients are exchanged as entries, and as dense matrices."""

    sparse: int
    dense: int

    @property
    def prefers_dense(self) -> bool:
        return self.dense < ENTRY_WORK * self.sparse


class GradientExchange:
    """Replaces each rank's gradients by their sum over ranks, identical on all of them.

    ``last`` is the cost of the latest exchange of matrices with sparse gradients, ``None`` if there was none.

    Args:
        ranks: Processes whose gradients are summed.
        dense: Force dense matrices (True) or entries (False); ``None`` takes what costs fewer bytes.
    """

    def __init__(self, ranks: Ranks, dense: bool | None = None):
        self.ranks, self.dense = ranks, dense
        self.last: ExchangedBytes | None = None
        self._rooms: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def __call__(self, parameters: list[Tensor], ledgers: dict[Tensor, SparseGrad]) -> None:
        """Exchange the gradients of all parameters; ``ledgers`` are the sparse gradients of some of them."""
        if self.ranks.size == 1:
            return
        self._dense([parameter for parameter in parameters if parameter not in ledgers])
        if ledgers:
            self._matrices(ledgers)

    def _dense(self, parameters: list[Tensor]) -> None:
        """Sum dense gradients in one flat tensor per type; a parameter without a gradient on any rank keeps none."""
        if not parameters:
            return
        have = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
        # As numbers: not every backend adds truth values.
        have = self.ranks.sum(have.int()).tolist()
        used = [parameter for parameter, count in zip(parameters, have, strict=True) if count]
        for dtype in dict.fromkeys(parameter.dtype for parameter in used):
            some = [parameter for parameter in used if parameter.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in some])
            for parameter, part in zip(some, self.ranks.sum(flat).split([p.numel() for p in some]), strict=True):
                parameter.grad = part.view_as(parameter)

    def _matrices(self, ledgers: dict[Tensor, SparseGrad]) -> None:
        """Exchange the gradients of weight matrices."""
        products = {matrix: ledger.product(matrix) for matrix, ledger in ledgers.items()}
        codes = [product.code.latents.data_ptr() for product in products.values()]
        # Per matrix: its tokens, entries and rows with dense gradients, 1 if the whole gradient is dense, and the first matrix
        # with the same code.
        sizes = torch.tensor(
            [
                [
                    len(product.rows),
                    len(product.code.latents),
                    sum(len(part) for part, _ in ledgers[m].rows),
                    m.grad is not None or ledgers[m].whole is not None,
                    first,
                ]
                for (m, product), first in zip(products.items(), map(codes.index, codes), strict=True)
            ],
            device=next(iter(ledgers)).device,
        )
        everywhere = torch.stack(self.ranks.gather(sizes)).cpu()
        # Codes that differ on one rank are sent separately by all.
        firsts = everywhere[:, :, 4].amax(0).tolist()
        self.last = self._cost(everywhere, list(ledgers), firsts)
        crowded = bool(everywhere[:, :, 3].any())
        if crowded or (self.last.prefers_dense if self.dense is None else self.dense):
            self._as_matrices(ledgers, products)
        else:
            self._as_entries(ledgers, products, everywhere, firsts)

    def _cost(self, sizes: Tensor, matrices: list[Tensor], firsts: list[int]) -> ExchangedBytes:
        others, sparse, dense = self.ranks.size - 1, 0, 0
        for i, (matrix, first) in enumerate(zip(matrices, firsts, strict=True)):
            tokens, entries, rows = sizes[:, i, :3].amax(0).tolist()
            width = matrix.element_size()
            # Positions of entries are sent once for all matrices that share a code.
            places = 4 * (entries + tokens) if first == i else 0
            sparse += others * (places + width * (entries + tokens * matrix.shape[1]))
            sparse += 2 * others * width * rows * matrix.shape[1] // self.ranks.size
            dense += 2 * others * width * matrix.numel() // self.ranks.size
        return ExchangedBytes(sparse, dense)

    def _as_matrices(self, ledgers: dict[Tensor, SparseGrad], products: dict[Tensor, Product]) -> None:
        """Materialize every matrix's gradient and sum it over ranks."""
        for matrix, ledger in ledgers.items():
            product, code = products[matrix], products[matrix].code
            whole = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
            if ledger.whole is not None:
                whole = whole + ledger.whole
            if len(code.latents):
                whole = whole + spread(code.values, product.rows, code.latents, code.starts, matrix)
            for latents, gradients in ledger.rows:
                whole = whole.index_add(0, latents, gradients)
            ledger.clear()
            matrix.grad = self.ranks.sum(whole)

    def _as_entries(
        self, ledgers: dict[Tensor, SparseGrad], products: dict[Tensor, Product], sizes: Tensor, firsts: list[int]
    ) -> None:
        """Gather the entries of all ranks, in the order of the ranks, which is that of the batch's tokens."""
        places: dict[int, tuple[Tensor, Tensor]] = {}
        for i, ((matrix, ledger), first) in enumerate(zip(ledgers.items(), firsts, strict=True)):
            code, rows = products[matrix].code, products[matrix].rows
            tokens, entries, dense_rows = (column.tolist() for column in sizes[:, i, :3].unbind(1))
            if any(entries):
                if first not in places:
                    places[first] = self._places(code, entries, tokens)
                latents, starts = places[first]
                values = torch.cat(self.ranks.gather_rows(code.values, entries))
                ledger.products = [Product(SparseCode(latents, values, starts), self._rows(matrix, rows, tokens))]
            if any(dense_rows):
                dense_of, gradients = ledger.dense(matrix)
                # All ranks have the same dead latents, so their rows agree.
                latents = (dense_of >= 0).nonzero().squeeze(1)
                ledger.rows = [(latents, self.ranks.sum(gradients[dense_of[latents]]))]

    def _places(self, code: SparseCode, entries: list[int], tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Return the latents of all ranks' entries, and the first entry of each token."""
        latents = self.ranks.gather_rows(code.latents.int(), entries)
        before = [sum(entries[:rank]) for rank in range(self.ranks.size)]
        starts = self.ranks.gather_rows(code.starts.int(), tokens)
        return torch.cat(latents).long(), torch.cat([part.long() + b for part, b in zip(starts, before, strict=True)])

    def _rows(self, matrix: Tensor, own: Tensor, tokens: list[int]) -> Tensor:
        """Return the rows of all ranks' tokens, valid until the next exchange.

        They are most of what is exchanged. Their memory is kept: obtaining it anew takes longer than filling it.
        """
        if min(tokens) < max(tokens):
            return torch.cat(self.ranks.gather_rows(own, tokens))
        shape, room = (sum(tokens), *own.shape[1:]), self._rooms.get(matrix)
        if room is None or (*room.shape,) != shape or room.dtype != own.dtype:
            room = self._rooms[matrix] = own.new_empty(shape)
        self.ranks.gather_into(room, own)
        return room
