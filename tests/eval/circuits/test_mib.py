"""Edge scores as MIB's circuit track reads them."""

import json

import pytest

import sparsary
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.units.edges import EdgeSpace

SETTINGS = sparsary.CircuitSettings(tasks=("agreement_simple",), methods=("attribution", "integrated_inputs"), pairs=8)


@pytest.fixture(scope="module")
def model():
    return sparsary.LanguageModel.from_pretrained("embedded", device="cpu")


def graph_of(cfg):
    """Nodes and edges of the graph that EAP-IG builds for a configuration, from its definition."""
    stream, edges = ["input"], set()
    for layer in range(cfg["n_layers"]):
        heads = [f"a{layer}.h{head}" for head in range(cfg["n_heads"])]
        edges |= {f"{node}->{head}<{side}>" for node in stream for head in heads for side in "qkv"}
        before = list(stream)
        stream += heads
        edges |= {f"{node}->m{layer}" for node in (before if cfg["parallel_attn_mlp"] else stream)}
        stream.append(f"m{layer}")
    return {*stream, "logits"}, edges | {f"{node}->logits" for node in stream}


def test_a_submission_has_a_folder_for_each_task_and_method(model, tmp_path):
    found = sparsary.mib_submission((), tmp_path, SETTINGS, model)
    assert [row["file"] for row in found["rows"]] == [
        str(tmp_path / name / "agreement-simple_embedded" / "importances.json") for name in SETTINGS.methods
    ]
    graph = json.loads((tmp_path / "attribution" / "agreement-simple_embedded" / "importances.json").read_text())
    assert set(graph) == {"cfg", "nodes", "edges"}
    nodes, edges = graph_of(graph["cfg"])
    assert set(graph["nodes"]) == nodes
    assert set(graph["edges"]) == edges
    assert {"n_layers", "n_heads", "d_model", "parallel_attn_mlp"} == set(graph["cfg"])
    assert not any(edge["in_graph"] for edge in graph["edges"].values())
    space, pairs = EdgeSpace(model), make_pairs("agreement_simple", model, 8)
    scores = METHODS["attribution"]().discover(space, pairs).values.tolist()
    assert [edge["score"] for edge in graph["edges"].values()] == pytest.approx(scores, abs=1e-5)
    assert max(map(abs, scores)) > 0.1


def test_what_is_no_submission_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"--mib: expected a folder for 2 combinations .* got the file .*one\.json"):
        sparsary.mib_submission((), tmp_path / "one.json", SETTINGS, model)
    settings = sparsary.CircuitSettings(tasks=("agreement_simple",), methods=("discrete_codes",), pairs=8)
    with pytest.raises(ValueError, match=r"--mib: discrete_codes: .* got one of edges"):
        sparsary.mib_submission((), tmp_path, settings, model)
    with pytest.raises(ValueError, match="expected CHECKPOINT or --model MODEL, got neither"):
        sparsary.mib_submission((), tmp_path)
