"""What is special about feature choice."""

import copy

import pytest
import torch

from sparsary.sae import SAE
from sparsary.sae.encoder import Weights, pre_activations, scorer
from sparsary.sae.encoders.feature_choice import FeatureChoice
from sparsary.sae.encoders.mutual_choice import MutualChoice
from sparsary.sae.encoders.topk import TopK
from sparsary.sae.metrics import fvu
from sparsary.sae.tiled_scores import Scorer
from sparsary.sae.zipf import fit_zipf, integer_budgets, zipf

TOKENS, D, LATENTS, K = 31, 5, 13, 3


def weights(offset=0.0):
    torch.manual_seed(1)
    return Weights(torch.randn(LATENTS, D), offset + torch.randn(LATENTS), torch.randn(LATENTS, D))


def encoder(k=K, **options):
    made = FeatureChoice(k=k, **options)
    made.prepare(LATENTS)
    return made


def with_law(alpha, shift, rank, **options):
    made = encoder(**options)
    made.law.copy_(torch.tensor([alpha, shift]))
    made.rank.copy_(rank)
    made.ranked_at.zero_()
    return made


def test_uniform_budgets_give_every_latent_the_same_number_of_tokens():
    made = encoder(budget="uniform")
    code = made(torch.randn(TOKENS, D), weights(offset=50.0))
    counts = code.firings(LATENTS)
    assert int(counts.sum()) == TOKENS * K
    # 93 matches for 13 latents: 7 each and 2 over.
    assert sorted(counts.tolist()) == [7] * 11 + [8] * 2
    assert torch.equal(counts, made.budgets(TOKENS, LATENTS))
    assert len(code.l0().unique()) > 2


def test_zipf_budgets_go_to_the_latents_by_rank():
    rank = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(2))
    made = with_law(1.0, 2.0, rank)
    code = made(torch.randn(TOKENS, D), weights(offset=50.0))
    expected = integer_budgets(zipf(LATENTS, 1.0, 2.0), TOKENS * K, TOKENS)[rank]
    assert torch.equal(code.firings(LATENTS), expected)
    assert expected.max() > 3 * expected.min()


def test_every_latent_keeps_its_strongest_tokens():
    w, x = weights(), torch.randn(TOKENS, D)
    made = with_law(1.0, 2.0, torch.arange(LATENTS))
    dense, budgets = made(x, w).to_dense(LATENTS), made.budgets(TOKENS, LATENTS)
    for latent, pre_acts in enumerate(pre_activations(x, w).T):
        best = pre_acts.argsort(descending=True)[: int(budgets[latent])]
        expected = torch.zeros(TOKENS)
        expected[best] = pre_acts[best].relu()
        torch.testing.assert_close(dense[:, latent], expected)


@pytest.mark.parametrize("budget", ["zipf", "uniform"])
def test_all_tokens_for_every_latent_is_relu(budget):
    w, x = weights(), torch.randn(TOKENS, D)
    made = encoder(k=LATENTS, budget=budget)
    code = made(x, w)
    assert made.budgets(TOKENS, LATENTS).tolist() == [TOKENS] * LATENTS
    assert len(code.values) == TOKENS * LATENTS
    torch.testing.assert_close(code.to_dense(LATENTS), pre_activations(x, w).relu())


@pytest.mark.parametrize(("alpha", "shift"), [(0.0, 0.0), (1.0, 2.0), (2.0, 0.0)])
def test_no_latent_is_left_unused_where_pre_activations_are_positive(alpha, shift):
    made = with_law(alpha, shift, torch.arange(LATENTS))
    for tokens in (made.smallest_batch, TOKENS):
        firings = made(torch.randn(tokens, D), weights(offset=50.0)).firings(LATENTS)
        assert int(firings.min()) >= 1
        assert int(firings.sum()) == tokens * K


def test_entries_that_are_not_positive_use_budget_but_do_not_fire():
    code = encoder(budget="uniform")(torch.randn(TOKENS, D), weights(offset=-50.0))
    assert len(code.values) == TOKENS * K
    assert int(code.l0().sum()) == 0


def test_permuting_tokens_permutes_the_code():
    w, x = weights(), torch.randn(TOKENS, D)
    order = torch.randperm(TOKENS)
    before = encoder(budget="uniform")(x, w).to_dense(LATENTS)
    torch.testing.assert_close(encoder(budget="uniform")(x[order], w).to_dense(LATENTS), before[order])


def test_a_batch_too_small_for_every_latent_is_refused_with_the_arithmetic():
    made = encoder()
    assert made.smallest_batch == 5
    made(torch.randn(5, D), weights())
    message = (
        r"batch_tokens: expected at least one match per latent, got 4 tokens x k 3 = 12 matches for 13 latents\. "
        r"Set batch_tokens to at least 5, or raise k\."
    )
    with pytest.raises(ValueError, match=message):
        made(torch.randn(4, D), weights())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.rerank_every: expected at least 1, got 0"):
        encoder(rerank_every=0)
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.k: expected at most n_latents = 13, got 14"):
        encoder(k=14)


# Ranks.


def after_mutual_choice(batches=4, **options):
    mutual = MutualChoice(k=K)
    mutual.prepare(LATENTS)
    w = weights()
    for _ in range(batches):
        mutual(torch.randn(TOKENS, D), w)
    made = encoder(**options)
    made.inherit(mutual)
    return made, mutual


def test_densities_come_from_the_phase_before_and_rank_the_latents_at_once():
    made, mutual = after_mutual_choice()
    assert torch.equal(made.density, mutual.density)
    assert float(made.level) == float(mutual.level)
    assert int(made.batches) == 4
    law = fit_zipf(mutual.density)
    made(torch.randn(TOKENS, D), weights())
    assert made.law.tolist() == pytest.approx(law)
    assert law[0] > 0
    budgets = made.budgets(TOKENS, LATENTS)
    order = mutual.density.argsort(descending=True, stable=True)
    assert torch.equal(made.rank[order], torch.arange(LATENTS))
    assert (budgets[order][:-1] >= budgets[order][1:]).all()
    assert budgets.max() > budgets.min()


def test_nothing_is_inherited_from_an_encoder_that_measures_nothing():
    made = encoder()
    made.inherit(TopK(k=K))
    assert int(made.batches) == 0
    made(torch.randn(TOKENS, D), weights())
    assert made.law.tolist() == [0.0, 0.0]


def test_from_scratch_budgets_stay_uniform_until_rerank_every():
    made, w = encoder(rerank_every=3), weights()
    for _ in range(3):
        made(torch.randn(TOKENS, D), w)
        assert made.law.tolist() == [0.0, 0.0]
        assert int(made.budgets(TOKENS, LATENTS).max() - made.budgets(TOKENS, LATENTS).min()) <= 1
    measured = made.density.clone()
    made(torch.randn(TOKENS, D), w)
    assert made.law.tolist() == pytest.approx(fit_zipf(measured))
    assert made.budgets(TOKENS, LATENTS).max() > made.budgets(TOKENS, LATENTS).min() + 1


def test_uniform_budgets_never_follow_demand():
    made, _ = after_mutual_choice(budget="uniform", rerank_every=1)
    for _ in range(3):
        made(torch.randn(TOKENS, D), weights())
    assert made.law.tolist() == [0.0, 0.0]
    assert torch.equal(made.rank, torch.arange(LATENTS))


def test_ranks_follow_demand_every_rerank_every_batches_only():
    made, _ = after_mutual_choice(rerank_every=2)
    w, reranked = weights(), []
    for _ in range(6):
        # Demand turned upside down before every batch.
        made.density.copy_(made.density.flip(0))
        before = made.rank.clone()
        made(torch.randn(TOKENS, D), w)
        reranked.append(int(made.ranked_at) == int(made.batches) - 1)
        assert reranked[-1] or torch.equal(made.rank, before)
    assert reranked == [True, False, True, False, True, False]


def test_the_law_is_fitted_once():
    made, _ = after_mutual_choice(rerank_every=1)
    made(torch.randn(TOKENS, D), weights())
    law = made.law.clone()
    made.density.copy_(torch.linspace(0.9, 0.01, LATENTS))
    made(torch.randn(TOKENS, D), weights())
    assert torch.equal(made.law, law)


def test_a_slight_change_of_demand_does_not_move_ranks_and_a_large_one_does():
    made = encoder()
    density = zipf(LATENTS, 1.0, 1.0).float() * K
    made.density.copy_(density)
    made.rerank()
    assert torch.equal(made.rank, torch.arange(LATENTS))
    # Latents 4 and 5 change places by a little: less than the budgets of their ranks differ.
    ratio = float(density[4] / density[5])
    made.density[4], made.density[5] = float(density[5]), float(density[5]) * (1 + 0.5 * (ratio - 1))
    made.rerank()
    assert torch.equal(made.rank, torch.arange(LATENTS))
    made.density[5] = float(density[4]) * 1.3
    made.rerank()
    assert made.rank.tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11, 12]


def test_silent_latents_rank_last():
    made = encoder()
    made.density.copy_(zipf(LATENTS, 1.0, 1.0).float() * K)
    made.density[2] = 0.0
    made.rerank()
    assert int(made.rank[2]) == LATENTS - 1
    assert sorted(made.rank.tolist()) == list(range(LATENTS))


def test_ranks_and_thresholds_survive_a_save(tmp_path, assert_same_tensors):
    from sparsary.sae import load_dictionary

    sae = SAE(D, LATENTS, FeatureChoice(k=K, rerank_every=2))
    for _ in range(5):
        sae.encode(torch.randn(TOKENS, D))
    sae.save(tmp_path / "d")
    again = load_dictionary(tmp_path / "d").train()
    assert_same_tensors(again, sae)
    # What the next batch does with them is the same too, up to rounding.
    x = torch.randn(TOKENS, D)
    torch.testing.assert_close(again.encode(x).to_dense(LATENTS), sae.encode(x).to_dense(LATENTS))


# Thresholds.


def test_evaluating_before_any_batch_is_an_error():
    sae = SAE(D, LATENTS, FeatureChoice(k=K)).eval()
    with pytest.raises(ValueError, match=r"encoder: no threshold is known before the first training batch"):
        sae(torch.randn(TOKENS, D))
    with pytest.raises(ValueError, match=r"expected tokens to calibrate the thresholds on, got none"):
        sae.encoder.calibrate([])


def test_thresholds_after_the_first_batch_are_the_smallest_scores_kept():
    made, w, x = encoder(), weights(offset=50.0), torch.randn(TOKENS, D)
    dense = made(x, w).to_dense(LATENTS)
    torch.testing.assert_close(made.thresholds, dense.where(dense > 0, torch.inf).amin(0))


def test_thresholds_start_right_after_another_phase_too():
    made, _ = after_mutual_choice(batches=30)
    w, x = weights(offset=50.0), torch.randn(TOKENS, D)
    dense = made(x, w).to_dense(LATENTS)
    torch.testing.assert_close(made.thresholds, dense.where(dense > 0, torch.inf).amin(0))


def test_calibrated_thresholds_are_exceeded_by_each_latent_s_share_of_tokens():
    made = with_law(1.0, 2.0, torch.randperm(LATENTS, generator=torch.Generator().manual_seed(2)))
    made.batch_tokens.fill_(TOKENS)
    generator = torch.Generator().manual_seed(6)
    offsets = torch.linspace(5, 15, LATENTS)
    scores = offsets + torch.randn(40 * TOKENS, LATENTS, generator=generator)
    made.calibrate(Scorer(part, torch.eye(LATENTS), None) for part in scores.split(7 * TOKENS))
    budgets = made.budgets(TOKENS, LATENTS)
    assert torch.equal((scores > made.thresholds).sum(0), budgets * 40)
    heldout = offsets + torch.randn(20_000, LATENTS, generator=generator)
    density = (heldout > made.thresholds).double().mean(0)
    torch.testing.assert_close(density, budgets.double() / TOKENS, rtol=0.2, atol=0.01)
    made.eval()
    w = weights()
    x = torch.randn(TOKENS, D)
    pre_acts = pre_activations(x, w)
    made.thresholds.copy_(torch.linspace(0, 2, LATENTS))
    torch.testing.assert_close(made(x, w).to_dense(LATENTS), pre_acts * (pre_acts > made.thresholds))


def test_calibrating_latents_that_are_seldom_positive_keeps_them_from_firing_on_the_rest():
    made = encoder(budget="uniform")
    made.batch_tokens.fill_(TOKENS)
    made.calibrate([Scorer(torch.full((50, LATENTS), -1.0), torch.eye(LATENTS), None)])
    assert made.thresholds.tolist() == [0.0] * LATENTS


def test_calibrated_thresholds_are_worth_what_the_batch_is(planted, train_on_planted):
    """Mutual choice, then feature choice with the fitted budgets, as a recipe with two phases does it."""
    k, n = 2, 29
    sae = train_on_planted(SAE(17, n, MutualChoice(k=k)), 150)
    feature = FeatureChoice(k=k)
    feature.prepare(n)
    feature.inherit(sae.encoder)
    sae.encoder = feature
    train_on_planted(sae, 60, seed=1)
    with torch.no_grad():
        sae.encoder.calibrate(scorer(sae.centre(planted(512, 50 + i)), sae.weights) for i in range(24))
    heldout = planted(12_288, 99)
    judge = copy.deepcopy(sae)
    with torch.no_grad():
        # One large batch: in small ones a fixed number of tokens per latent costs more than a threshold does.
        in_batch = judge.encode(heldout)
        by_batch = judge.decode(in_batch)
        sae.eval()
        code = sae.encode(heldout)
        by_threshold = sae.decode(code)
    tokens = len(heldout)
    l0 = float(code.l0().double().mean())
    assert l0 == pytest.approx(float(in_batch.l0().double().mean()), rel=0.05)
    assert l0 == pytest.approx(k, rel=0.05)
    # Where the budget is met by positive scores, every latent fires as often as it is due.
    due = sae.encoder.budgets(257, n).double() / 257
    density = code.firings(n).double() / tokens
    frequent = (due > 0.03) & (sae.encoder.thresholds > 0.05)
    assert int(frequent.sum()) >= 10
    torch.testing.assert_close(density[frequent], due[frequent], rtol=0.2, atol=0)
    batch, threshold = float(fvu(heldout, by_batch)), float(fvu(heldout, by_threshold))
    assert batch < 0.3
    assert threshold == pytest.approx(batch, rel=0.02)
