"""That `make portable` sums products in another order, for every layout its own, and else changes nothing."""

import os

import pytest
import torch


@pytest.fixture
def product(load_beside):
    return load_beside("other_products")._product


def test_the_same_layout_gives_the_same_bits_and_another_does_not(product):
    a, b = torch.randn(50, 24), torch.randn(24, 31)
    torch.testing.assert_close(product(a, b), a.double().mm(b.double()).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(product(a, b), product(a.clone(), b.clone()))
    for other in (product(a, b.T.contiguous().T), product(a[:37], b), product(torch.cat([a[:1], a])[1:], b)):
        assert not torch.equal(product(a, b)[: len(other)], other)


def test_sums_without_rounding_are_the_same_in_every_order(product):
    a, b = torch.randint(-9, 9, (13, 17)).float(), torch.randint(-9, 9, (17, 5)).float()
    assert torch.equal(product(a, b), (a[:, :, None] * b).sum(1))


@pytest.mark.skipif(os.environ.get("SPARSARY_TEST_PRODUCTS") != "reordered", reason="is of `make portable`")
def test_every_product_of_torch_is_reordered():
    a, b = torch.randn(50, 24), torch.randn(24, 31)
    other = b.T.contiguous().T
    for multiply in (
        torch.mm,
        lambda x, y: torch.addmm(torch.ones(31), x, y),
        lambda x, y: x[None].expand(2, -1, -1) @ y[None].expand(2, -1, -1),
        lambda x, y: torch.nn.functional.linear(x.view(5, 10, 24), y.T),
    ):
        assert not torch.equal(multiply(a, b), multiply(a, other))
