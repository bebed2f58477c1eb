"""Every route of the sparse arithmetic against the plain reference: CSR products, pieces without them, dense when crowded."""

import pytest
import torch

import sae.sparse_ops as ops
from sae.code import SparseCode
from sae.sparse_ops import decode, decode_plain, entries, entries_plain

TOKENS, D, LATENTS, K = 13, 7, 29, 5


@pytest.fixture(params=["kernels", "csr", "pieces", "crowded"])
def route(request, monkeypatch):
    if request.param == "kernels":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(ops, "backend", lambda *tensors: None)
    monkeypatch.setattr(ops, "_has_csr", lambda rows: request.param == "csr")
    if request.param == "crowded":
        monkeypatch.setattr(ops, "DENSE_ENTRIES", 0)
        monkeypatch.setattr(ops, "DENSE_SHARE", 0.0)
    return request.param


# Codes on which shortcuts break.
def ordinary():
    return torch.stack([torch.randperm(LATENTS)[:K] for _ in range(TOKENS)]).flatten(), torch.arange(0, TOKENS * K, K)


def repeated():
    latents, starts = ordinary()
    latents[:4] = 3
    return latents, starts


def empty_rows():
    latents, starts = ordinary()
    starts[0], starts[5] = 0, starts[6]
    starts[-1] = len(latents)
    return latents, starts


def more_entries_than_cells():
    return torch.zeros(TOKENS * 40, dtype=torch.long), torch.arange(0, TOKENS * 40, 40)


def no_entries():
    return torch.empty(0, dtype=torch.long), torch.zeros(TOKENS, dtype=torch.long)


CODES = [ordinary, repeated, empty_rows, more_entries_than_cells, no_entries]


@pytest.mark.parametrize("make", CODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_decoding_and_its_gradients_equal_the_reference(route, make, dtype, tolerance):
    latents, starts = make()
    values = torch.randn(len(latents), dtype=dtype, requires_grad=True)
    atoms = torch.randn(LATENTS, D, dtype=dtype, requires_grad=True)
    found, expected = [], []
    weight = torch.randn(TOKENS, D, dtype=dtype)
    for out, function in ((found, decode), (expected, decode_plain)):
        y_hat = function(SparseCode(latents, values, starts), atoms)
        out += [y_hat.detach(), *torch.autograd.grad((y_hat * weight).sum(), [values, atoms])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("make", CODES)
@pytest.mark.parametrize("bias", [True, False])
def test_entries_and_their_gradients_equal_the_reference(route, make, bias):
    latents, starts = make()
    x, W, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((TOKENS, D), (LATENTS, D), (LATENTS,))
    )
    weight = torch.randn(len(latents), dtype=torch.float64)
    leaves = [x, W, b] if bias else [x, W]
    expected = entries_plain(x, W, b if bias else None, latents, starts)
    found = entries(x, W, b if bias else None, expected.detach(), latents, starts)
    assert torch.equal(found, expected)
    for a, c in zip(
        torch.autograd.grad((found * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, c)


def test_gradcheck_of_every_output(route):
    latents, starts = repeated()
    x, W, b, atoms = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((TOKENS, D), (LATENTS, D), (LATENTS,), (LATENTS, 3))
    )

    def run(x, W, b, atoms):
        values = entries(x, W, b, entries_plain(x, W, b, latents, starts).detach(), latents, starts)
        return values, decode(SparseCode(latents, values, starts), atoms)

    assert torch.autograd.gradcheck(run, (x, W, b, atoms))


def test_low_precision_takes_the_pieces(monkeypatch):
    monkeypatch.setattr(ops, "_csr", None)
    latents, starts = ordinary()
    values = torch.randn(len(latents), dtype=torch.bfloat16, requires_grad=True)
    atoms = torch.randn(LATENTS, D, dtype=torch.bfloat16, requires_grad=True)
    y_hat = decode(SparseCode(latents, values, starts), atoms)
    y_hat.float().sum().backward()
    expected = decode_plain(SparseCode(latents, values.detach().float(), starts), atoms.detach().float())
    torch.testing.assert_close(y_hat.float(), expected, rtol=0.02, atol=0.05)
    assert atoms.grad.dtype == torch.bfloat16
    torch.testing.assert_close(values.grad.float(), atoms.detach().float()[latents].sum(-1), rtol=0.02, atol=0.05)


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch):
    latents, starts = ordinary()
    monkeypatch.setattr(ops, "_spread", None)
    values = torch.randn(len(latents), requires_grad=True)
    decode(SparseCode(latents, values, starts), torch.randn(LATENTS, D)).sum().backward()
    assert values.grad is not None
