"""circuit-tracer's scores, pruning and schema for a given graph; test_graph.py compares them with ours.

    .venv-peers/bin/python tests/parity/reference_graph.py GIVEN.safetensors GRAPH.json OUT.safetensors

GIVEN holds ``adjacency``, ``weights`` of the logits, and the sizes ``n_latents``, ``n_layers`` and ``n_tokens``. GRAPH.json is
read by circuit-tracer's own models, which refuse what they do not know how to read.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from circuit_tracer.frontend.feature_models import Model as Latent
from circuit_tracer.frontend.graph_models import Model, Node
from circuit_tracer.graph import compute_graph_scores, prune_graph
from safetensors.torch import load_file, save_file


def main() -> None:
    given_path, graph_path, out = map(Path, sys.argv[1:])
    # Theirs is single precision unless told otherwise, and ties would be cut differently.
    torch.set_default_dtype(torch.float64)
    given = load_file(given_path)
    graph = SimpleNamespace(
        adjacency_matrix=given["adjacency"],
        logit_probabilities=given["weights"],
        logit_targets=given["weights"].tolist(),
        logit_tokens=given["weights"],
        selected_features=torch.arange(int(given["n_latents"])),
        input_tokens=torch.arange(int(given["n_tokens"])),
        cfg=SimpleNamespace(n_layers=int(given["n_layers"])),
    )
    nodes, edges, cumulative = prune_graph(graph, 0.8, 0.98)
    scores = torch.tensor(compute_graph_scores(graph), dtype=torch.float64)
    values = json.loads(graph_path.read_text())
    model = Model.model_validate(values)
    assert set(Node.model_fields) == set(values["nodes"][0])
    assert len(model.nodes) == len(values["nodes"])
    for path in (graph_path.parent / "features").glob("*.json"):
        assert set(Latent.model_validate_json(path.read_text()).model_dump()) == set(json.loads(path.read_text()))
    # Named as theirs names them: what both can name alike must be equal.
    logit = next(node for node in values["nodes"] if node["feature_type"] == "logit")
    named = Node.logit_node(
        logit["ctx_idx"], logit["feature"], logit["clerp"].split('"')[1], int(given["n_layers"]), True, logit["token_prob"]
    )
    assert named.model_dump() == logit, (named, logit)
    latent = next(node for node in values["nodes"] if node["feature_type"] == "cross layer transcoder")
    layer, index, position = map(int, latent["node_id"].split("_"))
    theirs = Node.feature_node(layer, position, index, latent["influence"], latent["activation"]).model_dump()
    assert theirs | {"clerp": latent["clerp"]} == latent, (theirs, latent)
    token = next(node for node in values["nodes"] if node["feature_type"] == "embedding")
    assert Node.token_node(token["ctx_idx"], int(token["node_id"].split("_")[1]), token["influence"]).model_dump() == token
    save_file({"nodes": nodes, "edges": edges, "cumulative": cumulative, "scores": scores}, out)


if __name__ == "__main__":
    main()
