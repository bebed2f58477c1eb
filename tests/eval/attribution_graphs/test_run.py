"""A checkpoint and a prompt become files; contexts of latents come from text or from what is written beside the checkpoint."""

import json

import pytest
import torch

from sparsary.eval.attribution_graphs.labels import read_records
from sparsary.eval.attribution_graphs.run import attribution_graph, open_graph_target
from sparsary.sae import ENCODERS, SAE
from sparsary.transcoders import CrossLayerTranscoder
from sparsary.transcoders.transcoder import Transcoder

TEXT = {"source": "embedded", "context_length": 32}
HARVEST = {"dtype": "float32", "heldout": 0.05, "exclude_special": True, "exclude_leading": 2}
PROMPT = "The dog swims again ."


def hooks(layers, site="mlp"):
    if site == "mlp":
        return {
            "hooks_in": [f"transformer.h.{i}.mlp:in" for i in layers],
            "hooks_out": [f"transformer.h.{i}.mlp:out" for i in layers],
        }
    return {"hooks_in": [f"transformer.h.{i}:out" for i in layers], "hooks_out": [f"transformer.h.{i}:out" for i in layers]}


def provenance(layers, site="mlp", model="embedded"):
    section = {"id": model, "revision": None, "dtype": "float32", "device": "cpu"}
    return {"model": section, "text": TEXT, "harvest": HARVEST, **hooks(layers, site)}


def transcoder(seed=0, encoder=None):
    torch.manual_seed(seed)
    built = Transcoder(128, 128, 41, encoder or ENCODERS["topk"](k=4))
    built.out_scale.fill_(0.5)
    return built


@pytest.fixture
def stack(tmp_path):
    for layer in (1, 3):
        transcoder(layer).save(tmp_path / "stack" / f"layer={layer}", provenance([layer]))
    return tmp_path / "stack"


def test_a_model_object_takes_the_place_of_the_one_that_is_named(embedded_model, stack, tmp_path, monkeypatch):
    module, tokenizer = embedded_model.module, embedded_model.tokenizer
    named = attribution_graph(str(stack), PROMPT, str(tmp_path / "a"), context_tokens=0)
    # Nothing is loaded.
    monkeypatch.delattr("sparsary.eval.attribution_graphs.run.load_model")
    given = attribution_graph(str(stack), PROMPT, str(tmp_path / "b"), context_tokens=0, model=module, tokenizer=tokenizer)
    assert given["replacement_score"] == pytest.approx(named["replacement_score"], rel=1e-5)
    with pytest.raises(ValueError, match=r"tokenizer: expected the model's tokenizer"):
        attribution_graph(str(stack), PROMPT, str(tmp_path / "c"), context_tokens=0, model=module)


def test_a_stack_and_a_prompt_become_a_graph(stack, tmp_path):
    facts = attribution_graph(str(stack), PROMPT, str(tmp_path / "out"), node_threshold=0.99, context_tokens=500)
    values = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert values["metadata"]["prompt"] == PROMPT
    assert values["metadata"]["prompt_tokens"][0] == "<bos>"
    assert (facts["n_nodes"], facts["n_edges"]) == (len(values["nodes"]), len(values["links"]))
    assert facts["page_path"] == str(tmp_path / "out" / "graph.html")
    assert 0 < facts["replacement_score"] < 1
    assert facts["direct_spearman_norms"] == pytest.approx(1.0, abs=1e-3)
    assert len(facts["error_shares"]) == 4
    # Layers without a transcoder are errors.
    assert {node["layer"] for node in values["nodes"] if node["feature_type"] == "cross layer transcoder"} <= {"1", "3"}
    latents = list((tmp_path / "out" / "features").glob("*.json"))
    shown = {node["feature"] for node in values["nodes"] if node["feature_type"] == "cross layer transcoder"}
    assert {int(path.stem) for path in latents} == shown
    examples = [json.loads(path.read_text())["examples_quantiles"][0]["examples"] for path in latents]
    assert any(examples)
    for example in (example for some in examples for example in some):
        assert example["tokens_acts_list"][example["train_token_ind"]] == max(example["tokens_acts_list"])


def test_contexts_beside_the_checkpoint_are_taken_and_no_text_is_read(stack, tmp_path):
    record = {"top": [{"tokens": ["x", "y"], "activations": [0.0, 2.0], "peak": 1}], "max_activation": 2.0, "density": 0.5}
    records = [record | {"explanation": {"text": f"number {i}"}, "details": {}} for i in range(41)]
    for layer in (1, 3):
        (stack / f"layer={layer}" / "features").mkdir()
        lines = "\n".join(json.dumps(entry) for entry in records)
        (stack / f"layer={layer}" / "features" / "features.jsonl").write_text(lines)
    attribution_graph(str(stack), PROMPT, node_threshold=0.99, context_tokens=0)
    values = json.loads((stack / "graph" / "graph.json").read_text())
    nodes = [node for node in values["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert nodes
    assert all(node["clerp"] == f"number {node['node_id'].split('_')[1]}" for node in nodes)


def test_records_of_a_cross_layer_transcoder_are_numbered_through(tmp_path):
    (tmp_path / "features").mkdir()
    record = {"top": [], "max_activation": None, "density": 0.0, "explanation": None, "details": {}}
    lines = [json.dumps(record | {"details": {"predicate_f1": {"predicate": f"line {i}"}}}) for i in range(9)]
    (tmp_path / "features" / "features.jsonl").write_text("\n".join(lines))
    notes = read_records(tmp_path, {7: (1, 2), 0: (0, 0)})
    assert {latent: note.label for latent, note in notes.items()} == {(0, 0): "line 0", (1, 2): "line 7"}
    assert read_records(tmp_path / "nowhere", {0: (0, 0)}) == {}


def test_a_cross_layer_transcoder_and_a_single_one_become_graphs(tmp_path):
    crossing = CrossLayerTranscoder(4, 512, 512, 4 * 41, ENCODERS["topk"](k=4))
    crossing.out_scale.fill_(0.05)
    crossing.save(tmp_path / "crossing", provenance(range(4)))
    facts = attribution_graph(
        str(tmp_path / "crossing"), PROMPT, answer="dog", foil="swims", context_tokens=300, max_latents=20
    )
    assert facts["latents_left_out"] > 0
    assert 0 < facts["left_out_share"] < 1
    values = json.loads((tmp_path / "crossing" / "graph" / "graph.json").read_text())
    assert [node["clerp"].split('"')[1] for node in values["nodes"] if node["feature_type"] == "logit"] == ["dog \u2212 swims"]
    transcoder().save(tmp_path / "single", provenance([2]))
    assert open_graph_target(str(tmp_path / "single")).replacement.layers == (2,)


def test_what_cannot_be_explained_is_refused(stack, tmp_path):
    with pytest.raises(ValueError, match=r"prompt: expected text of at least one token, got ''"):
        attribution_graph(str(stack), "")
    with pytest.raises(ValueError, match=r"prompt: expected at most 128 tokens, the context of embedded, got 20\d"):
        attribution_graph(str(stack), "dog " * 200)
    with pytest.raises(ValueError, match=r"answer: expected text that is one token of embedded, got 'dog swims'"):
        attribution_graph(str(stack), PROMPT, answer="dog swims")
    SAE(128, 41, ENCODERS["topk"](k=4)).save(tmp_path / "sae", provenance([2], site="out"))
    with pytest.raises(ValueError, match=r"expected transcoders of MLPs of embedded, got a dictionary that reads and writes"):
        open_graph_target(str(tmp_path / "sae"))
    transcoder(encoder=ENCODERS["matching_pursuit"](k=2)).save(tmp_path / "pursuit", provenance([2]))
    with pytest.raises(ValueError, match=r"encoder with pre-activations, got MatchingPursuit"):
        open_graph_target(str(tmp_path / "pursuit"))
    transcoder().save(tmp_path / "tensors", {})
    with pytest.raises(ValueError, match=r"trained on tensors"):
        open_graph_target(str(tmp_path / "tensors"))


def test_attention_goes_into_the_file_and_onto_the_page(stack, tmp_path):
    out = str(tmp_path / "out")
    facts = attribution_graph(str(stack), PROMPT, out, node_threshold=0.99, context_tokens=0, attention=True)
    values = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert len(values["links"]) == facts["n_edges"]
    position = {node["node_id"]: node["ctx_idx"] for node in values["nodes"]}
    for link in values["links"]:
        if position[link["source"]] != position[link["target"]]:
            assert link["direct"] == 0
            assert link["heads"]
        # Three heads of each are listed.
        if len(link["heads"]) < 3:
            assert link["direct"] + sum(part["weight"] for part in link["heads"]) == pytest.approx(link["weight"], rel=1e-3)
    assert 0 < len(values["attention_scores"]) <= 24
    for score in values["attention_scores"]:
        assert sum(term["value"] for term in score["terms"]) + score["rest"] == pytest.approx(score["score"], abs=1e-3)
        assert 0 < score["weight"] <= 1
    data = json.loads((tmp_path / "out" / "graph-page.json").read_text())
    assert len(data["edge_heads"]) == len(data["edges"])
    assert [score["place"][0] for score in data["attention_scores"]] == [s["layer"] for s in values["attention_scores"]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--attention", "--attention: expected --prompt beside it"),
        ("--levels 4,8", "--levels: expected --prompt beside it"),
        ("--prompt dog --levels 4,x", "--levels: expected numbers of clusters joined by commas, such as 8,32,128, got '4,x'"),
    ],
)
def test_options_of_graphs_are_checked(given, message, monkeypatch, capsys):
    import sparsary

    monkeypatch.setattr("sys.argv", ["sparsary", "circuits", "runs/stack", *given.split()])
    with pytest.raises(SystemExit):
        sparsary.main()
    assert message in " ".join(capsys.readouterr().err.split())
