import torch

from sparsary.sae.encoder import Weights
from sparsary.sae.losses import aux_zipf, auxk, normalized_mse, pre_activation_loss
from sparsary.sae.metrics import fvu
from sparsary.sae.zipf import underused, zipf

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


def lawful_density(weak_rows):
    """Densities along a Zipf law, but for some rows that fire a thousand times too rarely."""
    density = 3 * zipf(LATENTS, 1.0, 0.5)[torch.randperm(LATENTS)]
    density[weak_rows] = 1e-4
    return density


def test_aux_zipf_at_tau_0_is_auxk_bit_for_bit():
    density = lawful_density([2, 5])
    gradients = []
    for loss in (auxk, lambda *a: aux_zipf(*a[:-1], density, 0.0, a[-1])):
        weights, dead = setup([1, 4, 7])
        x, error = torch.randn(20, D), torch.randn(20, D)
        value = loss(x, error, weights, dead, 2)
        value.backward()
        gradients.append([value.detach(), weights.W_enc.grad, weights.b_enc.grad, weights.W_dec.grad])
    assert gradients[0][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_aux_zipf_reaches_dead_and_underused_rows_and_no_other():
    for absolute in (False, True):
        weights, dead = setup([1])
        density = lawful_density([2, 5])
        density[1] = 0.0
        pool = torch.tensor([1, 2, 5])
        assert torch.equal(underused(density, 0.5, absolute).nonzero().squeeze(-1), pool)
        aux_zipf(torch.randn(50, D), torch.randn(50, D), weights, dead, density, 0.5, 2, absolute).backward()
        for gradient in (weights.W_enc.grad, weights.W_dec.grad, weights.b_enc.grad.unsqueeze(-1)):
            assert torch.equal(gradient.abs().sum(-1).nonzero().squeeze(-1), pool)


def test_aux_zipf_takes_the_dead_even_if_their_running_density_is_high():
    weights, dead = setup([3])
    density = 3 * zipf(LATENTS, 1.0, 0.5)
    x, error = torch.randn(20, D), torch.randn(20, D)
    assert not underused(density, 0.5).any()
    assert torch.equal(aux_zipf(x, error, weights, dead, density, 0.5, 1), auxk(x, error, weights, dead, 1))


def test_aux_zipf_before_anything_has_fired_is_free():
    weights, dead = setup([])
    assert aux_zipf(torch.randn(5, D), torch.randn(5, D), weights, dead, torch.zeros(LATENTS), 0.5, 3) == 0


def test_the_pre_activation_loss_is_the_shortfall_of_dead_latents():
    weights, dead = setup([1, 4, 7])
    x, thresholds = torch.randn(20, D, requires_grad=True), torch.rand(LATENTS, requires_grad=True)
    loss = pre_activation_loss(x, weights, thresholds, dead)
    below = (thresholds - x @ weights.W_enc.T - weights.b_enc).relu() * weights.W_dec.norm(dim=-1)
    torch.testing.assert_close(loss, below[:, dead].sum() / (20 * D))
    loss.backward()
    assert x.grad is None
    assert weights.W_dec.grad is None
    for gradient in (weights.W_enc.grad, weights.b_enc.grad.unsqueeze(-1), thresholds.grad.unsqueeze(-1)):
        assert (gradient[dead].abs().sum(-1) > 0).all()
        assert (gradient[~dead] == 0).all()
    # Thresholds fall and pre-activations rise.
    assert (thresholds.grad[dead] > 0).all()
    assert (weights.b_enc.grad[dead] < 0).all()


def test_the_pre_activation_loss_s_gradients_in_float64():
    weights, dead = setup([0, 3, 8])
    x, W_dec = torch.randn(20, D).double(), weights.W_dec.detach().double()

    def loss(W_enc, b_enc, thresholds):
        return pre_activation_loss(x, Weights(W_enc, b_enc, W_dec, site_width=3), thresholds, dead)

    inputs = [each.detach().double().requires_grad_(True) for each in (weights.W_enc, weights.b_enc, torch.rand(LATENTS))]
    assert torch.autograd.gradcheck(loss, inputs)


def test_the_pre_activation_loss_without_dead_latents_or_tokens_is_zero():
    weights, dead = setup([])
    assert pre_activation_loss(torch.randn(5, D), weights, torch.rand(LATENTS), dead) == 0
    assert pre_activation_loss(torch.randn(0, D), weights, torch.rand(LATENTS), ~dead) == 0
