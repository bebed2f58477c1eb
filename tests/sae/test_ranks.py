"""Selections and sums over ranks equal those of one process with the whole batch."""

import pytest
import torch

from sparsary.sae import SAE
from sparsary.sae.encoders import ENCODERS, build_encoder
from sparsary.sae.losses import auxk
from sparsary.sae.ranks import ALONE, largest_of_all, ordered_keys
from sparsary.sae.tiled_scores import Scorer, largest_of_batch, largest_per_latent, level_of_batch

TOKENS, D, LATENTS = 36, 11, 29
SIZES = (2, 3, 4)


@pytest.fixture
def on_ranks(load_beside):
    return load_beside("thread_ranks").on_ranks


def part(tensor, ranks):
    return tensor.chunk(ranks.size)[ranks.rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_are_in_the_order_of_the_numbers(dtype):
    values = torch.tensor([-torch.inf, -3.5, -1e-3, -0.0, 0.0, 1e-3, 2.0, torch.inf, torch.nan], dtype=dtype)
    keys = ordered_keys(values)
    assert keys[3] == keys[4]
    kept = keys[[0, 1, 2, 4, 5, 6, 7, 8]]
    assert torch.equal(kept, kept.sort().values)
    assert len(kept.unique()) == len(kept)
    assert ordered_keys(-values[-1:]) == keys[-1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "on one rank"])
def test_the_largest_of_all_ranks_are_those_of_the_whole(on_ranks, size, kind):
    values = torch.randn(TOKENS)
    if kind == "ties":
        values = values.round()
    if kind == "equal":
        values = torch.ones(TOKENS)
    if kind == "on one rank":
        values[: TOKENS // size] += 100
    for budget in (0, 1, 7, TOKENS - 1, TOKENS):
        found = torch.cat(on_ranks(size, lambda ranks, budget=budget: largest_of_all(part(values, ranks), budget, ranks)))
        expected = torch.zeros(TOKENS, dtype=torch.bool)
        expected[values.argsort(descending=True, stable=True)[:budget]] = True
        assert torch.equal(found, expected)
        assert torch.equal(largest_of_all(values, budget, ALONE), expected)


def test_ranks_may_hold_different_numbers_of_values(on_ranks):
    values = torch.randn(10)
    pieces = values.split([0, 7, 3])
    found = torch.cat(on_ranks(3, lambda ranks: largest_of_all(pieces[ranks.rank], 4, ranks)))
    assert set(values[found].tolist()) == set(values.topk(4).values.tolist())


@pytest.fixture
def scores():
    return Scorer(torch.randn(TOKENS, D), torch.randn(LATENTS, D), torch.randn(LATENTS))


def entries(code, first_token=0):
    return set(zip((code.token_ids() + first_token).tolist(), code.latents.tolist(), strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [None, 0.5, 100.0, -100.0])
def test_a_batch_keeps_the_same_pairs_on_any_number_of_ranks(on_ranks, scores, size, cut):
    def select(ranks):
        own = Scorer(part(scores.x, ranks), scores.W, scores.b, ranks=ranks)
        code, suggested = largest_of_batch(own, 50, cut)
        return entries(code, ranks.rank * len(own.x)), suggested, level_of_batch(own, 50)

    found = on_ranks(size, select)
    code, suggested = largest_of_batch(scores, 50, cut)
    assert set.union(*(pairs for pairs, _, _ in found)) == entries(code)
    assert sum(len(pairs) for pairs, _, _ in found) == 50
    # The guesses decide what every rank does next, so they must agree exactly.
    assert {guess for _, guess, _ in found} == {suggested}
    assert {level for _, _, level in found} == {level_of_batch(scores, 50)}


@pytest.mark.parametrize("size", SIZES)
def test_each_latent_keeps_the_same_tokens_on_any_number_of_ranks(on_ranks, scores, size):
    room = torch.randint(0, TOKENS + 5, (LATENTS,))
    room[0], room[1] = 0, TOKENS

    def select(ranks):
        own = Scorer(part(scores.x, ranks), scores.W, scores.b, ranks=ranks)
        found = largest_per_latent(own, room, 0.3)
        return entries(found.code, ranks.rank * len(own.x)), found.smallest, found.above

    expected = largest_per_latent(scores, room, 0.3)
    found = on_ranks(size, select)
    assert set.union(*(pairs for pairs, _, _ in found)) == entries(expected.code)
    for _, smallest, above in found:
        torch.testing.assert_close(smallest, expected.smallest)
        assert torch.equal(above, expected.above)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k_aux", [2, 40])
def test_auxk_of_the_ranks_is_that_of_the_batch(on_ranks, size, k_aux):
    sae = SAE(D, LATENTS, ENCODERS["topk"](3))
    x, error, dead = torch.randn(TOKENS, D), torch.randn(TOKENS, D) + 2, torch.rand(LATENTS) < 0.4
    whole = auxk(x, error, sae.weights, dead, k_aux)

    def loss(ranks):
        from dataclasses import replace

        return auxk(part(x, ranks), part(error, ranks), replace(sae.weights, ranks=ranks), dead, k_aux).detach()

    torch.testing.assert_close(torch.stack(on_ranks(size, loss)).mean(), whole.detach())


@pytest.mark.parametrize("size", [2, 3])
def test_codes_and_gradients_are_those_of_the_whole_batch(on_ranks, trained_spec, size):
    """Three training batches, so that running statistics, thresholds and penalty weights take part."""
    torch.manual_seed(5)
    start = SAE(D, LATENTS, build_encoder(trained_spec)).state_dict()
    batches = [(torch.randn(TOKENS, D), torch.randn(TOKENS, D)) for _ in range(3)]

    def run(ranks):
        sae = SAE(D, LATENTS, build_encoder(trained_spec))
        sae.load_state_dict(start)
        sae.ranks = ranks
        sae.train()
        sae.encoder.progress = 0.5
        for x, grad in batches:
            sae.zero_grad()
            x = part(x, ranks)
            code = sae.encode(x, part(grad, ranks))
            loss = (sae.decode(code, x) - x).pow(2).sum() / len(x)
            loss = (loss + sum(code.requests.penalties.values())) / ranks.size
            loss.backward()
        grads = {name: ranks.sum(p.grad) for name, p in sae.named_parameters() if p.grad is not None}
        return loss.detach() * ranks.size, grads, {name: t.clone() for name, t in sae.encoder.named_buffers()}

    ((loss, grads, buffers),) = on_ranks(1, run)
    found = on_ranks(size, run)
    torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(), loss)
    for _, own_grads, own_buffers in found:
        assert own_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(
                own_grads[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
        for name, values in buffers.items():
            torch.testing.assert_close(
                own_buffers[name], values, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
