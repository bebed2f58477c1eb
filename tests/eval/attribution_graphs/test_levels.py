"""Levels of a graph: nested clusters of latents, and a circuit searched along them that is the one found without them."""

import math
from dataclasses import replace

import pytest
import torch

from sparsary.eval.attribution_graphs.ablated_runs import AblatedRuns
from sparsary.eval.attribution_graphs.graph import AttributionGraph, Target, graph_of
from sparsary.eval.attribution_graphs.interventions import intervene
from sparsary.eval.attribution_graphs.levels import bisections, cluster_latents, search_flat, search_levels
from sparsary.eval.attribution_graphs.local_replacement_model import Active, LocalReplacement
from sparsary.eval.attribution_graphs.replacement_model import Replacement
from sparsary.eval.circuits.known import COMPILED, KNOWN
from sparsary.eval.circuits.scoring.faithfulness import jaccard
from sparsary.sae import ENCODERS
from sparsary.training.activations.architecture import Architecture
from sparsary.transcoders import CrossLayerTranscoder
from sparsary.transcoders.transcoder import Transcoder


def mlps_as_transcoders(known):
    found = {}
    for layer in range(known.config.n_layers):
        mlp, width = known.module.mlp(layer), known.config.d_model
        found[layer] = Transcoder(width, width, known.config.d_mlp, ENCODERS["relu"]()).double()
        with torch.no_grad():
            found[layer].W_enc.copy_(mlp.up_proj.weight)
            found[layer].b_enc.copy_(mlp.up_proj.bias)
            found[layer].W_dec.copy_(mlp.down_proj.weight.T)
            found[layer].b_dec.copy_(mlp.down_proj.bias)
        found[layer].requires_grad_(False).eval()
    return found


def asked(known, pair):
    """The graph of the answer to the last question of one pair, with the model that it is of."""
    known.module.double()
    question = known.pairs.questions[pair][-1]
    token_ids = known.pairs.clean[pair][: question.position + 1]
    local = LocalReplacement(Replacement(Architecture(known.model), mlps_as_transcoders(known)), token_ids, 0)
    return local, graph_of(local, answer=question.answers[0], foil=question.foils[0])


def check_like_flat(known, counts, pairs):
    for pair in range(pairs):
        local, graph = asked(known, pair)
        n = len(graph.active)
        flat, found = search_flat(local, graph), search_levels(local, graph, counts)
        assert jaccard(flat.circuit, found.circuit) >= 0.95
        assert found.faithfulness >= 0.9
        assert found.passes <= n * math.log2(n)
        assert flat.passes <= found.flat_passes == 2 + n + bisections(n)
        yield n, flat, found


def test_modular_addition_is_found_by_levels_as_without_them():
    for n, flat, found in check_like_flat(KNOWN["clock"](), (4, 16, 64), 3):
        assert n > 300
        # Most clusters are never opened.
        assert found.passes < 0.6 * flat.passes
        assert len(found.levels[0].opened) == 4
        assert int(found.circuit.sum()) < 20


def test_a_gate_s_neuron_is_its_circuit():
    for _, _, found in check_like_flat(KNOWN["and_gate"](), (2, 5), 2):
        assert int(found.circuit.sum()) == 1


@pytest.mark.parametrize("name", ["tracr_detect_abc", "tracr_hist"])
def test_compiled_programs_are_found_by_levels_as_without_them(name, shared_data):
    known = COMPILED[name](shared_data / "models" / "toy" / name)
    for _, _, found in check_like_flat(known, (4, 16), 3):
        assert int(found.circuit.sum()) == {"tracr_detect_abc": 5, "tracr_hist": 1}[name]


def cross_layer(width):
    torch.manual_seed(3)
    built = CrossLayerTranscoder(3, 3 * width, 3 * width, 51, ENCODERS["topk"](k=4)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
        built.out_scale.fill_(0.01)
    return built.requires_grad_(False).eval()


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "stack"), ("gemma2", "stack"), ("llama", "cross_layer")])
def test_ablating_one_latent_is_what_intervening_on_it_does(family, kind, tiny_model, random_transcoders):
    anatomy = Architecture(tiny_model(family), post_norms=True)
    token_ids = torch.randint(3, 41, (6,), generator=torch.Generator().manual_seed(9))
    dictionaries = random_transcoders(anatomy.d_model) if kind == "stack" else cross_layer(anatomy.d_model)
    local = LocalReplacement(Replacement(anatomy, dictionaries), token_ids, 1)
    graph = graph_of(local, answer=7, foil=30)
    chosen = torch.arange(0, len(graph.active), 9)
    masks = torch.zeros(len(chosen) + 1, len(graph.active), dtype=torch.bool)
    masks[torch.arange(len(chosen)), chosen] = True
    runs = AblatedRuns(local, graph)
    metric = runs.metric(masks)
    assert runs.passes == len(masks)
    assert float(metric[-1]) == pytest.approx(float(graph.totals[-1]), abs=1e-6)
    expected = intervene(local, graph, chosen).measured["model"]["total"][:, -1]
    torch.testing.assert_close(metric[:-1] - metric[-1], expected, rtol=1e-6, atol=1e-6)
    assert float(expected.abs().max()) > 1e-3
    # One at a time or together.
    torch.testing.assert_close(AblatedRuns(local, graph, max_numbers=1).metric(masks), metric, rtol=1e-6, atol=1e-6)


def by_hand(blocks, size):
    """Groups of latents, each a chain from one token to the logit, stronger in earlier groups."""
    n = blocks * size
    active = Active(
        torch.arange(size).repeat_interleave(blocks),
        torch.zeros(n, dtype=torch.long),
        torch.arange(n),
        torch.ones(n),
        torch.ones(n),
    )
    adjacency = torch.zeros(n + size + 2, n + size + 2)
    token, logit = n + size, n + size + 1
    for block in range(blocks):
        chain = torch.arange(size) * blocks + block
        adjacency[chain[0], token] = 1.0
        adjacency[chain[1:], chain[:-1]] = 1.0
        adjacency[logit, chain[-1]] = float(blocks - block)
    none = torch.zeros(len(adjacency))
    return AttributionGraph(
        torch.tensor([5]), size, active, (Target(8, None, 1.0, 1.0),), adjacency, none, none, adjacency.sum(1), 0, 0, 0.0
    )


def test_groups_that_no_edge_joins_are_clusters_and_levels_are_nested():
    blocks, size = 4, 6
    graph = by_hand(blocks, size)
    coarse, middle, fine = cluster_latents(graph, (2, blocks, 12))
    # Numbered by influence: the first group is the strongest.
    assert torch.equal(middle, torch.arange(blocks).repeat(size))
    for upper, lower in ((coarse, middle), (middle, fine)):
        for cluster in range(int(lower.max()) + 1):
            assert len(upper[lower == cluster].unique()) == 1
    assert (len(coarse.unique()), len(fine.unique())) == (2, 12)
    assert all(
        torch.equal(one, other) for one, other in zip(cluster_latents(graph, (2, 4, 12)), (coarse, middle, fine), strict=True)
    )
    [whole, single] = cluster_latents(graph, (1, 24))
    assert not whole.any()
    assert sorted(single.tolist()) == list(range(24))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((), "levels: expected increasing numbers of clusters, coarse to fine, got none"),
        ((8, 4), "levels: expected increasing numbers .* got 8, 4"),
        ((4, 4), "levels: expected increasing numbers .* got 4, 4"),
        ((0, 4), "levels: expected increasing numbers .* got 0, 4"),
        ((4, 25), "levels: expected at most 24 clusters, the number of the graph's latents, got 25"),
    ],
)
def test_levels_that_do_not_increase_or_are_too_many_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        cluster_latents(by_hand(4, 6), counts)


def test_searches_without_a_share_or_an_effect_are_refused():
    local, graph = asked(KNOWN["and_gate"](), 0)
    with pytest.raises(ValueError, match=r"faithfulness: expected a share above 0, up to 1, got 1\.5"):
        search_levels(local, graph, (2,), faithfulness=1.5)
    [target] = graph.targets
    swapped = replace(graph, targets=(replace(target, token=target.foil, foil=target.token),))
    with pytest.raises(ValueError, match=r"levels: expected latents that raise the targets together, got -\S+ with them"):
        search_levels(local, swapped, (2,))
