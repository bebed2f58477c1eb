"""EdgeSpace: the model with edges replaced, and attributions to edges, against the same graph written out edge by edge."""

import pytest
import torch

from sparsary.eval.circuits.known import KNOWN, edge_names
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.edge_list import EdgeList
from sparsary.eval.circuits.units.edges import EdgeSpace

FAMILIES = ["gpt2", "gpt_neox", "gpt_neox sequential", "llama", "qwen2"]


@pytest.fixture(params=FAMILIES)
def space(request, tiny_model):
    return EdgeSpace(tiny_model(request.param))


def n_edges(n_layers, n_heads, parallel=False):
    edges, senders = 0, 1
    for _ in range(n_layers):
        edges += 3 * n_heads * senders + senders + (0 if parallel else n_heads)
        senders += n_heads + 1
    return edges + senders


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "edges", "senders"), [(12, 12, 32491, 157), (16, 32, 386713, 529), (6, 4, 1108, 31)]
)
def test_graphs_are_as_large_as_published(n_layers, n_heads, edges, senders):
    listed = EdgeList(n_layers, n_heads)
    assert len(listed) == edges == n_edges(n_layers, n_heads)
    assert listed.n_senders == len(listed.senders) == senders


def test_edges_of_a_model_are_listed_as_it_computes_them(space):
    parallel = space.model.id == "gpt_neox"
    heads = space.anatomy.n_heads
    assert space.size == len(space.names()) == len(set(space.names())) == n_edges(3, heads, parallel)
    assert ("a1.h0->m1" in space.names()) != parallel
    assert "a1.h0->a1.h1.q" not in space.names()
    assert {"embed->a0.h1.k", "m0->a1.h0.v", "a1.h1->logits"} <= set(space.names())


def test_known_circuits_number_their_edges_alike():
    for name in ("induction", "reverse"):
        known = KNOWN[name](n_pairs=2)
        assert EdgeSpace(known.model).names() == edge_names(known.config)


def test_every_edge_is_in_the_group_of_its_receiver(space):
    edges = space.edges
    for unit, name in enumerate(space.names()):
        sender, receiver = name.split("->")
        assert edges.senders[edges.sources[unit]] == sender
        assert edges.receivers[edges.targets[unit]] == receiver
        assert edges.groups[receiver].start <= unit < edges.groups[receiver].stop
        assert [*edges.senders, "logits"][edges.owners[edges.targets[unit]]] == receiver.rsplit(".", receiver.count(".") - 1)[0]


@pytest.mark.parametrize("rows", [False, True])
def test_with_all_edges_the_model_is_itself_to_the_last_bit(space, some_pairs, rows):
    pairs = some_pairs()
    kept = torch.ones((3, space.size) if rows else space.size, dtype=torch.bool)
    filler_state = space.see(pairs.corrupted)[1]
    assert torch.equal(space.run(pairs.clean, kept, filler_state), space.anatomy.model.run(pairs.clean))


def test_without_edges_it_is_the_corrupted_run(space, some_pairs):
    pairs = some_pairs()
    logits, state = space.see(pairs.corrupted)
    assert (logits - space.passes.run(pairs.clean)).abs().max() > 0.1
    close(space.run(pairs.clean, torch.zeros(space.size, dtype=torch.bool), state), logits)


@pytest.mark.parametrize("soft", [False, True])
def test_circuits_are_the_graph_with_edges_replaced_one_by_one(space, some_pairs, graph, soft):
    pairs, model = some_pairs(), space.anatomy.model
    kept = torch.rand(3, space.size)
    kept = kept if soft else kept > 0.4
    other, _ = graph(model, pairs.corrupted, lambda _, sent: sum(sent.values()))
    place = {name: index for index, name in enumerate(space.names())}

    def receive(receiver, sent):
        shares = {sender: kept[:, place[f"{sender}->{receiver}"], None, None].double() for sender in sent}
        return sum(shares[sender] * x + (1 - shares[sender]) * other[sender] for sender, x in sent.items())

    _, expected = graph(model, pairs.clean, receive)
    found = space.run(pairs.clean, kept, space.see(pairs.corrupted)[1])
    close(found, expected)
    assert (found - model.run(pairs.clean)).abs().max() > 0.1


def test_one_circuit_for_all_pairs_is_the_same_in_every_row(space, some_pairs):
    pairs, kept = some_pairs(), torch.rand(space.size) > 0.5
    state = space.see(pairs.corrupted)[1]
    close(space.run(pairs.clean, kept, state), space.run(pairs.clean, kept.expand(3, -1), state))


def test_gradients_flow_to_shares_of_edges(space, some_pairs):
    pairs, state = some_pairs(), None
    state = space.see(pairs.corrupted)[1]
    kept = torch.rand(space.size, dtype=torch.float64).requires_grad_()
    direction = torch.randn(space.size, dtype=torch.float64)

    def metric(shares):
        return pairs.measure(space.run(pairs.clean, shares, state)).sum()

    [grad] = torch.autograd.grad(metric(kept), kept)
    with torch.no_grad():
        step = 1e-6 * direction
        slope = (metric(kept + step) - metric(kept - step)) / 2e-6
    close(grad @ direction, slope, 1e-6)


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_a_filler_may_have_one_row_for_all(space, some_pairs, graph, kind):
    pairs = some_pairs()
    state = ablation_values(space, kind, pairs)(pairs)
    expected = torch.zeros(space.size) if kind == "zero" else None
    found = space.run(pairs.clean, torch.zeros(space.size), state)
    written, _ = graph(space.anatomy.model, pairs.corrupted, lambda _, sent: sum(sent.values()))

    def receive(_, sent):
        values = {sender: written[sender].mean(0, keepdim=True).expand_as(x) for sender, x in sent.items()}
        return sum(values.values()) * (0.0 if expected is not None else 1.0)

    close(found, graph(space.anatomy.model, pairs.clean, receive)[1])


def brute_force(graph, model, pairs, names):
    """Edge attribution patching with one leaf for the input of every receiver."""
    other, _ = graph(model, pairs.corrupted, lambda _, sent: sum(sent.values()))
    inputs = {}

    def receive(receiver, sent):
        inputs[receiver] = sum(sent.values()).requires_grad_()
        inputs[receiver].retain_grad()
        return inputs[receiver]

    for parameter in model.module.parameters():
        parameter.requires_grad_(True)
    clean, logits = graph(model, pairs.clean, receive)
    pairs.measure(logits).sum().backward()
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    contributions = [(clean[s] - other[s]).detach() * inputs[r].grad for s, r in map(ends, names)]
    return torch.stack([products.sum((1, 2)) for products in contributions], dim=1)


def test_edge_attribution_is_difference_by_gradient_edge_by_edge(space, some_pairs, graph):
    pairs = some_pairs()
    found = METHODS["attribution"]().discover(space, pairs)
    expected = brute_force(graph, space.anatomy.model, pairs, space.names())
    close(found.per_pair, expected, 1e-8)
    close(found.values, expected.mean(0), 1e-8)
    assert found.values.abs().max() > 0.01


def test_edge_attribution_takes_two_forward_passes_and_one_backward(space, some_pairs, monkeypatch):
    pairs, counts = some_pairs(), {"forward": 0, "backward": 0}
    backward = torch.Tensor.backward

    def counted(*args, **kwargs):
        counts["backward"] += 1
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    handle = space.model.module.register_forward_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
    cost = METHODS["attribution"]().discover(space, pairs).cost
    handle.remove()
    assert (counts["forward"], counts["backward"]) == (cost.forwards, cost.backwards) == (2, 1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_relevance_of_edges_is_attribution_in_a_model_whose_norms_divide_by_constants(
    some_pairs, graph, tiny_model, monkeypatch, family
):
    model, pairs = tiny_model(family), some_pairs()
    space = EdgeSpace(model)
    found = METHODS["relevance"](activation=False, gate=False).discover(space, pairs)
    for name in ("LayerNorm", "RMSNorm"):
        monkeypatch.setattr(getattr(torch.nn, name), "forward", frozen_norm)
    close(found.per_pair, brute_force(graph, model, pairs, space.names()), 1e-8)
    monkeypatch.undo()
    assert (found.values - METHODS["attribution"]().discover(space, pairs).values).abs().max() > 1e-3


def frozen_norm(norm, x):
    bias = getattr(norm, "bias", None)
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    return x / (x.detach().pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + (0.0 if bias is None else bias)


def test_distances_of_edges_are_those_of_what_senders_write(some_pairs, tiny_model, graph):
    model, pairs = tiny_model("llama"), some_pairs()
    space = EdgeSpace(model)
    (clean, _), (other, _) = (graph(model, ids, lambda _, sent: sum(sent.values())) for ids in (pairs.clean, pairs.corrupted))
    expected = [(clean[sender] - other[sender]).pow(2).sum((1, 2)).sqrt() for sender, _ in map(ends, space.names())]
    close(space.distance(space.see(pairs.clean)[1], space.see(pairs.corrupted)[1]), torch.stack(expected, 1))


def ends(name):
    return name.split("->")


def test_a_model_without_mlps_and_norms_has_edges_too():
    known = KNOWN["induction"]()
    space, pairs = EdgeSpace(known.model), known.pairs
    logits, state = space.see(pairs.corrupted)
    assert torch.equal(space.run(pairs.clean, torch.ones(space.size), state), known.model.run(pairs.clean))
    torch.testing.assert_close(space.run(pairs.clean, torch.zeros(space.size), state), logits)
    circuit = known.edge_labels("resample", space.names())
    torch.testing.assert_close(space.run(pairs.clean, circuit, state), known.model.run(pairs.clean))


def test_the_model_given_keeps_its_grouped_heads(tiny_model):
    model = tiny_model("llama")
    before = model.module.model.layers[0].self_attn
    space = EdgeSpace(model)
    assert space.model.module is not model.module
    assert before.num_key_value_groups == 2
    assert type(before.k_proj) is torch.nn.Linear
    ours = dict(space.model.module.named_parameters()).values()
    assert {weight.data_ptr() for weight in ours} == {weight.data_ptr() for weight in model.module.parameters()}
