"""What is special about TopK."""

import torch

from sparsary.sae import SAE
from sparsary.sae.encoder import Weights, pre_activations
from sparsary.sae.encoders.topk import TopK


def weights(n_latents=13, d=5):
    torch.manual_seed(1)
    return Weights(torch.randn(n_latents, d), torch.randn(n_latents), torch.randn(n_latents, d))


def test_keeps_the_k_largest_positive_pre_activations():
    w, x = weights(), torch.randn(17, 5)
    dense = TopK(3)(x, w).to_dense(13)
    for row, pre_acts in zip(dense, pre_activations(x, w), strict=True):
        expected = torch.zeros(13)
        best = pre_acts.argsort(descending=True)[:3]
        expected[best] = pre_acts[best].relu()
        torch.testing.assert_close(row, expected)


def test_all_latents_is_relu():
    w, x = weights(), torch.randn(17, 5)
    torch.testing.assert_close(TopK(13)(x, w).to_dense(13), pre_activations(x, w).relu())


def test_only_kept_entries_carry_gradient():
    w, x = weights(), torch.randn(1, 5)
    W_enc = w.W_enc.requires_grad_(True)
    code = TopK(2)(x, w)
    code.values.sum().backward()
    touched = set(W_enc.grad.abs().sum(-1).nonzero().squeeze(-1).tolist())
    assert touched == set(code.latents[code.values > 0].tolist())


def test_all_negative_pre_activations_reconstruct_the_bias():
    sae = SAE(5, 13, TopK(4))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
        sae.b_dec.copy_(torch.arange(5.0))
    x = torch.randn(3, 5)
    assert sae.encode(x).l0().tolist() == [0, 0, 0]
    assert torch.equal(sae(x), torch.arange(5.0).expand(3, 5))


def test_starts_tied_with_unit_atoms():
    sae = SAE(5, 13, TopK(4))
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(13))


def test_projected_gradient_is_tangent_and_renormalized_atoms_are_unit():
    sae = SAE(5, 13, TopK(4))
    x = torch.randn(64, 5)
    (sae(x) - x).pow(2).sum().backward()
    before = sae.W_dec.grad.clone()
    sae.project_grad()
    along = (sae.W_dec.grad * sae.W_dec).sum(-1)
    assert (before * sae.W_dec).sum(-1).abs().max() > 1e-2
    torch.testing.assert_close(along, torch.zeros(13), atol=1e-4, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    sae.renormalize()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(13), atol=1e-6, rtol=0)


def test_a_planted_dictionary_is_recovered():
    """Sparse sums of known directions: after training, an atom lies along nearly every one of them."""
    generator = torch.Generator().manual_seed(0)
    d, planted = 16, 24
    truth = torch.nn.functional.normalize(torch.randn(planted, d, generator=generator), dim=-1)
    sae = SAE(d, 32, TopK(3))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(500):
        strengths = torch.rand(256, planted, generator=generator) + 0.5
        fires = torch.rand(256, planted, generator=generator).topk(3, dim=-1).indices
        x = torch.zeros(256, planted).scatter(1, fires, strengths.gather(1, fires)) @ truth
        (sae(x) - x).pow(2).sum(-1).mean().backward()
        sae.project_grad()
        optimizer.step()
        optimizer.zero_grad()
        sae.renormalize()
    best = (truth @ sae.W_dec.T).abs().amax(-1)
    assert (best > 0.9).double().mean() > 0.9, best
