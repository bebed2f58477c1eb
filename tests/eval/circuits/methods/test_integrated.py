"""Integrated gradients: what they say of a group adds up, the better the more steps."""

import pytest
import torch

from sparsary.eval.circuits.methods.attribution import AttributionPatching
from sparsary.eval.circuits.methods.integrated import IntegratedActivations, IntegratedInputs
from sparsary.eval.circuits.units.nodes import Coordinates, Latents, NodeSpace
from sparsary.training.activations.sites import site_hooks


def mixture(model, random_transcoders):
    """Heads, a transcoder with its error, and neurons of the stream."""
    transcoder = random_transcoders(12)[1]
    heads, mlp = (site_hooks(model.module, layer, site) for layer, site in ((0, "attn_heads"), (1, "mlp")))
    parts = [
        Coordinates("heads", heads[0], 12, 6),
        Latents("latents", transcoder, *mlp),
        Coordinates("stream", site_hooks(model.module, 1, "resid_post")[0], 12, 1),
    ]
    return NodeSpace(model, parts)


@torch.no_grad()
def effect_of(space, pairs, group):
    """How much the metric falls if the whole group is taken from the corrupted run."""
    kept = torch.ones(space.size, dtype=torch.bool)
    kept[space.groups[group]] = False
    _, corrupted = space.see(pairs.corrupted)
    return pairs.measure(space.passes.run(pairs.clean)) - pairs.measure(space.run(pairs.clean, kept, corrupted))


@pytest.mark.parametrize(
    ("point", "order"),
    [("clean", 1), ("corrupted", 1), ("middle", 2)],
)
def test_the_contributions_of_a_group_add_up_to_its_effect(tiny_model, random_pairs, random_transcoders, point, order):
    space, pairs = mixture(tiny_model("gpt2"), random_transcoders), random_pairs(n=2)
    effects = {group: effect_of(space, pairs, group) for group in space.groups}
    missing = {}
    for steps in (8, 16):
        found = IntegratedActivations(steps=steps, point=point).discover(space, pairs).per_pair
        missing[steps] = {
            group: float((found[:, units].sum(1) - effects[group]).norm()) for group, units in space.groups.items()
        }
    for group, effect in effects.items():
        assert missing[16][group] < 0.2 * float(effect.norm())
        # Half as long steps: half the error of the ends, a quarter of that of the middle.
        assert missing[16][group] == pytest.approx(missing[8][group] / 2**order, rel=0.4, abs=1e-9)


def test_what_embeddings_contribute_adds_up_to_the_whole_difference(tiny_model, random_pairs):
    model, pairs = tiny_model("llama"), random_pairs()
    space = NodeSpace(model, [Coordinates("embedding", "model.embed_tokens:out", 12, 1)], "each", 6)
    whole = pairs.measure(model.logits(pairs.clean)) - pairs.measure(model.logits(pairs.corrupted))
    found = IntegratedInputs(steps=64, point="middle").discover(space, pairs).per_pair
    torch.testing.assert_close(found.sum(1), whole, rtol=0.01, atol=0.01)
    assert whole.abs().amax() > 0.5


def test_one_step_at_the_clean_end_is_attribution_patching(tiny_model, random_pairs, random_transcoders):
    space, pairs = mixture(tiny_model("gpt2"), random_transcoders), random_pairs()
    attribution = AttributionPatching().discover(space, pairs).per_pair
    for method in (IntegratedActivations, IntegratedInputs):
        found = method(steps=1, point="clean").discover(space, pairs).per_pair
        torch.testing.assert_close(found, attribution, rtol=1e-9, atol=1e-9)
    inputs = IntegratedInputs(steps=1, point="corrupted").discover(space, pairs).per_pair
    torch.testing.assert_close(inputs, AttributionPatching(at="corrupted").discover(space, pairs).per_pair)


@pytest.mark.parametrize("method", [IntegratedActivations, IntegratedInputs])
def test_what_cannot_be_asked(method):
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        method(steps=0)
    with pytest.raises(ValueError, match="point: expected one of clean, middle, corrupted, got 'left'"):
        method(point="left")
