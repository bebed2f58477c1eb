"""Names of nodes and edges, and what a known circuit refuses to be."""

from dataclasses import replace

import pytest
import torch

from sparsary.eval.circuits.known import KNOWN, ToyConfig, edge_names, node_names
from sparsary.eval.circuits.known.known_circuit import ends, wired

# Those that are trained have tests of their own.
AT_ONCE = [name for name in KNOWN if not name.startswith("siit_")]


@pytest.mark.parametrize(("layers", "heads", "edges", "senders"), [(12, 12, 32491, 157), (6, 4, 1108, 31)])
def test_as_many_edges_as_published(layers, heads, edges, senders):
    # GPT-2 small and a six-layer model, as counted for EAP (Syed et al. 2023, arXiv:2310.10348).
    config = ToyConfig(layers, heads, 8, 2, 4, 5, 5, d_mlp=3)
    assert len(edge_names(config)) == edges
    assert len(set(edge_names(config))) == edges
    assert len(node_names(config)) == senders


def test_without_mlps_there_are_no_such_names():
    names = edge_names(ToyConfig(2, 1, 8, 2, 4, 5, 5))
    assert names[:3] == ["embed->a0.h0.q", "embed->a0.h0.k", "embed->a0.h0.v"]
    assert names[-1] == "a1.h0->logits"
    assert len(names) == 3 + 6 + 3


def test_edges_from_text():
    assert wired("embed->a0.h1.q,k m0->logits") == {"embed->a0.h1.q", "embed->a0.h1.k", "m0->logits"}
    assert ends(wired("embed->a0.h1.q,k m0->logits")) == {"embed", "a0.h1", "m0"}


@pytest.mark.parametrize("name", AT_ONCE)
def test_clean_prompts_are_right_and_corrupted_ones_are_not(name):
    known = KNOWN[name](n_pairs=5)
    clean, corrupted = (known.pairs.measure(known.model.logits(ids)) for ids in (known.pairs.clean, known.pairs.corrupted))
    assert len(clean) == 5
    assert (clean > corrupted + 0.1).all()
    assert torch.equal(known.pairs.clean, KNOWN[name](n_pairs=5).pairs.clean)
    for direction in known.directions.values():
        assert direction.shape == (known.config.d_model,)
        torch.testing.assert_close(direction.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("name", AT_ONCE)
def test_there_is_more_outside_the_circuit_than_in_it(name):
    known = KNOWN[name](n_pairs=2)
    for ablation in known.edges:
        nodes, edges = known.node_labels(ablation), known.edge_labels(ablation)
        assert 0 < nodes.sum() < len(nodes)
        assert edges.double().mean() < 0.5
        assert known.nodes[ablation] == ends(known.edges[ablation])


def test_labels_follow_the_names_given():
    known = KNOWN["and_gate"](n_pairs=2)
    assert known.node_labels("resample", ["m0", "a0.h0", "a0.h1"]).tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"ablation: expected one of resample, zero, .* got 'mean'"):
        known.node_labels("mean")


def test_a_circuit_of_parts_the_model_lacks_is_refused():
    known = KNOWN["and_gate"](n_pairs=2)
    with pytest.raises(ValueError, match=r"and_gate: nodes: .* got a7\.h0 for 'zero'"):
        replace(known, nodes={"zero": frozenset({"a7.h0"})})
