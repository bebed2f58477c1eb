"""Gradients summed over ranks, from entries and from dense matrices."""

import pytest
import torch
from torch import nn

from sparsary.sae.ranks import ALONE
from sparsary.sae.sparse_code import SparseCode
from sparsary.sae.sparse_grad import Product, keep_ledger
from sparsary.training.gradient_exchange import ExchangedBytes, GradientExchange

LATENTS, D, TOKENS = 19, 5, 7


@pytest.fixture
def on_ranks(load_beside):
    return load_beside("thread_ranks").on_ranks


def code(rank, entries=23):
    generator = torch.Generator().manual_seed(rank)
    latents = torch.randint(LATENTS, (entries,), generator=generator)
    starts = torch.randint(entries + 1, (TOKENS,), generator=generator).sort().values
    starts[0] = 0
    return SparseCode(latents, torch.randn(entries, generator=generator), starts)


def dense(product):
    return product.code.to_dense(LATENTS).T @ product.rows


class Setting:
    """Two matrices that share a code, a bias, and a parameter that only one rank has a gradient of."""

    def __init__(self, rank, kind):
        generator = torch.Generator().manual_seed(50 + rank)
        self.matrices = [nn.Parameter(torch.zeros(LATENTS, D)) for _ in range(2)]
        self.bias, self.rare = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
        self.ledgers = {matrix: keep_ledger(matrix) for matrix in self.matrices}
        self.bias.grad = torch.full((3,), float(rank))
        if rank == 1:
            self.rare.grad = torch.ones(2)
        entries = 0 if kind == "a rank without entries" and rank == 0 else 23 - rank
        first = code(rank, entries)
        second = SparseCode(first.latents, torch.randn(entries, generator=generator), first.starts)
        if kind == "codes of their own":
            second = code(90 + rank)
        for ledger, each in zip(self.ledgers.values(), (first, second), strict=True):
            rows = torch.randn(TOKENS, D, generator=generator)
            ledger.products = [] if kind == "a rank without tokens" and rank == 1 else [Product(each, rows)]
        if kind == "dead latents":
            # The same latents on all ranks.
            ledger.rows = [(torch.tensor([2, 11]), torch.randn(2, D, generator=generator))]
        if kind == "a dense rank" and rank == 1:
            self.matrices[0].grad = torch.randn(LATENTS, D, generator=generator)
        if kind == "a dense code on one rank" and rank == 1:
            for ledger in self.ledgers.values():
                ledger.products, ledger.whole = [], torch.randn(LATENTS, D, generator=generator)

    def gradients(self):
        """Return the whole gradient of each matrix."""
        found = []
        for matrix, ledger in self.ledgers.items():
            total = torch.zeros(LATENTS, D) if matrix.grad is None else matrix.grad.clone()
            total = total if ledger.whole is None else total + ledger.whole
            total = sum((dense(product) for product in ledger.products), total)
            for latents, rows in ledger.rows:
                total = total.index_add(0, latents, rows)
            found.append(total)
        return found


KINDS = [
    "one code",
    "codes of their own",
    "a rank without entries",
    "a rank without tokens",
    "dead latents",
    "a dense rank",
    "a dense code on one rank",
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("way", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_that_of_all_ranks(on_ranks, size, way, kind):
    expected = [sum(parts) for parts in zip(*(Setting(rank, kind).gradients() for rank in range(size)), strict=True)]

    def exchange(ranks):
        own = Setting(ranks.rank, kind)
        GradientExchange(ranks, way)([*own.matrices, own.bias, own.rare], own.ledgers)
        return own.gradients(), own.bias.grad, own.rare.grad

    results = on_ranks(size, exchange)
    for gradients, bias, rare in results:
        for have, wanted, first in zip(gradients, expected, results[0][0], strict=True):
            torch.testing.assert_close(have, wanted)
            assert torch.equal(have, first)
        assert torch.equal(bias, torch.full((3,), sum(range(size)) * 1.0))
        assert torch.equal(rare, torch.ones(2))


def test_every_step_exchanges_rows_of_its_own(on_ranks):
    steps = [[Setting(10 * step + rank, "one code").ledgers.values() for rank in range(2)] for step in range(2)]
    terms = [[[ledger.products[0] for ledger in ledgers] for ledgers in ranks] for ranks in steps]

    def exchange(ranks):
        own, found = Setting(0, "one code"), []
        exchange = GradientExchange(ranks, dense=False)
        for step in terms:
            for ledger, product in zip(own.ledgers.values(), step[ranks.rank], strict=True):
                ledger.products = [product]
            exchange(own.matrices, own.ledgers)
            found.append(own.gradients())
        return found

    wanted = [[dense(a) + dense(b) for a, b in zip(*step, strict=True)] for step in terms]
    for found in on_ranks(2, exchange):
        torch.testing.assert_close(found, wanted)


def test_a_parameter_without_a_gradient_keeps_none(on_ranks):
    def exchange(ranks):
        unused = nn.Parameter(torch.zeros(2))
        GradientExchange(ranks)([unused], {})
        return unused.grad

    assert on_ranks(2, exchange) == [None, None]


def test_alone_nothing_is_touched():
    own = Setting(0, "one code")
    before = own.gradients()
    GradientExchange(ALONE)([*own.matrices, own.bias], own.ledgers)
    assert all(map(torch.equal, before, own.gradients()))


def test_bytes_predicted_are_bytes_sent(on_ranks):
    """The choice rests on the prediction. The exchange of sizes is beside it."""

    def exchange(ranks):
        own = Setting(ranks.rank, "one code")
        exchange = GradientExchange(ranks, dense=False)
        before = ranks.sent_bytes
        exchange(own.matrices, own.ledgers)
        sizes = 8 * 5 * len(own.matrices) * (ranks.size - 1)
        return exchange.last.sparse, ranks.sent_bytes - before - sizes

    for predicted, sent in on_ranks(3, exchange):
        assert predicted == sent


@pytest.mark.parametrize(
    ("sparse", "dense", "chosen"), [(10, 402, False), (100, 10, True), (100, 150, True), (100, 300, False)]
)
def test_dense_matrices_are_preferred_where_they_are_less_work(sparse, dense, chosen):
    assert ExchangedBytes(sparse, dense).prefers_dense is chosen
