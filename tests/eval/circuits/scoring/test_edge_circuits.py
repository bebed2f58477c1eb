"""Circuits of edges: grown from the logits, pruned of what leads nowhere, counted, and what edges say of nodes."""

import pytest
import torch

from sparsary.eval.circuits.methods.method import UnitScores
from sparsary.eval.circuits.scoring.edge_circuits import among, grown, node_scores, pruned
from sparsary.eval.circuits.scoring.faithfulness import circuit_members, ranked
from sparsary.eval.circuits.units.edge_list import EdgeList
from sparsary.eval.circuits.units.passes import Cost

EDGES = EdgeList(3, 2)
NAMES = EDGES.names()


def scored(values):
    return UnitScores(values, Cost())


def circuit(*names):
    return torch.tensor([name in names for name in NAMES])


def names_of(kept):
    return {name for name, is_kept in zip(NAMES, kept.tolist(), strict=True) if is_kept}


def grown_by_search(values, size):
    """At every step all edges are looked through."""
    owners, sources = EDGES.owners[EDGES.targets].tolist(), EDGES.sources.tolist()
    kept, reached = [], {EDGES.n_senders}
    for _ in range(size):
        open_edges = [edge for edge in range(len(EDGES)) if owners[edge] in reached and edge not in kept]
        kept.append(max(open_edges, key=lambda edge: values[edge]))
        reached.add(sources[kept[-1]])
    return kept


@pytest.mark.parametrize("ranking", ["signed", "absolute"])
def test_a_circuit_grows_by_the_best_edge_into_what_it_has(ranking):
    values = torch.randn(len(EDGES))
    looked_at = (values if ranking == "signed" else values.abs()).tolist()
    for size in (0, 1, 7, 30, len(EDGES), len(EDGES) + 5):
        kept = grown(EDGES, scored(values), size, ranking)
        assert kept.nonzero().flatten().tolist() == sorted(grown_by_search(looked_at, min(size, len(EDGES))))


def test_a_grown_circuit_leads_to_the_logits_where_the_top_edges_need_not():
    values = torch.zeros(len(EDGES))
    for score, name in enumerate(("a2.h0->logits", "embed->a2.h0.q", "a0.h0->a1.h1.v"), start=1):
        values[NAMES.index(name)] = score
    assert names_of(grown(EDGES, scored(values), 2)) == {"a2.h0->logits", "embed->a2.h0.q"}
    assert "a0.h0->a1.h1.v" in names_of(circuit_members(ranked(scored(values)), 2))


def test_pruning_takes_what_leads_nowhere_away_link_by_link():
    way = circuit("embed->a0.h0.k", "a0.h0->m1", "m1->logits")
    from_nothing = circuit("a0.h1->m2", "m2->a2.h0.q")
    to_nothing = circuit("embed->m0", "m0->a1.h0.q")
    assert torch.equal(pruned(EDGES, way | from_nothing | to_nothing), way)
    assert torch.equal(pruned(EDGES, torch.ones(len(EDGES), dtype=torch.bool)), torch.ones(len(EDGES), dtype=torch.bool))
    assert not pruned(EDGES, circuit("m1->logits")).any()


def test_all_edges_of_a_pruned_circuit_are_on_a_way_from_the_embedding_to_the_logits():
    kept = pruned(EDGES, torch.rand(len(EDGES)) < 0.25)
    assert 0 < int(kept.sum()) < len(EDGES)
    ends = [name.split("->") for name in names_of(kept)]
    links = {(sender, receiver[:-2] if receiver[-2] == "." else receiver) for sender, receiver in ends}
    down, up = {"embed"}, {"logits"}
    for _ in EDGES.senders:
        down |= {receiver for sender, receiver in links if sender in down}
        up |= {sender for sender, receiver in links if receiver in up}
    assert all(sender in down and receiver in up for sender, receiver in links)


def test_nodes_have_the_edges_between_them():
    nodes = torch.tensor([sender in ("embed", "a0.h1", "m2") for sender in EDGES.senders])
    heads = {f"embed->a0.h1.{side}" for side in "qkv"}
    assert names_of(among(EDGES, nodes)) == heads | {"embed->m2", "a0.h1->m2", "embed->logits", "a0.h1->logits", "m2->logits"}
    assert not among(EDGES, torch.zeros(EDGES.n_senders, dtype=torch.bool)).any()


@pytest.mark.parametrize("by", ["max", "sum"])
def test_a_node_s_score_is_that_of_the_edges_that_touch_it(by):
    values = torch.randn(2, len(EDGES))
    found = node_scores(EDGES, values, by)
    for place, sender in enumerate(EDGES.senders):
        touching = [
            edge
            for edge, name in enumerate(NAMES)
            if name.startswith(f"{sender}->") or name.split("->")[1].startswith(f"{sender}.") or name.split("->")[1] == sender
        ]
        expected = values[:, touching].amax(1) if by == "max" else values[:, touching].sum(1)
        torch.testing.assert_close(found[:, place], expected)


def test_unknown_ways_are_refused():
    with pytest.raises(ValueError, match=r"by: expected one of max, sum, got 'sun'\. Did you mean 'sum'"):
        node_scores(EDGES, torch.zeros(len(EDGES)), "sun")
    with pytest.raises(ValueError, match="ranking: expected one of"):
        grown(EDGES, scored(torch.zeros(len(EDGES))), 3, "best")
