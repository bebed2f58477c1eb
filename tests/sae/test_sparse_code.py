"""SparseCode: columns of chosen latents, read and replaced."""

import pytest
import torch

from sparsary.sae import SAE, SparseCode
from sparsary.sae.encoders import build_encoder

N_LATENTS = 13


@pytest.fixture
def code():
    """Tokens with 2, 0, 3 and 1 entries; latent 7 stands twice in the third."""
    latents = torch.tensor([3, 11, 7, 2, 7, 3])
    return SparseCode(latents, torch.tensor([0.5, 2.0, 1.0, 0.25, 4.0, -1.0]), torch.tensor([0, 2, 2, 5]))


def test_columns_are_those_of_the_dense_code(code):
    latents = torch.tensor([7, 0, 3])
    assert torch.equal(code.columns(latents), code.to_dense(N_LATENTS)[:, latents])
    assert code.columns(torch.tensor([], dtype=torch.long)).shape == (4, 0)


def test_replaced_columns_are_those_of_the_dense_code(code):
    latents, values = torch.tensor([7, 0, 3]), torch.randn(4, 3)
    changed = code.with_columns(latents, values)
    expected = code.to_dense(N_LATENTS)
    expected[:, latents] = values
    assert torch.equal(changed.to_dense(N_LATENTS), expected)
    assert changed.entries_per_token().tolist() == [4, 3, 4, 3]
    same = code.with_columns(latents[:0], values[:, :0])
    assert torch.equal(same.latents, code.latents)
    assert torch.equal(same.starts, code.starts)


def test_replaced_columns_may_be_all_or_of_an_empty_code(code):
    values = torch.randn(4, N_LATENTS)
    every = torch.arange(N_LATENTS)
    assert torch.equal(code.with_columns(every, values).to_dense(N_LATENTS), values)
    empty = SparseCode(code.latents[:0], code.values[:0], torch.zeros(4, dtype=torch.long))
    assert torch.equal(empty.with_columns(every, values).to_dense(N_LATENTS), values)
    assert torch.equal(empty.columns(every), torch.zeros(4, N_LATENTS))


def test_gradients_go_to_old_and_new_values():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    new = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    latents, starts = torch.tensor([3, 11, 7, 2, 7, 3]), torch.tensor([0, 2, 2, 5])

    def through(values, new):
        code = SparseCode(latents, values, starts)
        changed = code.with_columns(torch.tensor([7, 0]), new)
        return code.columns(torch.tensor([7, 11])), changed.to_dense(N_LATENTS)

    assert torch.autograd.gradcheck(through, (values, new))


def test_a_latent_chosen_twice_is_refused(code):
    for act in (code.columns, lambda latents: code.with_columns(latents, torch.zeros(4, 3))):
        with pytest.raises(ValueError, match=r"latents: expected each at most once, got \[7, 2, 7\]"):
            act(torch.tensor([7, 2, 7]))


def test_a_latent_taken_again_counts_once():
    latents = torch.tensor([[3, 1, 3, 3], [0, 2, 4, 1], [5, 5, 0, 0]])
    values = torch.tensor([[1.0, 2.0, 0.5, 0.25], [1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 0.0]], requires_grad=True)
    steps, plain = SparseCode.from_steps(latents, values), SparseCode.from_rows(latents, values)
    assert torch.equal(steps.to_dense(6), plain.to_dense(6))
    assert steps.l0().tolist() == [2, 4, 1]
    assert steps.firings(6).tolist() == [1, 2, 1, 1, 1, 1]
    # An entry's gradient is its latent's.
    steps.to_dense(6).mul(torch.arange(18.0).view(3, 6)).sum().backward()
    assert torch.equal(values.grad, torch.arange(18.0).view(3, 6).gather(1, latents))


@pytest.mark.parametrize("spec", [{"name": "matching_pursuit", "k": 12}, {"name": "residual_pursuit", "max_steps": 12}])
def test_pursuits_count_distinct_latents(spec):
    torch.manual_seed(0)
    # Few atoms in few dimensions: some are taken again.
    rules = {"stop_on_repeat": False} if "residual" in spec["name"] else {}
    d = SAE(5, 9, build_encoder(spec | rules)).eval().requires_grad_(False)
    x = torch.randn(40, 5)
    for code in (d.encode(x), d.pursue(x, 12, "matching_pursuit")):
        assert torch.equal(code.l0(), (code.to_dense(9) != 0).sum(1))
        assert torch.equal(code.firings(9), (code.to_dense(9) != 0).sum(0))
        assert code.l0().float().mean() < 11
