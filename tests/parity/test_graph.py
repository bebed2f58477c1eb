"""Attribution graphs against circuit-tracer: its scores and pruning of the same matrix, its own reading of our files."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.eval.attribution_graphs.graph import build_attribution_graph
from sparsary.eval.attribution_graphs.run import save_graph

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment, .venv-peers: make peers"),
]


def test_scores_pruning_and_schema_are_circuit_tracer_s(tiny_model, random_transcoders, tmp_path):
    graph = build_attribution_graph(tiny_model("gpt2"), random_transcoders(12), torch.randint(3, 41, (9,)))
    save_graph(graph, tmp_path)
    given = {
        "adjacency": graph.adjacency.contiguous(),
        "weights": graph.weights[graph.logits].contiguous(),
        "n_latents": torch.tensor(len(graph.active)),
        "n_layers": torch.tensor(graph.n_layers),
        "n_tokens": torch.tensor(len(graph.token_ids)),
    }
    save_file(given, tmp_path / "given.safetensors")
    script = ROOT / "tests" / "parity" / "reference_graph.py"
    command = [PEERS_PYTHON, script, tmp_path / "given.safetensors", tmp_path / "graph.json", tmp_path / "out.safetensors"]
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"PYTHONPATH": ""}, timeout=300)
    theirs = load_file(tmp_path / "out.safetensors")
    ours, scores = graph.prune(), graph.scores()
    assert torch.equal(ours.nodes, theirs["nodes"])
    assert torch.equal(ours.edges, theirs["edges"])
    assert torch.allclose(ours.cumulative, theirs["cumulative"].double(), atol=1e-6)
    assert theirs["scores"].tolist() == pytest.approx([scores.replacement, scores.completeness], abs=1e-6)
