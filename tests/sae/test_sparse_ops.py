"""Every route of the sparse arithmetic against the plain reference: CSR products, pieces without them, dense when crowded."""

import pytest
import torch

from sparsary.sae import sparse_ops as ops
from sparsary.sae.sparse_code import SparseCode
from sparsary.sae.sparse_grad import drop_ledger, keep_ledger, ledger_of
from sparsary.sae.sparse_ops import decode, decode_plain, entries, entries_plain, some_rows

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
        monkeypatch.setattr(ops, "dense_share", lambda rows: 0.0)
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


@pytest.fixture
def kernel_calls(monkeypatch):
    """Names of the compiled sums, as often as each is called."""
    cpu, calls = pytest.importorskip("sparsary.sae.kernels.cpu").CpuKernels, []
    for name in ("decode", "dots", "spread"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, name=name, kernel=kernel: (calls.append(name), kernel(*a))[1])
    return calls


def test_gradcheck_of_every_output(route, kernel_calls):
    latents, starts = repeated()
    x, W, b, atoms = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((TOKENS, D), (LATENTS, D), (LATENTS,), (LATENTS, 3))
    )

    def run(x, W, b, atoms):
        values = entries(x, W, b, entries_plain(x, W, b, latents, starts).detach(), latents, starts)
        return values, decode(SparseCode(latents, values, starts), atoms)

    assert torch.autograd.gradcheck(run, (x, W, b, atoms))
    assert set(kernel_calls) == ({"decode", "dots", "spread"} if route == "kernels" else set())


def test_gradients_of_a_sum_reach_the_kernels(kernel_calls):
    """A sum's gradient is one number seen many times, which is not contiguous."""
    latents, starts = ordinary()
    x, W, atoms = (torch.randn(n, D, requires_grad=True) for n in (TOKENS, LATENTS, LATENTS))
    values = entries(x, W, None, entries_plain(x, W, None, latents, starts).detach(), latents, starts)
    values.sum().backward()
    assert sorted(kernel_calls) == ["decode", "spread"]
    kernel_calls.clear()
    decode(SparseCode(latents, values.detach().requires_grad_(True), starts), atoms).sum().backward()
    assert sorted(kernel_calls) == ["decode", "dots", "spread"]


# Some rows, and ledgers.


def test_gradcheck_of_some_rows():
    W, latents = torch.randn(LATENTS, D, dtype=torch.float64, requires_grad=True), torch.randperm(LATENTS)[:K]
    assert torch.equal(some_rows(W, latents), W[latents])
    assert torch.autograd.gradcheck(lambda W: some_rows(W, latents), (W,))
    assert torch.equal(some_rows(W, latents[:0]), W[latents[:0]])


def written(W):
    """The gradient that a ledger and ``W.grad`` stand for."""
    ledger = ledger_of(W)
    product = ledger.product(W)
    whole = product.code.to_dense(LATENTS).T @ product.rows
    dense_of, dense = ledger.dense(W)
    whole[dense_of >= 0] += dense[dense_of[dense_of >= 0]]
    return whole


@pytest.mark.parametrize("make", CODES)
@pytest.mark.parametrize("what", ["products", "rows", "rows twice", "products and rows", "all and a gradient"])
def test_a_ledger_holds_what_would_have_been_written(make, what):
    latents, starts = make()
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    W = torch.randn(LATENTS, D, dtype=torch.float64, requires_grad=True)
    some, others = torch.randperm(LATENTS)[:K], torch.randperm(LATENTS)[: 2 * K]
    values = torch.randn(len(latents), dtype=torch.float64)

    def backward():
        torch.manual_seed(3)
        parts = []
        if what in ("products", "products and rows", "all and a gradient"):
            parts.append(entries(x, W, None, values, latents, starts) * torch.randn(len(latents)).double())
            parts.append(decode(SparseCode(latents, values, starts), W) * torch.randn(TOKENS, D).double())
        if what != "products":
            parts.append(some_rows(W, some) * torch.randn(K, D).double())
        if what == "rows twice":
            parts.append(some_rows(W, others) * torch.randn(2 * K, D).double())
        if what == "all and a gradient":
            parts.append(W.pow(2))
        sum(part.sum() for part in parts).backward()

    backward()
    expected, W.grad = W.grad, None
    ledger = keep_ledger(W)
    backward()
    assert (W.grad is not None) == (what == "all and a gradient")
    torch.testing.assert_close(written(W), expected)
    ledger.clear()
    W.grad = None
    assert not written(W).any()
    drop_ledger(W)
    assert ledger_of(W) is None
    backward()
    torch.testing.assert_close(W.grad, expected)


def test_crowded_codes_are_written_out_in_spite_of_a_ledger(monkeypatch):
    monkeypatch.setattr(ops, "DENSE_ENTRIES", 0)
    monkeypatch.setattr(ops, "dense_share", lambda rows: 0.0)
    latents, starts = ordinary()
    W = torch.randn(LATENTS, D, requires_grad=True)
    ledger = keep_ledger(W)
    decode(SparseCode(latents, torch.randn(len(latents)), starts), W).sum().backward()
    assert W.grad is not None
    assert not ledger.products


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
    monkeypatch.setattr(ops, "spread", None)
    values = torch.randn(len(latents), requires_grad=True)
    decode(SparseCode(latents, values, starts), torch.randn(LATENTS, D)).sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("make", CODES)
def test_a_shift_s_gradient_is_that_of_all_inputs_together(route, make):
    latents, starts = make()
    x, W, b, shift = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in SHIFTED)
    weight = torch.randn(len(latents), dtype=torch.float64)
    expected = entries_plain(x.detach() - shift, W, b, latents, starts)
    found = entries(x - shift, W, b, expected.detach(), latents, starts, shift)
    leaves = [W, b, shift]
    for a, c in zip(
        torch.autograd.grad((found * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, c)


SHIFTED = ((TOKENS, D), (LATENTS, D), (LATENTS,), (D,))
