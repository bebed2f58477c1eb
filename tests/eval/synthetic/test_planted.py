"""Planted data against the probabilities and angles it states, and scores against cases whose answer is known."""

import itertools

import pytest
import torch

from sparsary.eval.synthetic.firing import Forest
from sparsary.eval.synthetic.planted import (
    PLANTED,
    Sample,
    correlated,
    hierarchical,
    independent_features,
    small_but_decisive,
    zipf_probabilities,
)
from sparsary.eval.synthetic.recovery import Recovery, chance_mcc, evaluate_recovery, match, match_score
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder

TOKENS = 2003


def score_truth(planted, W_dec=None, order=None, latents=None):
    """The scores of the coefficients themselves, under other atoms, in another order or with other latents."""
    sample = planted.sample(TOKENS, 1)
    order = torch.arange(planted.n_features) if order is None else order
    latents = sample.coefficients if latents is None else latents
    W_dec = planted.atoms if W_dec is None else W_dec
    return match_score(planted, W_dec[order], latents[:, order], sample, sample.x)


@pytest.fixture(scope="module")
def superposed():
    return independent_features(67, 31, seed=5)


@pytest.mark.parametrize("name", PLANTED)
def test_the_truth_scores_full_marks(name):
    planted = PLANTED[name](3)
    report = score_truth(planted)
    for key in ("mcc", "mmcs_true", "recall_09", "uniqueness", "detector_f1", "coefficient_correlation"):
        assert report[key] == pytest.approx(1, abs=1e-6), key
    for group in planted.groups:
        assert report[f"recall_09_{group}"] == 1
    assert report["fvu"] == 0
    assert report["l0"] == report["true_l0"] > 0
    assert report["dead_fraction"] == 0
    assert report["chance_mcc"] < 0.7


def test_order_and_sign_and_scale_of_atoms_do_not_matter(superposed):
    scales = torch.randn(superposed.n_features, 1)
    report = score_truth(superposed, superposed.atoms * scales, torch.randperm(superposed.n_features))
    assert report == pytest.approx(score_truth(superposed), abs=1e-6)


def test_random_atoms_score_about_chance(superposed):
    sample = superposed.sample(TOKENS, 1)
    latents = torch.rand(TOKENS, 101) * (torch.rand(TOKENS, 101) < 0.1)
    report = match_score(superposed, torch.randn(101, superposed.d), latents, sample, sample.x.mean(0).expand_as(sample.x))
    assert report["mcc"] == pytest.approx(report["chance_mcc"], abs=0.03)
    assert 0.2 < report["mcc"] < 0.6
    assert report["recall_09"] == 0
    assert report["detector_f1"] < 0.2
    assert abs(report["coefficient_correlation"]) < 0.02
    assert report["fvu"] == pytest.approx(1)


def test_chance_falls_with_width_and_rises_with_latents():
    def chance(d, n_latents):
        return chance_mcc(independent_features(53, d, seed=0).atoms, n_latents)

    assert chance(64, 53) < chance(16, 53) < chance(16, 211)


def test_one_seed_for_all_does_not_hand_out_the_truth():
    planted = independent_features(53, 16, seed=3)
    torch.manual_seed(3)
    dictionary = SAE(16, 53, build_encoder({"name": "topk", "k": 2}))
    assert evaluate_recovery(dictionary, planted, 101, seed=3)["mcc"] < 0.6
    assert chance_mcc(planted.atoms, 53, seed=3) < 0.6


def test_duplicates_lower_uniqueness_and_count_once_in_mcc(superposed):
    order = torch.arange(superposed.n_features)
    order[7] = 11
    report = score_truth(superposed, order=order)
    n = superposed.n_features
    assert report["uniqueness"] == pytest.approx((n - 2) / n)
    assert report["recall_09"] == pytest.approx((n - 1) / n)
    # Atom 11 is given to one feature only, so feature 7 has to take the copy, which is not its own.
    stray = float(superposed.atoms[7] @ superposed.atoms[11])
    assert report["mcc"] == pytest.approx((n - 1 + abs(stray)) / n, abs=1e-6)


def test_matching_gives_up_the_best_pair_for_the_best_sum():
    cosines = torch.tensor([[0.9, 0.8, 0.1], [0.85, 0.2, 0.1]], dtype=torch.float64)
    pairs = match(cosines)
    assert (pairs.features.tolist(), pairs.latents.tolist()) == ([0, 1], [1, 0])
    cosines = torch.rand(5, 4, dtype=torch.float64)
    best = max(sum(cosines[f, i].item() for i, f in enumerate(p)) for p in itertools.permutations(range(5), 4))
    assert float(cosines[match(cosines)].sum()) == pytest.approx(best)


def test_scores_of_a_case_by_hand():
    planted = hierarchical(2, 0, 0.0, n_parents=0, n_singletons=2, p_singleton=0.5)
    a, b = planted.atoms
    # Five tokens: latent 0 finds feature 0 twice of three times and twice wrongly; latent 1 is silent.
    coefficients = torch.tensor([[1.0, 0], [2, 0], [3, 0], [0, 4], [0, 5]])
    latents = torch.tensor([[1.0, 0], [2, 0], [0, 0], [2, 0], [1, 0]])
    sample = Sample(coefficients @ planted.atoms, coefficients, None)
    report = match_score(planted, torch.stack([3 * a, 4 * a + 3 * b]), latents, sample, sample.x)
    assert report["mcc"] == pytest.approx((1 + 0.6) / 2)
    assert report["mmcs_true"] == pytest.approx((1 + 0.6) / 2)
    assert report["recall_09"] == 0.5
    assert report["uniqueness"] == 0
    assert report["detector_f1"] == pytest.approx((4 / 7 + 0) / 2)
    true, learned = coefficients[:, 0], latents[:, 0]
    assert report["coefficient_correlation"] == pytest.approx(float(torch.corrcoef(torch.stack([true, learned]))[0, 1]) / 2)
    # Both latents are nearest to feature 0: the silent one detects nothing of it.
    assert report["mmcs_learned"] == pytest.approx((1 + 0.8) / 2)
    assert report["distinct_features"] == 0.5
    assert (report["latent_f1"], report["latent_precision"]) == pytest.approx((4 / 7 / 2, 2 / 4 / 2))
    assert report["latent_recall"] == pytest.approx(2 / 3 / 2)
    assert report["shrinkage"] == 1
    assert (report["l0"], report["true_l0"], report["dead_fraction"]) == (0.8, 1, 0.5)


def test_several_samples_are_one(superposed):
    whole = superposed.sample(TOKENS, 1)
    latents = whole.coefficients * (torch.rand(whole.coefficients.shape) < 0.7)
    x_hat = 0.9 * whole.x
    recovery = Recovery(superposed, superposed.atoms)
    for part in torch.arange(TOKENS).split(701):
        recovery.update(latents[part], Sample(whole.x[part], whole.coefficients[part], None), x_hat[part])
    assert recovery.report() == pytest.approx(match_score(superposed, superposed.atoms, latents, whole, x_hat), abs=1e-9)
    assert recovery.report()["shrinkage"] == pytest.approx(0.9, abs=1e-6)


def test_features_that_never_fire_are_no_evidence_against_a_detector(superposed):
    sample = superposed.sample(TOKENS, 1)
    coefficients = sample.coefficients.clone()
    coefficients[:, 3] = 0
    sample = sample._replace(coefficients=coefficients)
    report = match_score(superposed, superposed.atoms, coefficients, sample, sample.x)
    assert (report["detector_f1"], report["coefficient_correlation"]) == pytest.approx((1, 1))


def test_a_group_s_recall_is_of_its_own_features():
    planted = small_but_decisive(13, 2, 11, seed=0)
    W_dec = planted.atoms.clone()
    W_dec[planted.groups["decisive"][0]] = planted.atoms[0] + planted.atoms[1]
    report = score_truth(planted, W_dec)
    assert (report["recall_09_large"], report["recall_09_decisive"]) == (1, 0.5)


@pytest.mark.parametrize("name", PLANTED)
def test_generators_fire_as_stated(name):
    planted = PLANTED[name](3)
    sample = planted.sample(10_007, 7)
    p = planted.firing.probabilities()
    found = (sample.coefficients > 0).float().mean(0)
    assert ((found - p).abs() < 5 * (p * (1 - p) / 10_007).sqrt()).all()
    assert (sample.coefficients > 0).sum(-1).float().mean() == pytest.approx(float(p.sum()), rel=0.03)
    magnitude = sample.coefficients.sum(0) / (sample.coefficients > 0).sum(0)
    assert magnitude.tolist() == pytest.approx(planted.means.tolist(), rel=0.1)
    assert torch.allclose(planted.atoms.norm(dim=-1), torch.ones(planted.n_features), atol=1e-5)
    assert torch.allclose(sample.x, sample.coefficients @ planted.atoms + planted.bias)
    assert (sample.grad is not None) == (name == "small_but_decisive")


@pytest.mark.parametrize("name", PLANTED)
def test_seeds_decide_everything(name):
    one, same, other = (PLANTED[name](seed) for seed in (3, 3, 4))
    assert torch.equal(one.atoms, same.atoms)
    assert not torch.allclose(one.atoms, other.atoms)
    assert torch.equal(one.sample(53, 1).x, same.sample(53, 1).x)
    assert not torch.allclose(one.sample(53, 1).x, one.sample(53, 2).x)


def test_zipf_falls_from_p_max_to_p_min():
    p = zipf_probabilities(101, 1.0, 0.01, 0.3)
    assert (float(p[0]), float(p[-1])) == pytest.approx((0.3, 0.01))
    assert (p.diff() < 0).all()
    # Before the stretch p falls like 1 / rank: equal steps of 1 / rank are equal steps of p.
    assert float((p[0] - p[1]) / (p[1] - p[5])) == pytest.approx((1 - 1 / 2) / (1 / 2 - 1 / 6), rel=1e-4)
    assert zipf_probabilities(3, 0.0, 0.1, 0.3).tolist() == pytest.approx([0.1] * 3)
    with pytest.raises(ValueError, match="p_min, p_max: expected"):
        zipf_probabilities(3, 1.0, 0.0, 0.3)


def test_flat_features_fire_independently_and_correlated_ones_as_their_factors_say():
    for planted, strength in (
        (independent_features(29, 11, 0, p_min=0.2, p_max=0.4), 0),
        (correlated(29, 11, 0, p_min=0.2, p_max=0.4), 1),
    ):
        fires = (planted.sample(20_011, 0).coefficients > 0).float()
        found = torch.corrcoef(fires.T)
        off = ~torch.eye(29, dtype=torch.bool)
        if not strength:
            assert found[off].abs().max() < 0.04
        else:
            # A firing pair's correlation follows the normals' monotonically, and is weaker.
            normals = planted.firing.factors @ planted.firing.factors.T
            assert float(torch.corrcoef(torch.stack([found[off], normals[off]]))[0, 1]) > 0.97
            assert found[off].max() > 0.2
            assert found[off].min() < -0.1
    with pytest.raises(ValueError, match="strength: expected a share"):
        correlated(5, 3, 0, strength=1.5)


def test_siblings_exclude_each_other_and_need_their_parent():
    planted = hierarchical(23, 0, 0.4)
    fires = planted.sample(20_011, 0).coefficients > 0
    assert float(planted.firing.probabilities().sum()) == pytest.approx(1.36)
    assert fires[:, :11].sum(-1).unique().tolist() == [1]
    for parent in range(3):
        children = fires[:, 11 + 3 * parent : 14 + 3 * parent].sum(-1)
        assert children[~fires[:, parent]].max() == 0
        assert children[fires[:, parent]].unique().tolist() == [0, 1]
        assert float(children[fires[:, parent]].float().mean()) == pytest.approx(0.6, abs=0.03)


def test_a_forest_may_be_deep():
    forest = Forest(torch.tensor([-1, 0, 1, 1]), torch.tensor([0.5, 0.8, 0.5, 0.25]))
    fires = forest.draw(20_011, torch.Generator().manual_seed(0))
    assert forest.probabilities().tolist() == pytest.approx([0.5, 0.4, 0.2, 0.1])
    assert fires.float().mean(0).tolist() == pytest.approx([0.5, 0.4, 0.2, 0.1], abs=0.02)
    assert not (fires[:, 2] & fires[:, 3]).any()
    assert not (fires[:, 2] & ~fires[:, 1]).any()


@pytest.mark.parametrize("cosine", [0.0, 0.4, 0.8])
def test_atoms_of_one_level_have_the_stated_cosine_and_levels_are_orthogonal(cosine):
    atoms = hierarchical(20, 1, cosine).atoms
    level = torch.tensor([0] * 11 + [1] * 3 + [2] * 3 + [3] * 3)
    expected = torch.where(level[:, None] == level, cosine, 0.0).fill_diagonal_(1)
    assert torch.allclose(atoms @ atoms.T, expected, atol=1e-5)


def test_hierarchies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="d: expected at least 20, one dimension per feature, got 19"):
        hierarchical(19, 0, 0.0)
    with pytest.raises(ValueError, match=r"p_child: .* sum to at most 1, got 1\.2"):
        hierarchical(20, 0, 0.0, p_child=0.4)
    with pytest.raises(ValueError, match="cosine: expected at least 0 and less than 1"):
        hierarchical(20, 0, 1.0)


def test_small_features_alone_decide_and_their_gradient_is_autograd_s():
    planted = small_but_decisive(47, 3, 19, seed=2)
    sample = planted.sample(TOKENS, 3)
    decisive = sample.coefficients[:, planted.groups["decisive"]]
    labels = planted.decision.labels(sample.coefficients)
    assert torch.equal(labels, (decisive > 0).any(-1).float())
    logits = planted.decision.logits(sample.x)
    assert torch.allclose(logits, 20 * decisive.sum(-1) - 1, atol=1e-4)
    assert ((logits > 0) == (labels > 0)).float().mean() > 0.99
    assert decisive.pow(2).sum() < 0.002 * sample.coefficients.pow(2).sum()
    x = sample.x.clone().requires_grad_()
    planted.decision.loss(x, labels).backward()
    assert torch.allclose(sample.grad, x.grad, atol=1e-6)
    assert x.grad.norm(dim=-1).min() > 0
    # Only decisive atoms move the loss.
    effects = sample.grad @ planted.atoms.T
    assert effects[:, planted.groups["large"]].abs().max() < 1e-4 < effects[:, planted.groups["decisive"]].abs().max()
    with pytest.raises(ValueError, match="n_decisive: expected less than d = 3, got 3"):
        small_but_decisive(5, 3, 3, seed=0)


def test_judging_a_dictionary_made_of_the_truth():
    planted = hierarchical(23, 0, 0.0)
    dictionary = SAE(23, 20, build_encoder({"name": "topk", "k": 2}))
    order = torch.randperm(20)
    with torch.no_grad():
        dictionary.W_dec.copy_(planted.atoms[order])
        dictionary.W_enc.copy_(planted.atoms[order])
        # Half a token's second place would else go to rounding noise.
        dictionary.b_enc.fill_(-0.1)
    report = evaluate_recovery(dictionary.train(), planted, TOKENS, seed=9)
    assert dictionary.training
    assert report["mcc"] == pytest.approx(1, abs=1e-5)
    assert report["detector_f1"] == pytest.approx(1, abs=1e-3)
    assert report["l0"] == pytest.approx(report["true_l0"], abs=1e-3)
    assert report["coefficient_correlation"] > 0.99
    assert report["fvu"] < 0.02
    assert report == evaluate_recovery(dictionary, planted, TOKENS, seed=9)
    with pytest.raises(ValueError, match="expected d_in = d_out = 20, as planted, got 23 and 23"):
        evaluate_recovery(dictionary, hierarchical(20, 0, 0.0), 11, seed=0)


def test_judging_in_batches_changes_nothing(monkeypatch):
    planted = small_but_decisive(13, 2, 11, seed=0)
    dictionary = SAE(11, 17, build_encoder({"name": "topk", "k": 3}))
    whole = evaluate_recovery(dictionary, planted, 101, seed=0)
    monkeypatch.setattr("sparsary.eval.synthetic.recovery.JUDGE_BATCH_TOKENS", 23)
    assert evaluate_recovery(dictionary, planted, 101, seed=0) == pytest.approx(whole, abs=1e-6)


def test_judging_hands_the_gradient_to_the_encoder_in_eval_mode():
    planted = small_but_decisive(13, 2, 11, seed=0)
    dictionary = SAE(11, 17, build_encoder({"name": "topk", "k": 3}))
    seen = []

    def look(encoder, inputs):
        seen.append((encoder.training, inputs[2]))

    dictionary.encoder.register_forward_pre_hook(look)
    evaluate_recovery(dictionary, planted, 101, seed=4)
    ((training, grad),) = seen
    assert not training
    assert torch.equal(grad, planted.sample(101, 4).grad)
