"""The screen: exact values of nearly the same latents, a measured recall, and retreat where the recall is too low."""

import logging

import pytest
import torch
from torch import Tensor

from sparsary.sae import ENCODERS, SAE
from sparsary.sae import screen as screen_module
from sparsary.sae.encoder import Weights
from sparsary.sae.screen import CANDIDATES, MEASURE_EVERY, MEASURE_TOKENS, Screen, coarse_tiles, int8_is_faster, quantize
from sparsary.sae.sparse_code import SparseCode
from sparsary.sae.tiled_scores import Scorer, largest_per_token

TOKENS, D, LATENTS, K = 31, 37, 211, 5


def scorer(bias=True, tokens=TOKENS, n_latents=LATENTS, dtype=torch.float32) -> Scorer:
    b = torch.randn(n_latents, dtype=dtype) if bias else None
    return Scorer(torch.randn(tokens, D, dtype=dtype), torch.randn(n_latents, D, dtype=dtype), b)


def whole_of(scorer: Scorer) -> Tensor:
    return torch.nn.functional.linear(scorer.x, scorer.W, scorer.b)


def rows_of(code: SparseCode, k: int = K) -> Tensor:
    return code.latents.view(-1, k).sort(1).values


@pytest.fixture
def noise(monkeypatch):
    """A screen that finds nothing."""
    exact = screen_module.quantize

    def noisy(rows):
        coarse, scale = exact(rows)
        return torch.randint_like(coarse, -127, 128), scale

    monkeypatch.setattr(screen_module, "quantize", noisy)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_all_of_the_largest_are_found_and_their_values_are_exact(kernels, bias, dtype):
    some, screen = scorer(bias, dtype=dtype), Screen("int8", 0.9)
    code = screen.largest_per_token(some, K)
    expected = largest_per_token(some.tiles(), K)
    assert (rows_of(code) == rows_of(expected)).double().mean() > 0.99
    torch.testing.assert_close(code.values, whole_of(some)[code.token_ids(), code.latents], rtol=1e-5, atol=1e-5)
    assert screen.recall > 0.99
    assert all(len(row.unique()) == K for row in code.latents.view(-1, K))


@pytest.mark.parametrize(("seconds", "screens"), [(1.0, False), (0.1, True), (30.0, False)])
def test_a_screen_that_is_not_faster_selects_exactly(monkeypatch, caplog, noise, seconds, screens):
    # The trial's products by their precision.
    monkeypatch.setattr("sparsary.sae.break_even._known", {})
    monkeypatch.setattr("sparsary.sae.break_even._timed", lambda work, device: seconds if work.__name__ == "in_int8" else 1.0)
    some, screen = scorer(), Screen("int8", 0.0, if_faster=True)
    screen.largest_per_token(some, K)
    code, exact = screen.largest_per_token(some, K), largest_per_token(some.tiles(), K)
    assert torch.equal(rows_of(code), rows_of(exact)) != screens
    assert len(caplog.records) == (not screens)
    assert "selection is exact" in caplog.text or screens
    # Unless it is asked for, nothing is measured.
    assert not torch.equal(rows_of(Screen("int8", 0.0).largest_per_token(some, K)), rows_of(exact))


def test_the_products_that_are_timed_run():
    int8_is_faster(torch.zeros(1))


def test_coarse_scores_are_the_product_s_to_rounding(kernels, monkeypatch):
    some = scorer()
    monkeypatch.setattr("sparsary.sae.tiled_scores.WHOLE_NUMBERS", 0)
    monkeypatch.setattr("sparsary.sae.tiled_scores.LEAST_WIDTH", 50)
    monkeypatch.setattr("sparsary.sae.tiled_scores.TILE_NUMBERS_CPU", 50 * len(some.x))
    coarse = torch.cat([tile.scores.clone() for tile in coarse_tiles(some)], dim=1) * quantize(some.x)[1][:, None]
    # Each of D products is off by half a level of either factor.
    assert (coarse - whole_of(some)).abs().max() < 0.02 * whole_of(some).abs().max()


def test_kernels_and_torch_find_the_same_latents(without_kernels):
    pytest.importorskip("numba")
    some = scorer()
    by_kernel, tiles = Screen("int8", 0.9).largest_per_token(some, K), [t.scores.clone() for t in coarse_tiles(some)]
    without_kernels()
    by_torch = Screen("int8", 0.9).largest_per_token(some, K)
    for a, b in zip(tiles, coarse_tiles(some), strict=True):
        torch.testing.assert_close(a, b.scores, rtol=1e-5, atol=1e-2)
    assert (rows_of(by_kernel) == rows_of(by_torch)).double().mean() > 0.99


def test_with_as_many_candidates_as_latents_the_selection_is_exact(kernels, monkeypatch, noise):
    some, screen = scorer(n_latents=2 * K), Screen("int8", 1.0)
    assert torch.equal(rows_of(screen.largest_per_token(some, K)), rows_of(largest_per_token(some.tiles(), K)))
    assert (float(screen.recall), screen.stage) == (1.0, 0)


@pytest.mark.parametrize("n_latents", [K, 2 * K + 1, 23])
def test_few_latents(kernels, n_latents):
    some = scorer(n_latents=n_latents)
    code = Screen("int8", 0.5).largest_per_token(some, K)
    assert (rows_of(code) == rows_of(largest_per_token(some.tiles(), K))).double().mean() > 0.95


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(kernels, tokens):
    screen = Screen("int8", 0.5)
    code = screen.largest_per_token(scorer(tokens=tokens), K)
    assert code.n_tokens == tokens
    assert len(code.values) == tokens * K
    assert screen.recall > 0.5


def test_too_low_a_recall_gets_more_candidates_then_exact_selection(kernels, noise, caplog):
    some, screen = scorer(), Screen("int8", 0.9)
    exact = rows_of(largest_per_token(some.tiles(), K))
    counts = []
    for _ in range(2 * MEASURE_EVERY + 2):
        code = screen.largest_per_token(some, K)
        counts.append(screen.stage)
        torch.testing.assert_close(code.values, whole_of(some)[code.token_ids(), code.latents], rtol=1e-5, atol=1e-5)
    # Measured in the first batch and in every fiftieth after it.
    assert counts == [1] * MEASURE_EVERY + [2] * (MEASURE_EVERY + 2)
    assert torch.equal(rows_of(code), exact)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(CANDIDATES)
    assert "is below screen_floor 0.9000; from now on 4 candidates each." in warnings[0]
    assert "from now on exact selection." in warnings[1]


def test_exact_selection_has_full_recall(noise):
    screen = Screen("int8", 0.9)
    screen.stage = len(CANDIDATES) - 1
    screen.largest_per_token(scorer(), K)
    assert screen.stage == len(CANDIDATES)
    assert screen.recall < 0.9
    screen.largest_per_token(scorer(), K)
    assert screen.recall == 1


def test_a_recall_at_the_floor_is_good_enough(kernels, noise):
    screen = Screen("int8", 0.0)
    screen.largest_per_token(scorer(), K)
    assert screen.stage == 0
    assert 0 < screen.recall < 0.9


def test_recall_counts_the_largest_positive_scores_that_were_found(monkeypatch):
    whole = torch.arange(1.0, 24.0).expand(3, 23).clone()
    whole[1] -= 22
    whole[2] -= 50
    some, screen = Scorer(whole, torch.eye(23), None), Screen("int8", 0.0)
    # Of the first token one of two is found, of the second its only positive one; finding the third's counts for nothing.
    found = SparseCode.from_rows(torch.tensor([[22, 3], [22, 3], [22, 21]]), torch.zeros(3, 2))
    monkeypatch.setattr(Screen, "screened", lambda self, scorer, k: found)
    screen.largest_per_token(some, 2)
    assert float(screen.recall) == pytest.approx(2 / 3)


def test_without_a_positive_score_nothing_can_be_missed(noise):
    some = Scorer(torch.rand(TOKENS, D), -torch.rand(LATENTS, D), None)
    screen = Screen("int8", 1.0)
    screen.largest_per_token(some, K)
    assert (float(screen.recall), screen.stage) == (1.0, 0)


def test_the_recall_is_measured_on_some_tokens_of_every_fiftieth_batch(monkeypatch):
    screen, measured = Screen("int8", 0.0), []
    monkeypatch.setattr(Screen, "_measure", lambda self, scorer, found, k: measured.append(self.batches))
    for _ in range(101):
        screen.largest_per_token(scorer(tokens=3), K)
    assert measured == [1, 51, 101]


def test_the_recall_is_not_of_the_first_tokens(noise):
    """Zeros have no positive score here, so nothing can be missed; the rest of the batch shows what is."""
    x = torch.cat([torch.zeros(MEASURE_TOKENS, D), torch.randn(3 * MEASURE_TOKENS, D)])
    some = Scorer(x, torch.randn(LATENTS, D), -torch.rand(LATENTS))
    recalls = []
    for _ in range(2):
        screen = Screen("int8", 0.0)
        state = torch.get_rng_state()
        screen.largest_per_token(some, K)
        recalls.append(float(screen.recall))
        torch.set_rng_state(state)
    assert 0 < recalls[0] < 0.9
    # And of the same ones when a run is resumed.
    assert recalls[0] == recalls[1]


def test_a_restored_screen_goes_on_where_it_was(noise):
    screen, some = Screen("int8", 0.9), scorer()
    for _ in range(7):
        screen.largest_per_token(some, K)
    state = screen.state()
    assert all(isinstance(value, Tensor) for value in state.values())
    again = Screen("int8", 0.9)
    again.restore({name: value.clone() for name, value in state.items()})
    assert (again.batches, again.stage, float(again.recall)) == (7, 1, float(screen.recall))
    for _ in range(MEASURE_EVERY):
        torch.manual_seed(1)
        a = screen.largest_per_token(some, K)
        torch.manual_seed(1)
        b = again.largest_per_token(some, K)
        assert torch.equal(a.latents, b.latents)
    assert screen.stage == again.stage == len(CANDIDATES)


# Where rounding to levels breaks.


@pytest.mark.parametrize("column", [0, D - 1])
def test_nan_in_a_token_is_seen_in_its_code_and_nowhere_else(kernels, column):
    some = scorer()
    some.x[3, column] = torch.nan
    values = Screen("int8", 0.0).largest_per_token(some, K).values.view(TOKENS, K)
    assert values.isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("column", [0, D - 1])
def test_nan_in_a_row_of_weights_is_seen(kernels, column):
    some = scorer()
    some.W[3, column] = torch.nan
    assert Screen("int8", 0.0).largest_per_token(some, K).values.isnan().any()


@pytest.mark.parametrize("strength", [0.0, 1e-41])
def test_a_token_of_zeros_is_ranked_by_the_biases(kernels, strength):
    """Divided by next to nothing, biases were infinite, ties, and one latent was found several times."""
    x = torch.full((2, D), strength)
    b = -9 - torch.rand(LATENTS)
    b[0], b[LATENTS - 1], b[100] = 7.0, 9.0, 8.0
    code = Screen("int8", 0.0).largest_per_token(Scorer(x, torch.randn(LATENTS, D), b), K)
    assert (code.values.view(2, K) > 0).sum(1).tolist() == [3, 3]
    torch.testing.assert_close(code.relu().to_dense(LATENTS), b.relu().expand(2, -1))


def test_quantized_rows_give_the_original_to_half_a_level(kernels):
    rows = torch.randn(TOKENS, D) * torch.logspace(-20, 20, TOKENS)[:, None]
    rows[4] = 0
    coarse, scale = quantize(rows)
    assert (coarse[torch.arange(TOKENS) != 4].abs().amax(1) == 127).all()
    assert ((coarse * scale[:, None] - rows).abs() <= scale[:, None] * 0.5001).all()


# In an encoder.


def test_training_screens_and_everything_else_is_exact(monkeypatch):
    sae, calls = SAE(D, LATENTS, ENCODERS["topk"](k=K)), []
    sae.screen = Screen("int8", 0.0)
    screened = Screen.screened
    monkeypatch.setattr(Screen, "screened", lambda self, scorer, k: (calls.append(k), screened(self, scorer, k))[1])
    x = torch.randn(TOKENS, D)
    found = sae.train().encode(x)
    assert calls == [K]
    assert torch.equal(rows_of(sae.eval().encode(x)), rows_of(found))
    assert calls == [K]


def test_gradients_are_those_of_the_exact_encoder():
    sae, x = SAE(D, LATENTS, ENCODERS["topk"](k=K)).double(), torch.randn(TOKENS, D, dtype=torch.float64)
    gradients = []
    for screen in (None, Screen("int8", 0.0)):
        code = sae.encoder(x, Weights(sae.W_enc, sae.b_enc, sae.W_dec, screen))
        gradients.append(torch.autograd.grad(code.values.pow(2).sum(), [sae.W_enc, sae.b_enc]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_low_precision_autocast_screens_as_well():
    some, screen = SAE(D, LATENTS, ENCODERS["topk"](k=K)), Screen("int8", 0.5)
    some.screen = screen
    with torch.autocast("cpu", torch.bfloat16):
        loss = some(torch.randn(TOKENS, D)).pow(2).sum()
    loss.backward()
    # Exact scores are rounded too, by torch's product in another way than one by one: near ties go either way.
    assert screen.recall > 0.8
    assert torch.isfinite(some.W_enc.grad).all()
