"""What fills in for absent units: of a pair's own, means over real positions, nothing, or what serves best."""

import pytest
import torch

from sparsary.eval.circuits.units.ablation import ABLATIONS, ablation_values, divergence, mean_state, optimal_state
from sparsary.eval.circuits.units.nodes import Coordinates, Latents, NodeSpace
from sparsary.sae import ENCODERS, SAE

HOOKS = [f"transformer.h.{layer}.mlp:out" for layer in range(2)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def space(model):
    torch.manual_seed(2)
    sae = SAE(12, 17, ENCODERS["topk"](k=3)).double().requires_grad_(False).eval()
    return NodeSpace(model, [Coordinates("m0", HOOKS[0], 12, 3), Latents("m1", sae, HOOKS[1], HOOKS[1])])


def test_resample_is_the_pair_s_own_corrupted_run(space, random_pairs):
    pairs = random_pairs()
    some = pairs.take([3, 1])
    found = ablation_values(space, "resample", pairs)(some)
    expected = space.see(some.corrupted)[1]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert not found[0].equal(space.see(some.clean)[1][0])


def test_means_of_equal_prompts_are_by_position(space, random_pairs):
    pairs = random_pairs()
    expected = [tensor.mean(0, keepdim=True) for tensor in space.see(pairs.corrupted)[1]]
    for found in (mean_state(space, pairs), ablation_values(space, "mean", pairs)(pairs.take([0]))):
        assert [tensor.shape for tensor in found] == [(1, 6, 12), (1, 6, 17), (1, 6, 12)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_means_of_unequal_prompts_leave_out_padding(space, random_pairs, monkeypatch):
    lengths = [4, 6, 5]
    pairs = random_pairs(n=3, lengths=lengths)
    # Several batches, of unequal size.
    monkeypatch.setattr("sparsary.eval.circuits.units.ablation.BATCH", 2)
    found = mean_state(space, pairs)
    rows = [space.see(pairs.corrupted[[row], :length])[1] for row, length in enumerate(lengths)]
    for at, tensor in enumerate(found):
        assert tensor.shape[:2] == (1, 1)
        torch.testing.assert_close(tensor[0, 0], torch.cat([row[at][0] for row in rows]).mean(0))


def test_zero_is_nothing(space, random_pairs):
    pairs = random_pairs()
    state = ablation_values(space, "zero", pairs)(pairs)
    assert all((tensor == 0).all() for tensor in state)
    kept = torch.ones(space.size, dtype=torch.bool)
    kept[space.groups["m0"]] = False
    with space.model.replacing(HOOKS[0], torch.zeros_like):
        expected = space.model.logits(pairs.clean)
    torch.testing.assert_close(space.run(pairs.clean, kept, state), expected)


def test_optimal_constants_do_better_than_means(space, random_pairs):
    pairs = random_pairs(n=7)
    start = mean_state(space, pairs)
    found = optimal_state(space, pairs, start, steps=15)
    assert all(tensor.shape == mean.shape and not tensor.requires_grad for tensor, mean in zip(found, start, strict=True))
    none, clean = torch.zeros(space.size, dtype=torch.bool), space.model.logits(pairs.clean)
    with torch.no_grad():
        losses = [float(divergence(pairs, clean, space.run(pairs.clean, none, state)).mean()) for state in (found, start)]
    assert losses[0] < 0.95 * losses[1]


def test_optimal_constants_are_those_of_their_seed(space, random_pairs):
    pairs = random_pairs()
    start = mean_state(space, pairs)
    first, again, other = (optimal_state(space, pairs, start, seed, steps=2) for seed in (0, 0, 1))
    assert first[0].equal(again[0])
    assert not first[0].equal(other[0])


def test_divergence_is_in_nats_at_the_questions(random_pairs):
    pairs = random_pairs(n=2)
    clean = torch.zeros(2, 6, 41, dtype=torch.float64)
    changed = clean.clone()
    changed[0, 5, 7] = 2.0
    changed[1, 2, 7] = 2.0
    mass = 40 + torch.tensor(2.0, dtype=torch.float64).exp()
    # Of a uniform prediction: the mean of log(1/41) - log(share).
    expected = (mass / 41).log() - 2 / 41
    torch.testing.assert_close(divergence(pairs, clean, changed), torch.stack([expected, torch.zeros_like(expected)]))


def test_there_is_no_other_ablation(space, random_pairs):
    assert ABLATIONS == ("resample", "mean", "zero", "optimal")
    with pytest.raises(ValueError, match="ablation: expected one of resample, mean, zero, optimal, got 'noise'"):
        ablation_values(space, "noise", random_pairs())
