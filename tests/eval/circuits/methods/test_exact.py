"""Exact patching: the same as replacing a tensor by hand, and no pass is spent on what cannot matter."""

import pytest
import torch

from sparsary.eval.circuits.methods.exact import ExactPatching
from sparsary.eval.circuits.scoring.faithfulness import ranked
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace
from sparsary.training.activations.sites import site_hooks

EACH = {"positions": "each", "n_positions": 6}


def components(model, **options):
    """Two heads and the MLP of every block."""
    parts = []
    for layer in range(3):
        parts.append(Coordinates(f"a{layer}", site_hooks(model.module, layer, "attn_heads")[0], 12, 6))
        parts.append(Coordinates(f"m{layer}", site_hooks(model.module, layer, "mlp_out")[0], 12, 12))
    return NodeSpace(model, parts, **options)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def pairs(random_pairs):
    return random_pairs()


@pytest.mark.parametrize(("direction", "sign"), [("noising", 1), ("denoising", -1)])
def test_a_component_s_effect_is_that_of_replacing_its_tensor(model, pairs, direction, sign):
    ends = (pairs.clean, pairs.corrupted)[::sign]
    space = components(model)
    scores = ExactPatching(direction=direction).discover(space, pairs)
    whole = pairs.measure(model.logits(ends[0]))
    for layer in range(3):
        hook = site_hooks(model.module, layer, "mlp_out")[0]
        other = model.activations(ends[1], (hook,))[hook]
        with model.replacing(hook, lambda _, other=other: other):
            changed = pairs.measure(model.logits(ends[0]))
        unit = space.groups[f"m{layer}"].start
        torch.testing.assert_close(scores.per_pair[:, unit], sign * (whole - changed))
        assert scores.per_pair[:, unit].abs().min() > 1e-3


def test_of_both_directions_the_larger_effect_counts(model, pairs):
    space = components(model)
    one, other, both = (ExactPatching(direction=name).discover(space, pairs) for name in ("noising", "denoising", "both"))
    larger = torch.maximum(one.per_pair.abs(), other.per_pair.abs())
    torch.testing.assert_close(both.per_pair.abs(), larger)
    assert ((both.per_pair == one.per_pair) | (both.per_pair == other.per_pair)).all()
    # Each has the larger one somewhere.
    assert 0 < int((both.per_pair == one.per_pair).sum()) < both.per_pair.numel()


def test_a_head_at_a_position_is_its_own_slice(model, pairs):
    space, layer, at = components(model, **EACH), 1, 3
    scores = ExactPatching().discover(space, pairs)
    hook = site_hooks(model.module, layer, "attn_heads")[0]
    other = model.activations(pairs.corrupted, (hook,))[hook]

    def patch(z):
        z = z.clone()
        z[:, at, 6:] = other[:, at, 6:]
        return z

    with model.replacing(hook, patch):
        changed = pairs.measure(model.logits(pairs.clean))
    unit = space.names().index("a1/1@3")
    torch.testing.assert_close(scores.per_pair[:, unit], pairs.measure(model.logits(pairs.clean)) - changed)
    assert scores.per_pair[:, unit].abs().amax() > 1e-3


def test_units_that_carry_the_same_cost_nothing(model, pairs):
    space = components(model, **EACH)
    scores = ExactPatching(rows=7).discover(space, pairs)
    before = torch.tensor([name.endswith("@0") for name in space.names()])
    assert (scores.per_pair[:, before] == 0).all()
    # Nothing reads the last block at any but the last position.
    early = torch.tensor([name[:2] not in ("a2", "m2") for name in space.names()])
    assert (scores.per_pair[:, early & ~before] != 0).float().mean() > 0.9
    differing = len(pairs) * int((~before).sum())
    assert (scores.cost.forwards, scores.cost.backwards) == (2 + -(-differing // 7), 0)


def test_how_rows_are_batched_does_not_matter(model, pairs):
    space = components(model)
    a, b = ExactPatching(rows=3, batch=2).discover(space, pairs), ExactPatching(rows=1000).discover(space, pairs)
    torch.testing.assert_close(a.per_pair, b.per_pair)
    torch.testing.assert_close(a.values, a.per_pair.mean(0))


def test_some_units(model, pairs):
    space = components(model)
    everything = ExactPatching().discover(space, pairs)
    listed = ExactPatching(units=[4, 1]).discover(space, pairs)
    assert listed.measured.nonzero().flatten().tolist() == [1, 4]
    torch.testing.assert_close(listed.per_pair[:, [1, 4]], everything.per_pair[:, [1, 4]])
    drawn = [ExactPatching(units=4, seed=seed).discover(space, pairs).measured for seed in (0, 0, 1)]
    assert [int(some.sum()) for some in drawn] == [4, 4, 4]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    with pytest.raises(ValueError, match=r"ranking: expected a score for every unit, got 2 of 9\."):
        ranked(listed)


def test_what_cannot_be_asked(model, pairs):
    with pytest.raises(ValueError, match="direction: expected one of noising, denoising, both, got 'up'"):
        ExactPatching(direction="up")
    with pytest.raises(ValueError, match="units: expected numbers from 0 to 8, got"):
        ExactPatching(units=[9]).discover(components(model), pairs)
