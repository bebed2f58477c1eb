"""Dense codes against sparse ones: encoders without a budget give the same codes, losses and gradients on both paths."""

import pytest
import torch

from sparsary.sae import SAE
from sparsary.sae import sparse_ops as ops
from sparsary.sae.dense_code import DenseCode
from sparsary.sae.encoders import ENCODERS
from sparsary.sae.kept_memory import KeptMemory
from sparsary.sae.sparse_grad import keep_ledger
from sparsary.sae.sparse_ops import decode
from sparsary.transcoders import Transcoder

TOKENS, D, D_OUT, LATENTS = 23, 7, 5, 31
FAMILIES = {
    "relu": {"sparsity": 0.3},
    "relu-log": {"sparsity": 0.3, "penalty_form": "log"},
    "relu-steered": {"sparsity": 0.3, "target_l0": 5},
    "gated": {"sparsity": 0.3},
    "jumprelu": {"target_l0": 9, "bandwidth": 0.7, "start": 1.0},
    "jumprelu-l0": {"penalty": "l0", "bandwidth": 0.7},
    "jumprelu-tanh": {"penalty": "tanh", "bandwidth": 0.7},
}


@pytest.fixture
def force(monkeypatch):
    """Make every code dense, or none, or ``near``: only those that also have entries below their thresholds."""

    def paths(path):
        monkeypatch.setattr(ops, "DENSE_ENTRIES", 1 if path != "sparse" else 1 << 62)
        monkeypatch.setattr(ops, "dense_share", lambda rows: 0.0)
        if path == "near":
            monkeypatch.setattr(ops, "shares_above", lambda x, W, b, cuts: [1.0, 0.0])

    return paths


def build(name, kind=SAE, ledgers=False):
    torch.manual_seed(0)
    encoder = ENCODERS[name.split("-")[0]](**FAMILIES[name])
    sizes = {"d_in": D, "n_latents": LATENTS} | ({"d_out": D_OUT} if kind is Transcoder else {})
    dictionary = kind(**sizes, encoder=encoder).double().train()
    with torch.no_grad():
        dictionary.W_dec *= torch.rand(LATENTS, 1) + 0.5
        dictionary.b_enc.normal_(std=0.1)
        if name == "gated":
            encoder.r_mag.normal_(std=0.3)
            encoder.b_mag.normal_(std=0.3)
        if name.startswith("jumprelu"):
            encoder.started.fill_(1)
            encoder.log_threshold += torch.randn(LATENTS) * 0.05
    if ledgers:
        keep_ledger(dictionary.W_enc)
        keep_ledger(dictionary.W_dec)
    return dictionary


def gradients(dictionary, x):
    """Return the code, the loss and the gradient of every parameter of a loss that uses all that a code offers."""
    code = dictionary.encode(x)
    y_hat = dictionary.decode(code, x)
    sent = torch.linspace(-1, 1, y_hat.numel(), dtype=torch.float64).view_as(y_hat)
    loss = (y_hat * sent).sum() + y_hat.pow(2).mean() + sum(code.requests.penalties.values())
    if code.requests.frozen is not None:
        loss = loss + (decode(code.requests.frozen, dictionary.W_dec.detach()) * sent).cos().sum()
    loss.backward()
    found = {}
    for key, parameter in dictionary.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if hasattr(parameter, "ledger"):
            dense_of, rows = parameter.ledger.dense(parameter)
            product = parameter.ledger.product(parameter)
            gradient = product.code.to_dense(LATENTS).T @ product.rows if len(product.rows) else torch.zeros_like(parameter)
            gradient = gradient.index_add(0, (dense_of >= 0).nonzero().squeeze(1), rows[dense_of[dense_of >= 0]])
        found[key] = gradient
    return code, loss.detach(), found


def inputs(**options):
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64, **options)


@pytest.mark.parametrize("ledgers", [False, True], ids=["plain", "ledgers"])
@pytest.mark.parametrize("kind", [SAE, Transcoder])
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_codes_and_their_gradients_equal_sparse_ones(name, kind, ledgers, force):
    found = {}
    for path in ("sparse", "dense"):
        force(path)
        found[path] = gradients(build(name, kind, ledgers), inputs())
    (sparse, loss, expected), (dense, same_loss, got) = found["sparse"], found["dense"]
    assert isinstance(dense, DenseCode)
    assert not isinstance(sparse, DenseCode)
    torch.testing.assert_close(dense.to_dense(LATENTS), sparse.to_dense(LATENTS))
    assert dense.l0().tolist() == sparse.l0().tolist()
    assert dense.firings(LATENTS).tolist() == sparse.firings(LATENTS).tolist()
    torch.testing.assert_close(same_loss, loss)
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(got[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("ledgers", [False, True], ids=["plain", "ledgers"])
@pytest.mark.parametrize("name", ["jumprelu", "jumprelu-l0"])
def test_many_latents_near_their_thresholds_train_them_as_entries_do(name, ledgers, force):
    found = {}
    for path in ("sparse", "near"):
        force(path)
        found[path] = gradients(build(name, SAE, ledgers), inputs())
    (sparse, loss, expected), (near, same_loss, got) = found["sparse"], found["near"]
    assert near.window is not None
    assert len(near.values) < len(sparse.values)
    torch.testing.assert_close(near.to_dense(LATENTS), sparse.to_dense(LATENTS))
    torch.testing.assert_close(same_loss, loss)
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(got[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("path", ["sparse", "near", "dense"])
def test_thresholds_are_raised_alike_on_every_path(path, force):
    force(path)
    dictionary = build("jumprelu")
    dictionary.encoder.progress = 0.0
    dictionary.encoder.target_l0 = 3
    before = dictionary.encoder.thresholds().detach().clone()
    code = dictionary.encode(inputs())
    raised = dictionary.encoder.thresholds().detach() - before
    assert raised.min() > 0.01
    torch.testing.assert_close(raised, raised[:1].expand(LATENTS))
    # The budget's last margin is that by which thresholds rise, and does not exceed itself.
    assert int(code.l0().sum()) == 3 * TOKENS - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_inputs_through_dense_codes(name, force):
    found = {}
    for path in ("sparse", "dense"):
        force(path)
        x = inputs(requires_grad=True)
        gradients(build(name), x)
        found[path] = x.grad
    torch.testing.assert_close(found["dense"], found["sparse"])


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_codes_have_the_interface_of_sparse_ones(name, force):
    force("dense")
    dictionary = build(name)
    code = dictionary.encode(inputs().view(1, TOKENS, D))
    assert code.batch_shape == (1, TOKENS)
    dense = code.to_dense(LATENTS)
    some = torch.tensor([3, 29, 11])
    assert code.entries_per_token().tolist() == [LATENTS] * TOKENS
    torch.testing.assert_close(code.columns(some), dense[:, some])
    torch.testing.assert_close(code.where(code.values != 0).to_dense(LATENTS), dense)
    latents, values = code[0, 5]
    torch.testing.assert_close(dense[5, latents], values)
    assert len(values) == int(code.l0()[5])
    assert dictionary.decode(code).shape == (1, TOKENS, D)


def test_losses_of_flat_values_reach_the_weights(force):
    found = {}
    for path in ("sparse", "dense"):
        force(path)
        dictionary = build("relu")
        dictionary.encode(inputs()).values.pow(3).sum().backward()
        found[path] = dictionary.W_enc.grad
    torch.testing.assert_close(found["dense"], found["sparse"])


def test_eval_codes_and_low_precision_stay_sparse(force):
    force("dense")
    dictionary = build("relu").float()
    x = inputs().float()
    assert isinstance(dictionary.encode(x), DenseCode)
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(dictionary.encode(x), DenseCode)
    assert not isinstance(dictionary.eval().encode(x), DenseCode)


def test_the_path_depends_on_the_density(monkeypatch):
    monkeypatch.setattr(ops, "DENSE_ENTRIES", 1)
    dictionary = build("relu")
    x = inputs()
    share = float((x @ dictionary.W_enc.T + dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc.T > 0).double().mean())
    for limit, dense in ((share - 1e-9, True), (share + 1e-9, False)):
        monkeypatch.setattr(ops, "dense_share", lambda rows, limit=limit: limit)
        assert isinstance(dictionary.encode(x), DenseCode) == dense


def test_a_break_even_is_measured_once_and_can_be_restored(monkeypatch):
    from sparsary.sae import break_even

    monkeypatch.setattr(break_even, "_known", {})
    W = torch.randn(64, 8)
    share = ops.dense_share(W)
    assert break_even.LEAST <= share <= break_even.MOST
    (name,) = break_even.known_break_evens()
    break_even.restore_break_evens({name: 0.375})
    assert ops.dense_share(W) == 0.375


def test_measuring_draws_no_random_numbers(monkeypatch):
    from sparsary.sae import break_even

    monkeypatch.setattr(break_even, "_known", {})
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ops.dense_share(torch.ones(64, 8))
    assert torch.rand(1) == expected


def test_kept_memory_is_shared_by_no_two_tensors():
    pool, like = KeptMemory(), torch.zeros(1)
    first = pool.take(3, 4, like).fill_(1.0)
    second = pool.take(4, 3, like).fill_(2.0)
    kept = first[1:].T
    del first
    third = pool.take(2, 6, like).fill_(3.0)
    assert kept.unique().tolist() == [1.0]
    assert second.unique().tolist() == [2.0]
    assert third.unique().tolist() == [3.0]


def test_kept_memory_is_limited_and_freed():
    pool, like = KeptMemory(most_bytes=100), torch.zeros(1)
    place = pool.take(5, 5, like).data_ptr()
    assert pool.take(5, 5, like).data_ptr() == place
    # Too large to be kept.
    pool.take(26, 1, like)
    assert pool.kept_bytes == 100
    # The older one has to go.
    pool.take(3, 1, like)
    assert pool.kept_bytes == 12
    pool.free_idle(seconds=60.0)
    assert pool.kept_bytes == 12
    pool.free_idle(seconds=-1.0)
    assert pool.kept_bytes == 0
