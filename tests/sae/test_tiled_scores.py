"""Selection on tiles against the whole product: the same entries whatever the tiles, the guess and the kernels are."""

import itertools

import pytest
import torch
from torch import Tensor

from sparsary.sae import ENCODERS, SAE
from sparsary.sae import encoder as encoding
from sparsary.sae import tiled_scores as scores
from sparsary.sae.sparse_code import SparseCode
from sparsary.sae.tiled_scores import (
    Scorer,
    above,
    largest_of_batch,
    largest_per_latent,
    largest_per_token,
    level_of_batch,
    pick,
)

TOKENS, D, LATENTS = 23, 11, 67


@pytest.fixture(params=[7, 66, 67], ids="tiles of {}".format)
def width(request, monkeypatch):
    """Widths of a tile: some latents with a remainder, all but one, all."""
    monkeypatch.setattr(scores, "LEAST_WIDTH", request.param)
    monkeypatch.setattr(scores, "TILE_NUMBERS_CPU", request.param * TOKENS)
    monkeypatch.setattr(scores, "WHOLE_NUMBERS", 0)
    return request.param


def random_scorer(tokens=TOKENS, bias=True, dtype=torch.float64) -> Scorer:
    b = torch.randn(LATENTS, dtype=dtype) if bias else None
    return Scorer(torch.randn(tokens, D, dtype=dtype), torch.randn(LATENTS, D, dtype=dtype), b)


def scorer_of(whole: Tensor) -> Scorer:
    """A scorer whose product is this matrix."""
    return Scorer(whole, torch.eye(whole.shape[1], dtype=whole.dtype), None)


def whole_of(scorer: Scorer) -> Tensor:
    return torch.nn.functional.linear(scorer.x, scorer.W, scorer.b)


def entries_of(code: SparseCode) -> list[tuple[int, int]]:
    return list(zip(code.token_ids().tolist(), code.latents.tolist(), strict=True))


def values_are_the_product_s(code: SparseCode, scorer: Scorer) -> None:
    torch.testing.assert_close(code.values, whole_of(scorer)[code.token_ids(), code.latents], rtol=1e-12, atol=1e-12)


# Tiles.


@pytest.mark.parametrize("bias", [True, False])
def test_tiles_of_latents_make_up_the_whole_product(width, bias):
    scorer = random_scorer(bias=bias)
    by_token = torch.cat([tile.scores.clone() for tile in scorer.tiles()], dim=1)
    by_latent = torch.cat([tile.scores.clone() for tile in scorer.tiles_by_latent()])
    torch.testing.assert_close(by_token, whole_of(scorer))
    torch.testing.assert_close(by_latent, whole_of(scorer).T)
    assert [tile.first for tile in scorer.tiles()] == list(range(0, LATENTS, width))


def test_tiles_of_tokens_make_up_the_whole_product(monkeypatch):
    monkeypatch.setattr(scores, "TILE_NUMBERS_CPU", 5 * LATENTS)
    scorer = random_scorer()
    torch.testing.assert_close(torch.cat([tile.scores.clone() for tile in scorer.tiles()]), whole_of(scorer))
    assert [(tile.first, tile.token) for tile in scorer.tiles()] == [(0, token) for token in range(0, TOKENS, 5)]


def test_without_tokens_there_is_one_empty_tile():
    assert [tile.scores.shape for tile in random_scorer(tokens=0).tiles()] == [(0, LATENTS)]


def test_tiles_are_of_some_tokens_where_the_latents_are_few_else_of_some_latents(monkeypatch):
    assert random_scorer().tile_shape == (TOKENS, LATENTS)
    assert random_scorer(tokens=0).tile_shape == (1, LATENTS)
    monkeypatch.setattr(scores, "TILE_NUMBERS_CPU", 20 * TOKENS)
    assert random_scorer().tile_shape == (20 * TOKENS // LATENTS, LATENTS)
    monkeypatch.setattr(scores, "WHOLE_NUMBERS", LATENTS * D - 1)
    assert random_scorer().tile_shape == (20 * TOKENS // 256, LATENTS)
    monkeypatch.setattr(scores, "LEAST_WIDTH", 5)
    assert random_scorer().tile_shape == (TOKENS, 20)


def test_picked_scores_are_those_of_the_product():
    for scorer in (random_scorer(), random_scorer(bias=False)):
        code = SparseCode.from_rows(torch.randint(LATENTS, (TOKENS, 3)), torch.zeros(TOKENS, 3))
        expected = whole_of(scorer)[code.token_ids(), code.latents]
        torch.testing.assert_close(pick(scorer, code), expected)


# By token.


@pytest.mark.parametrize("k", [1, 3, 40, LATENTS])
def test_the_largest_of_every_token(kernels, width, k):
    scorer = random_scorer()
    code = largest_per_token(scorer.tiles(), k)
    expected = whole_of(scorer).topk(k, dim=1)
    torch.testing.assert_close(code.values.view(TOKENS, k).sort(1, descending=True).values, expected.values)
    assert torch.equal(code.latents.view(TOKENS, k).sort(1).values, expected.indices.sort(1).values)
    values_are_the_product_s(code, scorer)


@pytest.mark.parametrize("place", [0, 30, LATENTS - 1])
def test_a_nan_among_a_token_s_scores_is_seen_in_its_code_and_nowhere_else(kernels, width, place):
    whole = torch.randn(TOKENS, LATENTS)
    whole[5, place] = torch.nan
    values = largest_per_token(_tiles_of(whole, width), 3).values.view(TOKENS, 3)
    assert values.isnan().any(1).nonzero().flatten().tolist() == [5]


def _tiles_of(whole: Tensor, width: int):
    for first in range(0, whole.shape[1], width):
        yield scores.Tile(first, whole[:, first : first + width].contiguous(), 0)


def test_scores_of_minus_infinity_are_chosen_last(kernels, width):
    whole = torch.full((TOKENS, LATENTS), -torch.inf)
    whole[:, 3::30] = torch.randn(TOKENS, 3)
    values = largest_per_token(_tiles_of(whole, width), 5).values.view(TOKENS, 5).sort(1, descending=True).values
    assert torch.equal(values, whole.topk(5, dim=1).values)


# Above a cut.


@pytest.mark.parametrize("cut", [torch.tensor(0.5), torch.linspace(-2, 2, LATENTS), torch.tensor(99.0), torch.tensor(-99.0)])
@pytest.mark.parametrize("tokens", [TOKENS, 1, 0])
def test_everything_above_a_cut_in_order(kernels, width, cut, tokens):
    scorer = random_scorer(tokens)
    code = above(scorer.tiles(), cut, tokens, LATENTS)
    whole = whole_of(scorer)
    assert entries_of(code) == [tuple(pair) for pair in (whole > cut).nonzero().tolist()]
    assert code.n_tokens == tokens
    values_are_the_product_s(code, scorer)


def test_a_score_at_the_cut_is_not_above_it(kernels, width):
    code = above(scorer_of(torch.full((TOKENS, LATENTS), 0.5)).tiles(), torch.tensor(0.5), TOKENS, LATENTS)
    assert len(code.values) == 0


# Of a whole batch.


def best_cells(whole: Tensor, budget: int) -> list[tuple[int, int]]:
    """Among equal scores the lower token, then the lower latent."""
    cells = whole.flatten().argsort(descending=True, stable=True)[:budget].sort().values
    return [(int(cell) // whole.shape[1], int(cell) % whole.shape[1]) for cell in cells]


GUESSES = {
    "none": None,
    "far too low": -1e3,
    "low": -0.5,
    "fair": 1.0,
    "too high": 5.0,
    "far too high": 1e3,
    "infinite": float("inf"),
    "nan": float("nan"),
}


@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
def test_the_largest_of_a_batch_whatever_the_guess(kernels, width, kind):
    make = {
        "distinct": lambda: torch.randn(TOKENS, LATENTS),
        "ties": lambda: torch.randint(-2, 3, (TOKENS, LATENTS)).float(),
        "all equal": lambda: torch.full((TOKENS, LATENTS), 0.75),
    }
    whole = make[kind]()
    budgets = (1, 3 * TOKENS, TOKENS * LATENTS - 1, TOKENS * LATENTS + 5)
    for budget, guess in itertools.product(budgets, sorted(GUESSES)):
        code, cut = largest_of_batch(scorer_of(whole), budget, GUESSES[guess])
        assert entries_of(code) == best_cells(whole, budget), (budget, guess)
        assert torch.equal(code.values, whole[code.token_ids(), code.latents])
        # The next batch's guess is one that works.
        assert entries_of(largest_of_batch(scorer_of(whole), budget, cut)[0]) == best_cells(whole, budget)


@pytest.mark.parametrize("guess", [None, 0.0])
def test_no_budget_keeps_nothing_and_no_token_has_nothing_to_keep(kernels, width, guess):
    code, cut = largest_of_batch(random_scorer(), 0, guess)
    assert (len(code.values), code.n_tokens, cut) == (0, TOKENS, None)
    code, cut = largest_of_batch(random_scorer(tokens=0), 5, guess)
    assert (len(code.values), code.n_tokens, cut) == (0, 0, None)


def test_the_guess_settles_where_a_little_more_than_the_budget_comes_through():
    cut = None
    for _ in range(30):
        scorer = random_scorer(tokens=211)
        code, cut = largest_of_batch(scorer, 3 * 211, cut)
        assert len(code.values) == 3 * 211
    assert cut is not None
    share = float((whole_of(scorer) > cut).double().mean()) * LATENTS / 3
    assert 1.0 < share < 1.6


def test_a_good_guess_reads_the_tiles_once(monkeypatch):
    scorer, calls = random_scorer(), []
    level = float(whole_of(scorer).flatten().topk(4 * TOKENS).values[-1])
    tiles = Scorer.tiles
    monkeypatch.setattr(Scorer, "tiles", lambda self: (calls.append(1), tiles(self))[1])
    largest_of_batch(scorer, 3 * TOKENS, level)
    assert len(calls) == 1


def test_the_level_of_a_small_batch_is_that_of_its_budget(width):
    scorer = random_scorer()
    for budget in (1, 50, TOKENS * LATENTS):
        expected = whole_of(scorer).flatten().topk(budget).values[-1]
        assert level_of_batch(scorer, budget) == pytest.approx(float(expected))
    assert level_of_batch(scorer, 50, slack=2.0) == pytest.approx(float(whole_of(scorer).flatten().topk(100).values[-1]))
    assert level_of_batch(scorer, 10**6) == pytest.approx(float(whole_of(scorer).min()))


def test_the_level_of_a_large_batch_is_estimated_from_some_of_its_tokens():
    scorer = random_scorer(tokens=1501)
    share = float((whole_of(scorer) > level_of_batch(scorer, 3 * 1501)).double().mean()) * LATENTS
    assert share == pytest.approx(3, rel=0.3)


# By latent.


@pytest.mark.parametrize("level", [None, 0.3])
def test_every_latent_keeps_its_largest_and_counts_what_is_above_the_level(kernels, width, level):
    scorer, room = random_scorer(), torch.randint(0, TOKENS + 5, (LATENTS,))
    room[:3] = torch.tensor([0, 1, TOKENS])
    found = largest_per_latent(scorer, room, level)
    whole, expected = whole_of(scorer), []
    for latent, column in enumerate(whole.T):
        best = column.topk(min(int(room[latent]), TOKENS))
        expected += [(token, latent) for token in best.indices.tolist()]
        assert float(found.smallest[latent]) == pytest.approx(float(best.values[-1]) if len(best.values) else float("inf"))
    assert entries_of(found.code) == sorted(expected)
    values_are_the_product_s(found.code, scorer)
    assert (found.above is None) if level is None else (found.above.tolist() == (whole > level).sum(0).tolist())


# Encoders.


@pytest.fixture
def trained(encoder_arguments):
    """Makes dictionaries that have seen a few batches, the same ones at every call."""

    def make(name: str, dtype=torch.float64) -> SAE:
        torch.manual_seed(4)
        sae = SAE(D, LATENTS, ENCODERS[name](**encoder_arguments[name])).to(dtype)
        with torch.no_grad():
            if sae.W_enc is not None:
                sae.W_enc.add_(0.1 * torch.randn(LATENTS, D))
                sae.b_enc.copy_(0.1 * torch.randn(LATENTS))
        for _ in range(4):
            sae.encode(torch.randn(TOKENS, D, dtype=dtype), torch.randn(TOKENS, D, dtype=dtype))
        return sae

    return make


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_tiles_change_no_code(trained, kernels, monkeypatch, name, mode):
    x, grad = torch.randn(TOKENS, D, dtype=torch.float64), torch.randn(TOKENS, D, dtype=torch.float64)
    whole = trained(name).train(mode == "train")
    expected, buffers = whole.encode(x, grad), whole.state_dict()
    # Some latents of all tokens, some of one token, all of some tokens.
    for whole_width, least, numbers in ((0, 7, 7 * TOKENS), (0, 5, 5), (LATENTS, 1, 3 * LATENTS)):
        monkeypatch.setattr(scores, "WHOLE_NUMBERS", whole_width * D)
        monkeypatch.setattr(scores, "LEAST_WIDTH", least)
        monkeypatch.setattr(scores, "TILE_NUMBERS_CPU", numbers)
        tiled = trained(name).train(mode == "train")
        code = tiled.encode(x, grad)
        torch.testing.assert_close(code.to_dense(LATENTS), expected.to_dense(LATENTS), rtol=1e-12, atol=1e-12)
        assert sorted(entries_of(code)) == sorted(entries_of(expected))
        for key, tensor in tiled.state_dict().items():
            torch.testing.assert_close(tensor, buffers[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_kernels_change_no_code(trained, without_kernels, name, mode):
    pytest.importorskip("numba")
    x, grad = torch.randn(TOKENS, D, dtype=torch.float64), torch.randn(TOKENS, D, dtype=torch.float64)
    expected = trained(name).train(mode == "train").encode(x, grad)
    without_kernels()
    code = trained(name).train(mode == "train").encode(x, grad)
    torch.testing.assert_close(code.to_dense(LATENTS), expected.to_dense(LATENTS), rtol=1e-12, atol=1e-12)
    assert sorted(entries_of(code)) == sorted(entries_of(expected))


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_low_precision_autocast_gives_codes_and_finite_gradients(trained, monkeypatch, name, tiles):
    sae = trained(name, torch.float32)
    if tiles:
        monkeypatch.setattr(scores, "LEAST_WIDTH", 7)
        monkeypatch.setattr(scores, "WHOLE_NUMBERS", 0)
        monkeypatch.setattr(scores, "TILE_NUMBERS_CPU", 1)
    x, grad = torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    exact = sae.eval()(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sae(x)
        sae.train()
        code = sae.encode(x, grad)
        loss = (sae.decode(code) - x).pow(2).sum() + sum(code.requests.penalties.values())
    assert (rounded - exact).pow(2).sum() < 0.05 * exact.pow(2).sum()
    loss.backward()
    assert (code.values > 0).any()
    for key, parameter in sae.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), key
    assert sae.W_dec.grad.any()


def test_under_autocast_the_product_is_in_its_precision(trained):
    sae = trained("topk", torch.float32)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            some = encoding.scorer(torch.randn(TOKENS, D), sae.weights)
        assert some.x.dtype == some.W.dtype == some.b.dtype == dtype
        assert next(some.tiles()).scores.dtype == dtype


def test_a_nan_among_a_token_s_gradient_is_seen_in_its_code(kernels, trained):
    grad = torch.randn(TOKENS, D, dtype=torch.float64)
    grad[5, 3] = torch.nan
    values = trained("gradient_topk").encode(torch.randn(TOKENS, D, dtype=torch.float64), grad).values.view(TOKENS, -1)
    assert values.isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_no_token_has_no_code(trained, kernels, width, name):
    code = trained(name).encode(torch.empty(0, D, dtype=torch.float64), torch.empty(0, D, dtype=torch.float64))
    assert (code.n_tokens, len(code.values)) == (0, 0)
