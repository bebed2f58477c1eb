"""What is special about choosing latents by their effect on the model's loss."""

import pytest
import torch
import torch.nn.functional as F

from sparsary.sae import SAE
from sparsary.sae.encoder import Weights, pre_activations, scorer
from sparsary.sae.encoders.gradient_topk import GradientTopK
from sparsary.sae.encoders.topk import TopK

TOKENS, D, LATENTS = 31, 5, 13
NORMALIZE = pytest.mark.parametrize("normalize", ["token", "none"])


def weights(n_latents=LATENTS, d=D):
    torch.manual_seed(1)
    return Weights(torch.randn(n_latents, d), torch.randn(n_latents), F.normalize(torch.randn(n_latents, d), dim=-1))


def dense(encoder, x, w, grad=None):
    return encoder(x, w, grad).to_dense(w.W_dec.shape[0])


def test_the_best_scores_are_kept_and_the_values_stay_activations():
    w, x, grad = weights(), torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    a = pre_activations(x, w).relu()
    scores = a * (1 + 3.0 * (grad @ w.W_dec.T).abs())
    smallest = scores.sort(descending=True).values[:, 3:4]
    kept = dense(GradientTopK(4, 3.0, "none"), x, w, grad)
    torch.testing.assert_close(kept, a * (scores >= smallest))
    assert not torch.equal(kept, dense(TopK(4), x, w))


@NORMALIZE
def test_beta_0_is_topk(normalize):
    w, x = weights(), torch.randn(TOKENS, D)
    code, plain = GradientTopK(3, 0.0, normalize)(x, w, torch.randn(TOKENS, D)), TopK(3)(x, w)
    for part in ("latents", "values", "starts"):
        torch.testing.assert_close(getattr(code, part), getattr(plain, part))


@NORMALIZE
def test_the_sign_of_the_gradient_does_not_matter(normalize):
    w, x, grad = weights(), torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    encoder = GradientTopK(3, 4.0, normalize)
    assert torch.equal(dense(encoder, x, w, grad), dense(encoder, x, w, -grad))
    flipped = grad * torch.tensor([1.0, -1.0]).repeat(TOKENS)[:TOKENS, None]
    assert torch.equal(dense(encoder, x, w, grad), dense(encoder, x, w, flipped))


def scores_of(encoder, x, w, grad):
    """All that the encoder chooses by."""
    return torch.cat([tile.scores.clone() for tile in encoder.tiles(scorer(x, w), w, grad)], dim=1)


def test_scores_rise_linearly_with_beta_and_with_the_gradient():
    w, x, grad = weights(), torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    pre_acts = pre_activations(x, w)
    a, influence = pre_acts, (grad @ w.W_dec.T).abs()
    for beta, factor in ((0.5, 1.0), (2.0, 1.0), (1.0, 7.0)):
        scores = scores_of(GradientTopK(3, beta, "none"), x, w, factor * grad)
        torch.testing.assert_close(scores - a, a * beta * factor * influence)


def test_normalised_gradients_count_by_direction_only():
    w, x, grad = weights(), torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    pre_acts, encoder = pre_activations(x, w), GradientTopK(3, 4.0, "token")
    scores = scores_of(encoder, x, w, grad)
    # Powers of two do not even change the rounding.
    assert torch.equal(scores_of(encoder, x, w, 2 * grad), scores)
    per_token = 2.0 ** torch.arange(TOKENS).sub(15)[:, None]
    torch.testing.assert_close(scores_of(encoder, x, w, per_token * grad), scores)
    a = pre_acts
    assert (scores.abs() <= a.abs() * (1 + 4.0) + 1e-6).all()
    cosines = F.cosine_similarity(grad[:, None], w.W_dec[None], dim=-1)
    torch.testing.assert_close(scores, a * (1 + 4.0 * cosines.abs()))
    loud = GradientTopK(3, 4.0, "none")
    assert not torch.equal(dense(loud, x, w, 1000 * grad), dense(loud, x, w, grad))


def test_a_token_without_gradient_is_coded_by_topk():
    w, x, grad = weights(), torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    grad[7] = 0.0
    found = dense(GradientTopK(3, 50.0), x, w, grad)
    torch.testing.assert_close(found[7], dense(TopK(3), x, w)[7])
    assert torch.isfinite(found).all()


def test_scores_and_gradient_are_constants_of_training():
    torch.manual_seed(1)
    leaves = [torch.randn(LATENTS, D), torch.randn(LATENTS), torch.randn(LATENTS, D)]
    W_enc, b_enc, W_dec = (leaf.requires_grad_(True) for leaf in leaves)
    grad = torch.randn(2, D, requires_grad=True)
    code = GradientTopK(2, 5.0)(torch.randn(2, D), Weights(W_enc, b_enc, W_dec), grad)
    code.values.sum().backward()
    assert W_dec.grad is None
    assert grad.grad is None
    touched = set(W_enc.grad.abs().sum(-1).nonzero().squeeze(-1).tolist())
    assert touched == set(code.latents[code.values > 0].tolist())


def test_training_without_a_gradient_says_how_to_get_one():
    sae = SAE(D, LATENTS, GradientTopK(3, 4.0))
    with pytest.raises(ValueError, match=r"grad: .* got none\. Set harvest\.gradients: true .*sparsary harvest RECIPE"):
        sae.encode(torch.randn(2, D))


def test_evaluation_is_topk_without_a_gradient_and_an_oracle_with_one():
    sae = SAE(D, LATENTS, GradientTopK(3, 40.0))
    plain = SAE(D, LATENTS, TopK(3))
    plain.load_state_dict(sae.state_dict())
    x, grad = torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    trained = sae.encode(x, grad).to_dense(LATENTS)
    sae.eval()
    torch.testing.assert_close(sae(x), plain(x))
    oracle = sae.encode(x, grad).to_dense(LATENTS)
    assert torch.equal(oracle, trained)
    assert not torch.equal(oracle, sae.encode(x).to_dense(LATENTS))


def test_a_gradient_of_raw_activations_is_brought_to_the_dictionary_s_units():
    """Of x / 8 the gradient is 8 times that of x; without normalisation the choice must see it."""
    sae = SAE(D, LATENTS, GradientTopK(3, 0.3, "none"))
    x, grad = torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    before = sae.encode(x, grad).to_dense(LATENTS)
    sae.in_scale.fill_(8.0)
    sae.out_scale.fill_(8.0)
    assert torch.equal(sae.encode(8 * x, grad / 8).to_dense(LATENTS), before)
    assert not torch.equal(sae.encode(8 * x, grad).to_dense(LATENTS), before)


def test_on_a_linear_model_the_attribution_is_the_effect_of_removing_the_latent():
    """L = v . x: the score's second part, divided by beta, is by how much L changes without the latent."""
    sae = SAE(D, LATENTS, GradientTopK(4, 2.0, "none")).double()
    with torch.no_grad():
        sae.b_dec.normal_()
    sae.in_scale.fill_(3.0)
    sae.out_scale.fill_(3.0)
    x, v = torch.randn(TOKENS, D).double(), torch.randn(D).double()
    grad = v.expand(TOKENS, D)
    with torch.no_grad():
        code = sae.encode(x, grad)
        pre_acts = pre_activations(sae.centre(x / 3.0), sae.weights)
        attribution = (scores_of(sae.encoder, sae.centre(x / 3.0), sae.weights, 3.0 * grad) - pre_acts.relu()) / 2.0
        loss = sae.decode(code) @ v
        for entry in range(len(code.values)):
            token, latent = int(code.token_ids()[entry]), int(code.latents[entry])
            without = sae.decode(code.where(torch.arange(len(code.values)) != entry)) @ v
            effect = loss - without
            torch.testing.assert_close(effect[token].abs(), attribution[token, latent])
            assert effect.abs().sum() == effect[token].abs()


def test_a_faint_atom_that_matters_is_kept_where_topk_drops_it():
    """Three loud atoms and one of a fiftieth of their strength, on which alone the loss depends."""
    atoms = torch.eye(7)
    w = Weights(atoms, torch.zeros(7), atoms)
    x = torch.rand(TOKENS, 7)
    x[:, :3] += 5.0
    x[:, 3:6] = 0.0
    x[:, 6] = 0.1
    grad = torch.randn(TOKENS, 1) * atoms[6]
    plain, chosen = dense(TopK(2), x, w), dense(GradientTopK(2, 100.0), x, w, grad)
    assert (plain[:, 6] == 0).all()
    torch.testing.assert_close(chosen[:, 6], torch.full((TOKENS,), 0.1))
    assert ((chosen > 0).sum(-1) == 2).all()
    # With too little weight it is TopK's choice again.
    torch.testing.assert_close(dense(GradientTopK(2, 10.0), x, w, grad), plain)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.beta: expected at least 0\.0, got -1\.0"):
        GradientTopK(3, -1.0)
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.k: expected at least 1, got 0"):
        GradientTopK(0, 1.0)
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.k: expected at most n_latents = 13, got 14"):
        SAE(D, LATENTS, GradientTopK(14, 1.0))
