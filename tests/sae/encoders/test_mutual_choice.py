"""What is special about mutual choice and BatchTopK."""

import copy

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.sae.encoder import Weights, pre_activations, scorer
from sparsary.sae.encoders.batch_topk import BatchTopK
from sparsary.sae.encoders.topk import TopK
from sparsary.sae.metrics import fvu
from sparsary.sae.tiled_scores import Scorer

TOKENS, D, LATENTS = 31, 5, 13
BOTH = pytest.mark.parametrize("name", ["mutual_choice", "batch_topk"])


def weights(n_latents=LATENTS, d=D):
    torch.manual_seed(1)
    return Weights(torch.randn(n_latents, d), torch.randn(n_latents), torch.randn(n_latents, d))


def encoder(name="mutual_choice", k=3, n_latents=LATENTS):
    made = ENCODERS[name](k=k)
    made.prepare(n_latents)
    return made


@BOTH
def test_the_largest_pairs_of_the_batch_are_kept_whatever_token_they_belong_to(name):
    w, x = weights(), torch.randn(TOKENS, D)
    pre_acts = pre_activations(x, w)
    code = encoder(name)(x, w)
    assert len(code.values) == 3 * TOKENS
    smallest = pre_acts.reshape(-1).sort(descending=True).values[3 * TOKENS - 1]
    torch.testing.assert_close(code.to_dense(LATENTS), pre_acts.relu() * (pre_acts >= smallest))
    counts = code.entries_per_token()
    assert int(counts.sum()) == 3 * TOKENS
    assert len(counts.unique()) > 3


def test_mutual_choice_and_batch_topk_are_the_same_selection_bit_for_bit():
    saes = [SAE(D, LATENTS, ENCODERS[name](k=3)) for name in ("mutual_choice", "batch_topk")]
    saes[1].load_state_dict(saes[0].state_dict())
    for step in range(3):
        x = torch.randn(TOKENS, D)
        for sae in saes:
            sae.train(step < 2)
        codes = [sae.encode(x) for sae in saes]
        for part in ("latents", "values", "starts"):
            assert torch.equal(getattr(codes[0], part), getattr(codes[1], part)), part
        assert torch.equal(saes[0].decode(codes[0]), saes[1].decode(codes[1]))
    assert all(torch.equal(saes[0].state_dict()[name], tensor) for name, tensor in saes[1].state_dict().items())


def test_one_token_is_topk():
    w, x = weights(), torch.randn(1, D)
    assert torch.equal(encoder()(x, w).to_dense(LATENTS), TopK(3)(x, w).to_dense(LATENTS))


def test_a_budget_of_all_pairs_is_relu():
    w, x = weights(), torch.randn(TOKENS, D)
    code = encoder(k=LATENTS)(x, w)
    assert len(code.values) == TOKENS * LATENTS
    torch.testing.assert_close(code.to_dense(LATENTS), pre_activations(x, w).relu())


def test_permuting_tokens_permutes_the_code():
    w, x = weights(), torch.randn(TOKENS, D)
    order = torch.randperm(TOKENS)
    before = encoder()(x, w).to_dense(LATENTS)
    torch.testing.assert_close(encoder()(x[order], w).to_dense(LATENTS), before[order])


def test_equal_tokens_share_the_budget_exactly_and_lower_ones_come_first():
    w = weights()
    x = torch.cat([torch.randn(1, D).expand(17, D), torch.randn(14, D)])
    scores = pre_activations(x, w)
    flat = scores.reshape(-1).tolist()
    best = sorted(sorted(range(len(flat)), key=lambda cell: (-flat[cell], cell))[: 3 * TOKENS])
    code = encoder()(x, w)
    assert (code.token_ids() * LATENTS + code.latents).tolist() == best
    # All tokens equal, and a budget that gives one latent to some of them only.
    few = encoder(k=1)(x[:17], w)
    assert len(few.values) == 17
    assert few.entries_per_token().tolist() == [1] * 17


def test_zero_tokens_get_what_the_biases_are_worth():
    w = weights()
    code = encoder()(torch.zeros(TOKENS, D), w)
    assert len(code.values) == 3 * TOKENS
    top = w.b_enc.topk(3).indices
    assert set(code.latents.tolist()) == set(top.tolist())
    silent = encoder()(torch.zeros(TOKENS, D), Weights(w.W_enc, -w.b_enc.abs() - 1, w.W_dec))
    assert len(silent.values) == 3 * TOKENS
    assert silent.l0().tolist() == [0] * TOKENS


def test_only_kept_entries_carry_gradient():
    w, x = weights(), torch.randn(2, D)
    W_enc = w.W_enc.requires_grad_(True)
    code = encoder(k=2)(x, w)
    code.values.sum().backward()
    touched = set(W_enc.grad.abs().sum(-1).nonzero().squeeze(-1).tolist())
    assert touched == set(code.latents[code.values > 0].tolist())
    assert len(touched) < LATENTS


@BOTH
def test_evaluating_before_any_batch_is_an_error(name):
    sae = SAE(D, LATENTS, ENCODERS[name](k=3)).eval()
    with pytest.raises(ValueError, match=r"encoder: no threshold is known before the first training batch\. Train"):
        sae(torch.randn(2, D))
    with pytest.raises(ValueError, match=r"expected tokens to calibrate the threshold on, got none"):
        sae.encoder.calibrate([])


def test_level_and_density_are_the_batch_s_at_first():
    w, x = weights(), torch.randn(TOKENS, D)
    made = encoder()
    made(x, w)
    scores = pre_activations(x, w)
    smallest = scores.reshape(-1).sort(descending=True).values[3 * TOKENS - 1]
    assert float(made.level) == pytest.approx(float(smallest))
    torch.testing.assert_close(made.density, (scores >= smallest).float().mean(0))
    assert int(made.batches) == 1


def test_calibration_finds_the_exact_level_and_evaluation_keeps_what_exceeds_it():
    made = encoder()
    scores = torch.randn(500, LATENTS, generator=torch.Generator().manual_seed(3))
    made.calibrate(Scorer(part, torch.eye(part.shape[1]), None) for part in scores.split(77))
    assert int((scores > made.level).sum()) == 3 * 500
    assert int(made.batches) == 1
    made.eval()
    w, x = weights(), torch.randn(TOKENS, D)
    pre_acts = pre_activations(x, w)
    torch.testing.assert_close(made(x, w).to_dense(LATENTS), pre_acts * (pre_acts > made.level))


@BOTH
def test_a_calibrated_threshold_is_worth_what_the_batch_is(name, planted, train_on_planted):
    k = 2
    sae = train_on_planted(SAE(17, 29, ENCODERS[name](k=k)), 150)
    with torch.no_grad():
        sae.encoder.calibrate(scorer(sae.centre(planted(512, 50 + i)), sae.weights) for i in range(12))
    heldout = planted(6144, 99)
    judge = copy.deepcopy(sae)
    with torch.no_grad():
        in_batches = torch.cat([judge(x) for x in heldout.split(512)])
        sae.eval()
        code = sae.encode(heldout)
        by_threshold = sae.decode(code)
    l0 = float(code.l0().double().mean())
    assert l0 == pytest.approx(k, rel=0.05)
    assert len(code.l0().unique()) > 3
    batch, threshold = float(fvu(heldout, in_batches)), float(fvu(heldout, by_threshold))
    assert batch < 0.25
    assert threshold == pytest.approx(batch, rel=0.02)


def test_a_k_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.k: expected at least 1, got 0"):
        BatchTopK(k=0)
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.k: expected at most n_latents = 13, got 14"):
        encoder(k=14)
