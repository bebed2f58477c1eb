"""Passes: what is seen is what the model has, gradients are finite differences, and every pass is counted."""

import torch

from sparsary.eval.circuits.units.passes import Passes

HOOKS = ("transformer.h.0:out", "transformer.h.1.mlp:out", "transformer.h.2.attn.c_proj:in")


def test_what_is_seen_is_what_the_model_has(model, pairs):
    logits, seen = Passes(model).see(pairs.clean, HOOKS)
    assert logits.equal(model.logits(pairs.clean))
    expected = model.activations(pairs.clean, HOOKS)
    assert all(seen[hook].equal(expected[hook]) for hook in HOOKS)


def test_what_is_seen_is_a_copy(stream_model, pairs):
    """A ReLU in place writes into what the hook before it was shown."""
    model = stream_model(lambda: torch.nn.ReLU(inplace=True))
    _, seen = Passes(model).see(pairs.clean, ("layers.0.act:in",))
    assert (seen["layers.0.act:in"] < 0).any()


def test_gradients_are_finite_differences(model, pairs):
    seen, grads = Passes(model).gradients(pairs.clean, HOOKS, pairs.measure)
    for hook in HOOKS:
        direction = torch.randn_like(seen[hook])

        def moved(by, hook=hook, direction=direction):
            with model.replacing(hook, lambda x: x + by * direction):
                return pairs.measure(model.logits(pairs.clean))

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        torch.testing.assert_close((grads[hook] * direction).sum((1, 2)), slope, rtol=1e-6, atol=1e-8)
        assert seen[hook].equal(model.activations(pairs.clean, (hook,))[hook])


def test_a_pair_s_gradient_does_not_depend_on_its_batch_mates(model, pairs):
    _, together = Passes(model).gradients(pairs.clean, HOOKS, pairs.measure)
    one = pairs.take([1])
    _, alone = Passes(model).gradients(one.clean, HOOKS, one.measure)
    for hook in HOOKS:
        torch.testing.assert_close(alone[hook][0], together[hook][1])


def test_what_is_held_takes_the_place_of_what_the_model_has(model, pairs):
    first, second = HOOKS[:2]
    other = model.activations(pairs.corrupted, (second,))[second]
    seen, grads = Passes(model).gradients(pairs.clean, HOOKS, pairs.measure, held={second: other})
    assert seen[second].equal(other)
    with model.replacing(second, lambda _: other):
        behind = model.activations(pairs.clean, HOOKS[2:])[HOOKS[2]]
    assert seen[HOOKS[2]].equal(behind)
    # The stream before it still has its way around the MLP.
    assert (grads[first] != 0).any()


def test_where_nothing_depends_on_a_hook_the_gradient_is_zero(model, pairs):
    _, grads = Passes(model).gradients(pairs.clean, HOOKS, lambda logits: logits.new_zeros(3, requires_grad=True) * 1)
    assert all((grads[hook] == 0).all() for hook in HOOKS)


def test_the_model_keeps_no_gradients(model, pairs):
    Passes(model).gradients(pairs.clean, HOOKS, pairs.measure)
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_passes_are_counted(model, pairs):
    passes = Passes(model)
    passes.see(pairs.clean, HOOKS)
    with passes.counted() as cost:
        passes.run(pairs.clean)
        passes.see(pairs.clean, ())
        passes.gradients(pairs.clean, HOOKS, pairs.measure)
    assert (cost.forwards, cost.backwards) == (3, 1)
    assert cost.seconds > 0
    assert (passes.forwards, passes.backwards) == (4, 1)
