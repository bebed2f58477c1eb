import torch

from sae.encoder import Weights
from sae.losses import auxk, normalized_mse
from sae.metrics import fvu

D, LATENTS = 6, 10


def setup(dead_rows):
    torch.manual_seed(2)
    leaves = [torch.randn(LATENTS, D), torch.randn(LATENTS), torch.randn(LATENTS, D)]
    for leaf in leaves:
        leaf.requires_grad_(True)
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[dead_rows] = True
    return Weights(*leaves), dead


def test_normalized_mse_is_fvu_when_the_variance_is_the_batch_s():
    y = torch.randn(50, D, dtype=torch.float64)
    y_hat = y + 0.3 * torch.randn(50, D, dtype=torch.float64)
    variance = (y - y.mean(0)).pow(2).sum(-1).mean()
    torch.testing.assert_close(normalized_mse(y, y_hat, variance), fvu(y, y_hat))


def test_auxk_gradient_reaches_dead_rows_of_both_matrices_and_no_live_one():
    weights, dead = setup([1, 4, 7])
    x, error = torch.randn(20, D, requires_grad=True), torch.randn(20, D, requires_grad=True)
    auxk(x, error, weights, dead, k_aux=2).backward()
    for gradient in (weights.W_enc.grad, weights.W_dec.grad, weights.b_enc.grad.unsqueeze(-1)):
        assert (gradient[dead].abs().sum(-1) > 0).all()
        assert (gradient[~dead] == 0).all()
    assert x.grad is None
    assert error.grad is None


def test_auxk_without_dead_latents_is_zero_and_free():
    weights, dead = setup([])
    assert auxk(torch.randn(5, D), torch.randn(5, D), weights, dead, 3) == 0


def test_auxk_selects_the_strongest_dead_latents():
    weights, dead = setup([0, 2, 3, 5, 8])
    x, error = torch.randn(9, D), torch.randn(9, D)
    pre_acts = (x @ weights.W_enc.T + weights.b_enc)[:, dead].relu()
    strongest = pre_acts.topk(2, dim=-1)
    z = torch.zeros_like(pre_acts).scatter(1, strongest.indices, strongest.values)
    expected = (z @ weights.W_dec[dead] - error).pow(2).sum() / (error - error.mean(0)).pow(2).sum()
    torch.testing.assert_close(auxk(x, error, weights, dead, 2), expected)


def test_auxk_shrinks_with_the_number_of_dead_latents():
    weights, dead = setup([3])
    x, error = torch.randn(9, D), torch.randn(9, D)
    torch.testing.assert_close(auxk(x, error, weights, dead, 4) * 4, auxk(x, error, weights, dead, 1))


def test_auxk_of_a_perfect_reconstruction_is_finite():
    weights, dead = setup([1, 2])
    loss = auxk(torch.zeros(4, D) - 100 * weights.W_enc.detach()[1], torch.zeros(4, D), weights, dead, 1)
    loss.backward()
    assert torch.isfinite(weights.W_enc.grad).all()
