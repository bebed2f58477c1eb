"""Information flow routes, against their formula position by position."""

from dataclasses import replace

import pytest
import torch

from sparsary.eval.circuits.known import KNOWN
from sparsary.eval.circuits.methods.flow import FlowRoutes
from sparsary.eval.circuits.units.edges import EdgeSpace
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_shares_are_how_much_closer_each_sender_comes(family, tiny_model, some_pairs, graph):
    model, pairs = tiny_model(family), some_pairs()
    space = EdgeSpace(model)
    inputs = {}

    def receive(receiver, sent):
        inputs[receiver] = (sum(sent.values()), list(sent))
        return inputs[receiver][0]

    sent, _ = graph(model, pairs.clean, receive)
    if family == "gpt2":
        # What attention adds whatever it reads is in the stream, but of no sender.
        bias = [block.attn.c_proj.bias for block in model.module.transformer.h]
    elif family == "gpt_neox":
        bias = [block.attention.dense.bias for block in model.module.gpt_neox.layers]
    else:
        bias = [torch.zeros(model.module.config.hidden_size)] * 3
    expected = []
    for receiver in space.edges.receivers:
        total, senders = inputs[receiver]
        layer = 3 if receiver == "logits" else int(receiver[1])
        seen = layer + (receiver.startswith("m") and family != "gpt_neox")
        total = total + sum(bias[:seen], torch.zeros_like(total))
        closer = torch.stack([total.abs().sum(-1) - (total - sent[name]).abs().sum(-1) for name in senders], -1).clamp_min(0)
        share = closer / closer.sum(-1, keepdim=True)
        expected.append(share.nan_to_num().mean(1))
    scores = FlowRoutes().discover(space, pairs)
    torch.testing.assert_close(scores.per_pair, torch.cat(expected, 1), rtol=1e-8, atol=1e-8)
    assert (scores.cost.forwards, scores.cost.backwards) == (1, 0)


def test_shares_of_a_receiver_add_up_to_1():
    known = KNOWN["reverse"]()
    space = EdgeSpace(known.model)
    scores = FlowRoutes(batch=5).discover(space, known.pairs)
    sums = torch.stack([scores.values[group].sum() for group in space.groups.values()])
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_padding_does_not_count(tiny_model, some_pairs):
    space, pairs = EdgeSpace(tiny_model("gpt2")), some_pairs(length=5)
    short = replace(
        pairs, lengths=torch.tensor([5, 3, 4]), questions=tuple((q[0]._replace(position=2),) for q in pairs.questions)
    )
    other = replace(short, clean=torch.where(short.valid, short.clean, 7))
    assert not torch.equal(short.clean, other.clean)
    one, same = (FlowRoutes().discover(space, some).per_pair for some in (short, other))
    torch.testing.assert_close(one, same)


def test_nodes_are_refused(tiny_model):
    model = tiny_model("gpt2")
    nodes = NodeSpace(model, [Coordinates("m0", "transformer.h.0.mlp:out", 12, 12)])
    with pytest.raises(ValueError, match=r"flow: expected edges, got a NodeSpace\. Use an EdgeSpace"):
        FlowRoutes().discover(nodes, KNOWN["and_gate"]().pairs)
