"""Attribution patching: difference by gradient, at either prompt, position by position or over all of them."""

import pytest
import torch

from sparsary.eval.circuits.methods.attribution import AttributionPatching
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace

HOOK = "transformer.h.1.mlp:out"


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("gpt2")


@pytest.mark.parametrize(("at", "sign"), [("clean", 1), ("corrupted", -1)])
def test_it_is_the_effect_of_a_small_step_towards_the_other_prompt(model, random_pairs, at, sign):
    pairs = random_pairs()
    here, there = (pairs.clean, pairs.corrupted)[::sign]
    start, end = (model.activations(ids, (HOOK,))[HOOK] for ids in (here, there))
    found = AttributionPatching(at=at).discover(NodeSpace(model, [Coordinates("m1", HOOK, 12, 4)]), pairs)
    for unit in range(3):
        step = torch.zeros_like(start)
        step[..., 4 * unit : 4 * unit + 4] = (end - start)[..., 4 * unit : 4 * unit + 4]

        def fall(share, step=step):
            with model.replacing(HOOK, lambda y: y + share * step):
                return pairs.measure(model.logits(here))

        # Of a step to the corrupted prompt the fall, of one to the clean prompt the rise.
        slope = sign * (fall(-1e-5) - fall(1e-5)) / 2e-5
        torch.testing.assert_close(found.per_pair[:, unit], slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.values, found.per_pair.mean(0))
    assert found.values.abs().amax() > 1e-3


def test_positions_add_up(model, random_pairs):
    part, pairs = Coordinates("m1", HOOK, 12, 4), random_pairs()
    together = AttributionPatching().discover(NodeSpace(model, [part]), pairs).per_pair
    apart = AttributionPatching(batch=2).discover(NodeSpace(model, [part], "each", 6), pairs).per_pair
    torch.testing.assert_close(apart.unflatten(1, (6, 3)).sum(1), together)


def test_the_prompt_must_be_one_of_the_pair():
    with pytest.raises(ValueError, match="at: expected one of clean, corrupted, got 'middle'"):
        AttributionPatching(at="middle")
