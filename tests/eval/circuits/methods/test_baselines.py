"""Baselines: the same scores for the same seed; magnitudes are norms."""

import pytest
import torch

from sparsary.eval.circuits.methods.baselines import ActivationMagnitude, RandomScores
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace

HOOK = "transformer.h.1.mlp:out"


@pytest.fixture
def space(tiny_model):
    return NodeSpace(tiny_model("gpt2"), [Coordinates("m1", HOOK, 12, 4)])


def test_random_scores_are_those_of_their_seed(space, random_pairs):
    first, again, other = (RandomScores(seed).discover(space, random_pairs()).values for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    assert first.shape == (3,)


@pytest.mark.parametrize("of", ["difference", "clean"])
def test_magnitudes_are_norms(space, random_pairs, of):
    pairs = random_pairs()
    clean, corrupted = (space.model.activations(ids, (HOOK,))[HOOK] for ids in (pairs.clean, pairs.corrupted))
    x = clean - corrupted if of == "difference" else clean
    found = ActivationMagnitude(of=of).discover(space, pairs)
    torch.testing.assert_close(found.per_pair, x.unflatten(-1, (3, 4)).norm(dim=(1, 3)))
    torch.testing.assert_close(found.values, found.per_pair.mean(0))


def test_there_is_no_other_magnitude():
    with pytest.raises(ValueError, match="of: expected one of difference, clean, got 'norm'"):
        ActivationMagnitude(of="norm")
