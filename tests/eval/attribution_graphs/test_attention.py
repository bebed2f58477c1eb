"""Attention in graphs: parts of edges by head add up to them, terms of scores to the scores, and interventions agree."""

import pytest
import torch

from sparsary.eval.attribution_graphs.attention import graph_attention
from sparsary.eval.attribution_graphs.attention_scores import attention_scores, source_node
from sparsary.eval.attribution_graphs.edge_heads import edge_heads
from sparsary.eval.attribution_graphs.graph import graph_of
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.perturbed_runs import Measured
from sparsary.eval.attribution_graphs.replacement_model import Replacement
from sparsary.eval.circuits.known import KNOWN
from sparsary.sae import ENCODERS
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.attention_scores import attention_rule
from sparsary.transcoders.transcoder import Transcoder

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3")
POSITIONS = 6


@pytest.fixture(params=FAMILIES)
def local(request, tiny_model, random_transcoders):
    return built(request.param, tiny_model, random_transcoders)


def built(family, tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model(family), post_norms=True)
    token_ids = torch.randint(3, 41, (POSITIONS,), generator=torch.Generator().manual_seed(9))
    return LocalReplacement(Replacement(anatomy, random_transcoders(anatomy.d_model)), token_ids, 1)


def read_nodes(graph):
    return torch.cat([torch.arange(len(graph.active)), torch.arange(graph.logits.start, graph.n_nodes)])


def test_scores_make_the_patterns_of_the_model(local):
    """Rotations, scaling, soft caps and norms of queries and keys are the model's; windows hide what lies further back."""
    for layer, at in enumerate(local.trace.layers):
        rule = attention_rule(local.anatomy, local.trace, layer)
        for head in range(local.anatomy.n_heads):
            weights = at.pattern[0, head]
            seen = weights > 0
            scores = torch.stack([rule.scores(head, query) for query in range(POSITIONS)])
            expected = rule.capped(scores).masked_fill(~seen, -torch.inf).softmax(-1)
            torch.testing.assert_close(expected, weights, rtol=0, atol=1e-6)
    assert rule.cap == (3.0 if local.anatomy.model.id == "gemma2" else None)


PLACES = [(2, 1, 5, 4), (1, 0, 4, 4), (0, 1, 3, 2), (1, 1, 5, 1)]


def test_terms_add_up_to_the_score(local):
    for score in attention_scores(local, PLACES):
        layer, head, query, key = score.place
        rule = attention_rule(local.anatomy, local.trace, layer)
        assert score.score == pytest.approx(float(rule.scores(head, query)[key]), abs=1e-9)
        terms = score.terms()
        assert float(terms.sum()) == pytest.approx(score.score, abs=1e-9)
        torch.testing.assert_close(score.by_query(), terms.sum(1), rtol=0, atol=1e-9)
        torch.testing.assert_close(score.by_key(), terms.sum(0), rtol=0, atol=1e-9)
        assert score.weight == float(local.trace.layers[layer].pattern[0, head, query, key])
        # Sources of a side are not after it.
        nodes = [source_node(local, number) for number in range(len(terms) - 1)]
        late = torch.tensor([node.position > query for node in nodes] + [False])
        assert not terms[late].any()
        # In small pieces or at once, the same largest terms.
        best = score.largest(5)
        assert [(term.query, term.key) for term in score.largest(5, max_numbers=3 * len(terms))] == [term[:2] for term in best]
        assert abs(best[0].value) == float(terms.abs().max())
    # In the first layer, tokens alone make the scores.
    first = attention_scores(local, [(0, 0, 4, 3)])[0].largest(3)
    kinds = {source_node(local, number).kind for term in first for number in term[:2] if number is not None}
    assert kinds == {"token"}


def test_small_pieces_give_the_same_scores(local):
    whole, pieces = attention_scores(local, PLACES), attention_scores(local, PLACES, max_numbers=2000)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.terms(), other.terms(), rtol=1e-9, atol=1e-12)


def test_scores_change_as_their_terms_say_if_a_latent_changes_in_the_model(local):
    graph, (layer, head, query, key) = graph_of(local), (2, 1, 5, 4)
    [score] = attention_scores(local, [(layer, head, query, key)])
    rule = attention_rule(local.anatomy, local.trace, layer)
    measured = Measured(local, graph, hold_mlps=True, hold_patterns=True, hold_norms=True)
    lower = torch.nonzero((graph.active.layers < layer) & (graph.active.positions >= 3))[:, 0]
    chosen = lower[score.by_query()[lower].abs().add(score.by_key()[lower].abs()).topk(5).indices]
    measured.changes(chosen, 0.3)
    norm = local.anatomy.layers[layer].attention_norm
    x = norm.apply(measured._pre[layer], local.trace.layers[layer].attention_scale)
    sides = [
        x[:, position] @ reader.matrix.T + reader.constant
        for reader, position in ((rule.reader("q", head, query), query), (rule.reader("k", head, key), key))
    ]
    found = rule.scaling * (sides[0] * sides[1]).sum(1)
    q = score.query_parts.sum(1, keepdim=True) - 0.7 * score.query_parts[:, chosen]
    k = score.key_parts.sum(1, keepdim=True) - 0.7 * score.key_parts[:, chosen]
    predicted = rule.scaling * (q * k).sum(0)
    torch.testing.assert_close(found, predicted, rtol=1e-8, atol=1e-9)
    assert float((found - score.score).abs().min()) > 1e-6


def test_parts_by_head_add_up_to_the_edges(local):
    graph = graph_of(local)
    targets, sources = read_nodes(graph), torch.arange(graph.logits.start)
    found = edge_heads(local, graph, targets, sources, count=10**6, max_numbers=5000)
    edges = graph.adjacency[targets][:, sources]
    torch.testing.assert_close(found.direct + found.weights.sum(2), edges, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.magnitudes, found.direct.abs() + found.weights.abs().sum(2), rtol=1e-9, atol=1e-9)
    # What comes from another position passes a head.
    apart = [[graph.node(t).position != graph.node(s).position for s in sources.tolist()] for t in targets.tolist()]
    assert not found.direct[torch.tensor(apart)].any()
    assert float(found.weights.abs().max()) > 1e-3
    largest = edge_heads(local, graph, targets, sources, count=2)
    torch.testing.assert_close(largest.weights.abs(), found.weights.abs()[..., :2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_an_edge_loses_what_a_head_carries_if_it_no_longer_attends(family, tiny_model, random_transcoders):
    """From layer 0 to layer 1 a path has one head: without its weight there, the edge is smaller by the head's part."""
    local = built(family, tiny_model, random_transcoders)
    graph = graph_of(local)
    targets = torch.nonzero((graph.active.layers == 1) & (graph.active.positions == 4))[:, 0]
    sources = torch.nonzero((graph.active.layers == 0) & (graph.active.positions == 2))[:, 0]
    found = edge_heads(local, graph, targets, sources, count=local.anatomy.n_heads)
    assert [part.key for part in found.parts(0, 0)] == [2] * local.anatomy.n_heads
    head = found.parts(0, 0)[0].head
    local.trace.layers[1].pattern[0, head, 4, 2] = 0.0
    lost = graph.adjacency[targets][:, sources] - graph_of(local).adjacency[targets][:, sources]
    parts = [
        [next(p.weight for p in found.parts(t, s) if p.head == head) for s in range(len(sources))] for t in range(len(targets))
    ]
    torch.testing.assert_close(lost, torch.tensor(parts, dtype=lost.dtype), rtol=1e-9, atol=1e-9)
    assert float(lost.abs().max()) > 1e-3


def test_the_head_that_a_program_looks_up_with_is_explained_by_the_lookup():
    """To reverse a list, head 1 of layer 2 asks for the position that the MLP of layer 1 has found."""
    known = KNOWN["reverse"]()
    known.module.double()
    transcoders = {}
    for layer in range(known.config.n_layers):
        mlp, width = known.module.mlp(layer), known.config.d_model
        transcoders[layer] = Transcoder(width, width, known.config.d_mlp, ENCODERS["relu"]()).double()
        with torch.no_grad():
            transcoders[layer].W_enc.copy_(mlp.up_proj.weight)
            transcoders[layer].b_enc.copy_(mlp.up_proj.bias)
            transcoders[layer].W_dec.copy_(mlp.down_proj.weight.T)
            transcoders[layer].b_dec.copy_(mlp.down_proj.bias)
        transcoders[layer].requires_grad_(False).eval()
    local = LocalReplacement(Replacement(Architecture(known.model), transcoders), known.pairs.clean[0], 0)
    length = len(local.token_ids) - 1
    graph = graph_of(local)
    for query in range(1, length + 1):
        key = length + 1 - query
        [score] = attention_scores(local, [(2, 1, query, key)])
        assert score.weight > 0.99
        [best] = score.largest(1)
        asks, asked = source_node(local, best.query), source_node(local, best.key)
        assert (asks.kind, asks.layer, asks.position) == ("latent", 1, query)
        assert (asked.kind, asked.position) == ("token", key)
        assert best.value == pytest.approx(score.score, rel=1e-6)
    # And it carries what the logit of the last position is made of.
    found = graph_attention(local, graph, graph.prune(1.0, 1.0), n_scores=1)
    assert found.scores[0].place[:2] == (2, 1)


def test_a_graph_s_attention_is_that_of_its_strongest_edges(local):
    graph = graph_of(local)
    pruned = graph.prune()
    found = graph_attention(local, graph, pruned, heads_per_edge=2, n_scores=4, n_terms=3)
    assert set(found.edges) == {tuple(pair) for pair in pruned.edges.nonzero().tolist()}
    shares = [score.influence for score in found.scores]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    for score in found.scores:
        assert sum(value for *_, value in score.terms) + score.rest == pytest.approx(score.score, abs=1e-9)
        assert 1 <= len(score.terms) <= 3


def test_places_and_nodes_that_do_not_exist_are_refused(tiny_model, random_transcoders):
    local = built("gemma2", tiny_model, random_transcoders)
    graph = graph_of(local)
    with pytest.raises(ValueError, match=r"places: layer: expected 0 to 2, got 3"):
        attention_scores(local, [(3, 0, 1, 1)])
    with pytest.raises(ValueError, match=r"places: key: expected 0 to 5, got 6"):
        attention_scores(local, [(0, 0, 1, 6)])
    # Outside the window of three, and in the future.
    for key in (1, 5):
        with pytest.raises(
            ValueError, match=rf"head 0 of layer 0 sees from position 4, got {key}, whose attention weight is z"
        ):
            attention_scores(local, [(0, 0, 4, key)])
    some = torch.arange(2)
    with pytest.raises(ValueError, match="targets: expected ascending numbers of latents and logits"):
        edge_heads(local, graph, torch.tensor([graph.errors.start]), some)
    with pytest.raises(ValueError, match="sources: expected numbers of latents, errors and tokens"):
        edge_heads(local, graph, some, torch.tensor([graph.logits.start]))
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        edge_heads(local, graph, some, some, count=0)


def test_weights_that_are_no_softmax_are_refused(tiny_model, random_transcoders):
    local = built("llama", tiny_model, random_transcoders)
    local.trace.layers[1].pattern[0, 2, 4] *= 0.5
    with pytest.raises(
        ValueError, match=r"llama: expected attention weights that are a softmax .* layer 1, head 2 at position 4"
    ):
        attention_scores(local, [(1, 2, 4, 3)])
    attention_scores(local, [(1, 2, 5, 3)])
