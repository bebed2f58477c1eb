"""What all methods of nodes agree on: linear models, pairs without a difference, twins, and what they say they cost."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace

SLOPES = ("attribution", "integrated_activations", "integrated_inputs", "relevance")
EFFECTS = ("exact", *SLOPES)


def discover(name, space, pairs):
    """Scores of every pair; integrals of two steps, as one would not be any."""
    return METHODS[name](**({"steps": 2} if name.startswith("integrated") else {})).discover(space, pairs).per_pair


def neurons(model, twins=False, **options):
    """The neurons of both MLPs, and what each MLP writes."""
    parts = [Coordinates("embed", "wte:out", 12, 3)]
    for layer, width in ((0, 14 if twins else 7), (1, 7)):
        parts.append(Coordinates(f"n{layer}", f"layers.{layer}.act:out", width, 1))
        parts.append(Coordinates(f"m{layer}", f"layers.{layer}.down:out", 12, 12))
    return NodeSpace(model, parts, **options)


def groups_of_mlps(model, path):
    """Three units for each of three MLPs."""
    return NodeSpace(model, [Coordinates(f"m{layer}", path.format(layer), 12, 4) for layer in range(3)])


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("options", [{}, {"positions": "each", "n_positions": 6}], ids=["all", "each"])
def test_of_a_linear_model_every_slope_is_the_effect(stream_model, random_pairs, name, options):
    space, pairs = neurons(stream_model(), **options), random_pairs()
    exact, found = (discover(method, space, pairs) for method in ("exact", name))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    assert exact.abs().amax() > 0.1


@pytest.mark.parametrize("name", SLOPES)
def test_of_a_model_that_is_not_linear_no_slope_is_the_effect(stream_model, random_pairs, name):
    space, pairs = neurons(stream_model(nn.GELU, lambda: nn.LayerNorm(12))), random_pairs()
    exact, found = (discover(method, space, pairs) for method in ("exact", name))
    assert (found - exact).abs().amax() > 1e-3


@pytest.mark.parametrize("name", [*EFFECTS, "magnitude"])
def test_a_pair_of_equal_prompts_has_no_effects(tiny_model, random_pairs, name):
    model, pairs = tiny_model("gpt2"), random_pairs()
    space = groups_of_mlps(model, "transformer.h.{}.mlp:out")
    assert (discover(name, space, replace(pairs, corrupted=pairs.clean)) == 0).all()
    assert (discover(name, space, pairs) != 0).all()


@pytest.mark.parametrize("name", SLOPES)
def test_twins_share_what_one_neuron_had(stream_model, random_pairs, name):
    pairs = random_pairs()
    one, two = (neurons(stream_model(nn.GELU, lambda: nn.LayerNorm(12), twins=twins), twins) for twins in (False, True))
    whole, halves = (discover(name, space, pairs)[:, space.groups["n0"]] for space in (one, two))
    torch.testing.assert_close(halves, whole.repeat(1, 2) / 2)
    assert whole.abs().amax() > 0.01


@pytest.mark.parametrize("name", [*EFFECTS, "magnitude"])
def test_padding_does_not_change_a_pair_s_scores(tiny_model, random_pairs, name):
    model, lengths = tiny_model("llama"), [4, 6, 5]
    space = groups_of_mlps(model, "model.layers.{}.mlp:out")
    pairs = random_pairs(n=3, lengths=lengths)
    together = discover(name, space, pairs)
    for row, length in enumerate(lengths):
        one = replace(pairs.take([row]), clean=pairs.clean[[row], :length], corrupted=pairs.corrupted[[row], :length])
        torch.testing.assert_close(discover(name, space, one)[0], together[row])


@pytest.mark.parametrize(
    ("name", "options", "forwards", "backwards"),
    [
        ("attribution", {}, 2, 1),
        ("relevance", {}, 2, 1),
        ("relevance", {"at": "corrupted", "attention": True}, 2, 1),
        ("integrated_inputs", {"steps": 5}, 2 + 5, 5),
        # Three groups.
        ("integrated_activations", {"steps": 4}, 1 + 3 * 4, 3 * 4),
        ("magnitude", {}, 2, 0),
        ("magnitude", {"of": "clean"}, 1, 0),
        ("random", {}, 0, 0),
    ],
)
def test_what_a_batch_costs(tiny_model, random_pairs, name, options, forwards, backwards):
    model, pairs = tiny_model("gpt2"), random_pairs(n=5)
    space = groups_of_mlps(model, "transformer.h.{}.mlp:out")
    batch = {} if name == "random" else {"batch": 3}
    # What depends on what in a block is seen in one pass, once.
    METHODS[name](**batch, **options).discover(space, pairs)
    counts = {"forwards": 0, "backwards": 0}

    def count(which):
        return lambda *_: counts.update({which: counts[which] + 1})

    # The whole model's forward; the head's backward, through which every gradient of logits comes.
    handles = [
        model.module.register_forward_hook(count("forwards")),
        model.module.lm_head.register_full_backward_hook(count("backwards")),
    ]
    cost = METHODS[name](**batch, **options).discover(space, pairs).cost
    for handle in handles:
        handle.remove()
    assert (cost.forwards, cost.backwards) == (counts["forwards"], counts["backwards"]) == (2 * forwards, 2 * backwards)
    assert cost.seconds > 0
