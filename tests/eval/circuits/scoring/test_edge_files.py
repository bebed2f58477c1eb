"""Scores of edges as a file: every edge, by the names of EAP-IG, with those that are kept marked."""

import re

import torch

from sparsary.eval.circuits.scoring.edge_files import edge_graph
from sparsary.eval.circuits.units.edges import EdgeSpace


def test_every_edge_is_written_by_its_name_there(tiny_model):
    space = EdgeSpace(tiny_model("gpt2"))
    scores = torch.linspace(-1, 1, space.size, dtype=torch.float64)
    scores[3] = float("nan")
    kept = torch.zeros(space.size, dtype=torch.bool)
    kept[space.edges.names().index("m0->logits")] = True
    found = edge_graph(space, scores, kept)
    layers, heads = found["cfg"]["n_layers"], found["cfg"]["n_heads"]
    assert len(found["edges"]) == space.size
    name = re.compile(r"(input|m\d+|a\d+\.h\d+)->(logits|m\d+|a\d+\.h\d+<[qkv]>)")
    assert all(name.fullmatch(edge) for edge in found["edges"])
    assert {"input->a0.h0<q>", "m0->logits", f"a{layers - 1}.h{heads - 1}->logits"} <= found["edges"].keys()
    assert [edge for edge, about in found["edges"].items() if about["in_graph"]] == ["m0->logits"]
    assert {node for node, about in found["nodes"].items() if about["in_graph"]} == {"m0", "logits"}
    assert list(found["edges"].values())[3]["score"] is None
    assert list(found["edges"].values())[-1]["score"] == 1.0
