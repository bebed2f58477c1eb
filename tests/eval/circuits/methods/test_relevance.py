"""Relevance rules: values stay, gradients follow the rules, relevance is conserved, and the model is as it was."""

import pytest
import torch
from torch import nn

from sparsary.eval.circuits.known.toy import ToyConfig, ToyTransformer
from sparsary.eval.circuits.methods.attribution import AttributionPatching
from sparsary.eval.circuits.methods.relevance import RelevancePatching, relevance_rules
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace
from sparsary.eval.circuits.units.passes import Passes
from sparsary.training.activations.model import LanguageModel

FAMILIES = ("gpt2", "gpt_neox", "gpt_neox sequential", "llama", "qwen2")
ALL = {"normalisation": True, "activation": True, "gate": True, "attention": True}
NONE = dict.fromkeys(ALL, False)
EMBEDDINGS = {"gpt2": "transformer.wte:out", "gpt_neox": "gpt_neox.embed_in:out", "llama": "model.embed_tokens:out"}


@pytest.fixture(scope="module")
def toy_model():
    """A random toy transformer, of the kind that circuits are planted in, without biases."""
    config = ToyConfig(2, 2, 12, 6, 6, 41, 41, d_mlp=7, activation="gelu", norm="rms")
    torch.manual_seed(3)
    module = ToyTransformer(config).double()
    for name, parameter in module.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.5)
    return LanguageModel(module, None, "toy", None)


def gradient(model, pairs, hooks, rules=None):
    """The metric's gradient at some hooks, and what they saw."""
    return Passes(model).gradients(pairs.clean, hooks, pairs.measure, rules=rules)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_stay_what_they_are(tiny_model, random_pairs, family, dtype):
    model, token_ids = tiny_model(family, dtype), random_pairs().clean
    hooks = tuple(f"{name}:out" for name, module in model.module.named_modules() if isinstance(module, nn.Linear) and name)
    before, seen = Passes(model).see(token_ids, hooks)
    with relevance_rules(model, **ALL):
        after, other = Passes(model).see(token_ids, hooks)
    assert after.equal(before)
    assert all(other[hook].equal(seen[hook]) for hook in hooks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_it_was_also_if_a_pass_fails(tiny_model, random_pairs, family):
    model, pairs = tiny_model(family), random_pairs()
    hooks = (next(f"{n}:out" for n, m in model.module.named_modules() if isinstance(m, nn.Embedding)),)
    before = gradient(model, pairs, hooks)[1][hooks[0]]

    def fail():
        with relevance_rules(model, **ALL):
            assert not gradient(model, pairs, hooks)[1][hooks[0]].equal(before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gradient(model, pairs, hooks)[1][hooks[0]].equal(before)
    for module in model.module.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_relevance_is_conserved_where_there_are_no_biases(tiny_model, random_pairs):
    """Llama has none: what all embeddings contribute is then the metric, and is not without any one of the rules."""
    model, pairs, hook = tiny_model("llama"), random_pairs(), EMBEDDINGS["llama"]
    metric = pairs.measure(model.logits(pairs.clean))

    def relevance(**changes):
        seen, grads = gradient(model, pairs, (hook,), relevance_rules(model, **(ALL | changes)))
        return (seen[hook] * grads[hook]).sum((1, 2))

    torch.testing.assert_close(relevance(), metric, rtol=1e-9, atol=1e-9)
    for rule in ALL:
        assert ((relevance(**{rule: False}) - metric).abs() > 1e-3).all(), rule


def test_a_toy_transformer_keeps_its_values_and_conserves_relevance(toy_model, random_pairs):
    pairs = random_pairs()
    # What is learned of positions is part of the stream as well.
    hook, before = "h.0:in", toy_model.logits(pairs.clean)
    seen, grads = gradient(toy_model, pairs, (hook,), relevance_rules(toy_model, **ALL))
    with relevance_rules(toy_model, **ALL):
        assert toy_model.logits(pairs.clean).equal(before)
    torch.testing.assert_close((seen[hook] * grads[hook]).sum((1, 2)), pairs.measure(before), rtol=1e-9, atol=1e-9)
    _, plain = gradient(toy_model, pairs, (hook,))
    assert ((seen[hook] * plain[hook]).sum((1, 2)) - pairs.measure(before)).abs().amax() > 1e-3


def test_relevance_is_conserved_by_centred_norms_and_gelu(stream_model, random_pairs):
    model, pairs = stream_model(nn.GELU, lambda: nn.LayerNorm(12, bias=False), bias=False), random_pairs()
    metric = pairs.measure(model.logits(pairs.clean))
    seen, grads = gradient(model, pairs, ("wte:out",), relevance_rules(model))
    torch.testing.assert_close((seen["wte:out"] * grads["wte:out"]).sum((1, 2)), metric, rtol=1e-9, atol=1e-9)


def test_of_relu_the_identity_rule_is_the_gradient(stream_model, random_pairs):
    model, pairs = stream_model(nn.ReLU), random_pairs()
    parts = [Coordinates("embed", "wte:out", 12, 1), Coordinates("m0", "layers.0.down:out", 12, 12)]
    space = NodeSpace(model, parts)
    found = RelevancePatching().discover(space, pairs).per_pair
    torch.testing.assert_close(found, AttributionPatching().discover(space, pairs).per_pair, rtol=0, atol=0)
    # What the rule would do to it is nothing either.
    model = stream_model(nn.GELU)
    space = NodeSpace(model, parts)
    found, other = (method().discover(space, pairs).per_pair for method in (RelevancePatching, AttributionPatching))
    assert (found - other).abs().amax() > 1e-3


def test_an_activation_is_as_steep_as_the_line_from_zero(stream_model, random_pairs):
    model, pairs, hooks = stream_model(nn.SiLU), random_pairs(), ("layers.1.act:in", "layers.1.act:out")
    seen, grads = gradient(model, pairs, hooks, relevance_rules(model))
    expected = seen[hooks[1]] / seen[hooks[0]] * grads[hooks[1]]
    torch.testing.assert_close(grads[hooks[0]], expected)


def test_at_zero_an_activation_is_as_steep_as_it_is_there():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x):
            return self.act(x)

    module = Bare()
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    # The parameter is what a model must have to say where it is.
    with relevance_rules(LanguageModel(module, None, "bare", None)):
        module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.5), rtol=1e-5, atol=0)


def test_both_factors_of_a_gate_get_half_and_the_neuron_all(tiny_model, random_pairs):
    model, pairs = tiny_model("llama"), random_pairs()
    at = "model.layers.2.mlp"
    hooks = tuple(f"{at}.{name}" for name in ("act_fn:out", "up_proj:out", "down_proj:in"))
    seen, plain = gradient(model, pairs, hooks)
    _, halved = gradient(model, pairs, hooks, relevance_rules(model, **(NONE | {"gate": True})))
    for hook, other in zip(hooks[:2], hooks[1::-1], strict=True):
        torch.testing.assert_close(halved[hook], halved[hooks[2]] * seen[other] / 2)
    torch.testing.assert_close(halved[hooks[2]], plain[hooks[2]])


@pytest.mark.parametrize(
    ("family", "joint"),
    [
        ("llama", {"model.layers.2.self_attn.{}_proj:out": (slice(None),) * 3}),
        ("gpt2", {"transformer.h.2.attn.c_attn:out": (slice(0, 12), slice(12, 24), slice(24, 36))}),
        ("gpt_neox", {"gpt_neox.layers.2.attention.query_key_value:out": (slice(0, 6), slice(6, 12), slice(12, 18))}),
    ],
)
def test_nothing_flows_into_queries_and_keys(tiny_model, random_pairs, family, joint):
    """Also for those who look at them there: the rule stands behind every hook."""
    model, pairs = tiny_model(family), random_pairs()
    ((path, columns),) = joint.items()
    for name, where in zip("qkv", columns, strict=True):
        hook = path.format(name)
        _, plain = gradient(model, pairs, (hook,))
        _, ruled = gradient(model, pairs, (hook,), relevance_rules(model, **(NONE | {"attention": True})))
        heads = (plain[hook][..., where], ruled[hook][..., where])
        assert heads[0].abs().amax() > 1e-4
        assert heads[1].equal(heads[0] if name == "v" else torch.zeros_like(heads[0]))


def test_without_a_place_for_it_the_rule_for_attention_is_refused(stream_model):
    model = stream_model()
    model.module.config = type("Config", (), {"num_hidden_layers": 2})
    with (
        pytest.raises(ValueError, match="attention: queries and keys could not be located among no modules in block 0"),
        relevance_rules(model, attention=True),
    ):
        pass


def test_relevance_may_start_at_the_corrupted_prompt(tiny_model, random_pairs):
    model, pairs, hook = tiny_model("gpt2"), random_pairs(), "transformer.h.1.mlp:out"
    space = NodeSpace(model, [Coordinates("m1", hook, 12, 12)])
    found = RelevancePatching(at="corrupted").discover(space, pairs).per_pair
    passes = Passes(model)
    seen, grads = passes.gradients(pairs.corrupted, (hook,), pairs.measure, rules=relevance_rules(model))
    clean = model.activations(pairs.clean, (hook,))[hook]
    torch.testing.assert_close(found[:, 0], ((clean - seen[hook]) * grads[hook]).sum((1, 2)))
    with pytest.raises(ValueError, match="at: expected one of clean, corrupted, got 'both'"):
        RelevancePatching(at="both")
