"""Gemma 2 and 3: hooks before and after the norm that follows the MLP, soft caps, and transcoders as Gemma Scope has them."""

import copy

import pytest
import torch

from sparsary.eval.attribution_graphs.graph import build_graph, graph_of
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.replacement_model import Replacement, mlp_hooks
from sparsary.sae import ENCODERS
from sparsary.training.activations.architecture import Architecture
from sparsary.transcoders.stack import Stack
from sparsary.transcoders.transcoder import Transcoder

IDS = torch.randint(3, 41, (6,), generator=torch.Generator().manual_seed(9))


def block(layer):
    return f"model.layers.{layer}"


def hooks(layer, reads="mlp:in", writes="post_feedforward_layernorm:out"):
    return f"{block(layer)}.{reads}", f"{block(layer)}.{writes}"


def stacked(dictionaries, model, **places):
    members = {}
    for layer, dictionary in dictionaries.items():
        reads, writes = hooks(layer, **places)
        members[writes] = (dictionary, {"model": {"id": model}, "hooks_in": [reads], "hooks_out": [writes]})
    return Stack({hook: d for hook, (d, _) in members.items()}, {hook: p for hook, (_, p) in members.items()})


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_error_is_what_the_replaced_tensor_lacks(family, tiny_model, random_transcoders):
    """The hook that a transcoder writes decides whether its latents pass the norm after the MLP."""
    model = tiny_model(family)
    anatomy = Architecture(model, post_norms=True)
    dictionaries = random_transcoders(anatomy.d_model)
    seen = {}
    for writes in ("mlp:out", "post_feedforward_layernorm:out"):
        replacement = Replacement(anatomy, stacked(dictionaries, family, writes=writes))
        assert replacement.hooks(1) == hooks(1, writes=writes)
        local = seen[writes] = LocalReplacement(replacement, IDS, 1)
        hook = hooks(1, writes=writes)[1]
        y = model.activations(IDS[None], (hook,))[hook][0, 1:]
        y_hat = dictionaries[1].decode(local.codes[1], local.trace.layers[1].mlp_in[0])[1:]
        # Patterns are computed in single precision, in two ways.
        torch.testing.assert_close(local.errors[1, 1:], y - y_hat, rtol=1e-6, atol=1e-6)
        graph = graph_of(local)
        assert torch.allclose(graph.adjacency.sum(1) + graph.constants, graph.totals, atol=1e-9)
    # An edge from layer 0 to layer 1 at one position, along the stream alone: heads do not read layer 0 there.
    before, after = (graph_of(local).adjacency[-1] for local in seen.values())
    assert not torch.allclose(before[: len(seen["mlp:out"].active)], after[: len(seen["mlp:out"].active)], rtol=1e-2)


def test_logits_are_those_before_the_soft_cap(tiny_model, random_transcoders):
    model = tiny_model("gemma2")
    graph = build_graph(model, random_transcoders(12), IDS, answer=7, foil=30)
    capped = model.logits(IDS[None])[0, -1]
    assert float(capped.abs().max()) < 2.0
    logits = 2.0 * (capped / 2.0).atanh()
    assert float(graph.totals[-1]) == pytest.approx(float(logits[7] - logits[30]), abs=1e-8)
    assert graph.targets[0].probability == pytest.approx(float(capped.softmax(0)[7]))
    assert float(graph.totals[-1]) != pytest.approx(float(capped[7] - capped[30]), abs=1e-2)


def test_a_transcoder_that_normalizes_the_stream_itself_reads_the_mlp_s_input(tiny_model):
    """The first Gemma Scope reads the stream over its root mean square, without the gain of the model's norm."""
    anatomy = Architecture(tiny_model("gemma2"), post_norms=True)
    torch.manual_seed(3)
    own = Transcoder(12, 12, 19, ENCODERS["relu"](), row_norm="constant_norm").double()
    with torch.no_grad():
        for parameter in (*own.parameters(), own.in_centre):
            parameter.normal_()
    own.requires_grad_(False).eval()
    before = copy.deepcopy(own.state_dict())
    stack = stacked({1: own}, "gemma2", reads="pre_feedforward_layernorm:in")
    replacement = Replacement(anatomy, stack)
    local = LocalReplacement(replacement, IDS, 1)
    code = own.encode(local.trace.layers[1].mid[0])
    # The same up to the epsilon of the model's norm.
    torch.testing.assert_close(local.codes[1].to_dense(19), code.to_dense(19), rtol=1e-4, atol=1e-4)
    assert replacement.hooks(1) == hooks(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    graph = graph_of(local)
    assert torch.allclose(graph.adjacency.sum(1) + graph.constants, graph.totals, atol=1e-9)


def test_hooks_that_are_no_mlp_s_and_norms_that_are_not_linear_are_refused(tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model("gemma3"), post_norms=True)
    dictionaries = random_transcoders(12)
    read = {"hooks_in": ["model.layers.1.pre_feedforward_layernorm:out"], "hooks_out": [hooks(1)[1]]}
    assert mlp_hooks(anatomy, read) == {1: (read["hooks_in"][0], read["hooks_out"][0])}
    with pytest.raises(
        ValueError, match=r"goes from model\.layers\.1\.mlp:in to model\.layers\.2\.post_feedforward_layernorm:out"
    ):
        mlp_hooks(anatomy, {"hooks_in": [hooks(1)[0]], "hooks_out": [hooks(2)[1]]})
    with pytest.raises(
        ValueError, match=r"layer 1: expected row_norm null .* got null at model\.layers\.1\.pre_feedforward_la"
    ):
        Replacement(anatomy, stacked({1: dictionaries[1]}, "gemma3", reads="pre_feedforward_layernorm:in"))
    odd = Transcoder(12, 12, 19, ENCODERS["relu"](), row_norm="layer_norm").double().eval()
    with pytest.raises(ValueError, match=r"got layer_norm at model\.layers\.0\.pre_feed.*not linear in the MLP's input"):
        Replacement(anatomy, stacked({0: odd}, "gemma3", reads="pre_feedforward_layernorm:in"))
    skipping = Transcoder(12, 12, 19, ENCODERS["relu"](), skip=True, row_norm="constant_norm").double().eval()
    with pytest.raises(ValueError, match=r"layer 0: expected no skip path beside row_norm"):
        Replacement(anatomy, stacked({0: skipping}, "gemma3", reads="pre_feedforward_layernorm:in"))


def test_other_commands_say_that_they_do_not_take_post_norms(tiny_model, random_transcoders):
    from sparsary.eval.attribution_graphs.paths import Circuit

    with pytest.raises(ValueError, match=r"expected blocks that add the outputs .* got 'gemma2' \(gemma2\), which normalizes"):
        Circuit(Architecture(tiny_model("gemma2")), random_transcoders(12), IDS)
