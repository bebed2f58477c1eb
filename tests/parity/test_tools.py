"""Other libraries run what we export, and give our figures on the same tokens: see compare_tools.py."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.eval.features.collect import Limits
from sparsary.sae import ENCODERS, SAE
from sparsary.training.recipe import HarvestSection, TextSection
from sparsary.transcoders import CrossLayerTranscoder, Transcoder

D, LATENTS, LAYERS = 128, 192, 4
TOKENS = 2048


def about(reads, writes):
    harvest = HarvestSection(hooks=(reads[0],)).model_dump(mode="json")
    return {
        "model": {"id": "embedded", "device": "cpu"},
        "hooks_in": list(reads),
        "hooks_out": list(writes),
        "text": TextSection(context_length=32).model_dump(mode="json"),
        "harvest": {key: harvest[key] for key in ("dtype", "heldout", "exclude_special", "exclude_leading")},
    }


@pytest.fixture(scope="module")
def tools():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("compare_tools", Path(__file__).with_name("compare_tools.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.PEERS_PYTHON.exists():
        pytest.skip("needs the peers' environment, .venv-peers: make peers")
    return module


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools") / "sae"
    torch.manual_seed(1)
    hook = "transformer.h.2:out"
    d = SAE(D, LATENTS, ENCODERS["topk"](k=8))
    with torch.no_grad():
        d.W_enc.copy_(d.W_dec + 0.05 * torch.randn(LATENTS, D))
        d.b_dec.normal_(std=0.1)
        d.in_scale.fill_(1.7)
        d.out_scale.fill_(1.7)
    d.save(folder, about([hook], [hook]) | {"hook": hook})
    return str(folder)


@pytest.fixture(scope="module", params=["layers", "across"])
def transcoders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools") / request.param
    torch.manual_seed(2)
    reads, writes = ([f"transformer.h.{layer}.mlp:{side}" for layer in range(LAYERS)] for side in ("in", "out"))
    if request.param == "across":
        d = CrossLayerTranscoder(LAYERS, LAYERS * D, LAYERS * D, LAYERS * 48, ENCODERS["relu"]())
        with torch.no_grad():
            for name, parameter in d.named_parameters():
                if name.startswith("W_"):
                    parameter.normal_(std=0.1 if name.startswith("W_enc") else 0.05)
                elif name.startswith("b_enc"):
                    parameter.fill_(-0.4)
        d.save(folder, about(reads, writes))
        return str(folder)
    for layer in range(LAYERS):
        d = Transcoder(D, D, 48, ENCODERS["relu"]())
        with torch.no_grad():
            d.W_enc.normal_(std=0.1)
            d.b_enc.fill_(-0.4)
        d.save(folder / str(layer), about(reads[layer : layer + 1], writes[layer : layer + 1]))
    return str(folder)


@pytest.mark.parity
def test_neuronpedia_s_client_takes_what_we_export(tools, sae, tmp_path):
    limits = Limits(top=3, sample=10, before=5, after=2, background=20)
    found = sparsary.features(sae, tmp_path / "ours", tokens=3000, limits=limits, neuronpedia=tmp_path / "exports")
    script = Path(__file__).with_name("reference_neuronpedia.py")
    command = [tools.PEERS_PYTHON, script, found["neuronpedia_path"], tmp_path / "out.json"]
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"PYTHONPATH": ""}, timeout=600)
    theirs = json.loads((tmp_path / "out.json").read_text())
    sent = [feature for batch in theirs["batches"] for feature in batch["features"]]
    assert [len(batch["features"]) for batch in theirs["batches"]] == [128, LATENTS - 128]
    assert theirs["model"] == {"id": "gpt2-small-embedded", "layers": LAYERS, "display_name": "embedded", "url": None}
    for record, feature in zip(found.records_of(range(LATENTS)), sent, strict=True):
        assert (feature["index"], feature["density"]) == (record["latent"], record["density"])
        assert [logit["token"] for logit in feature["topLogits"]] == [each["token"] for each in record["logits"]["promoted"]]
        shown = [*record["top"], *(context for part in record["quantiles"] for context in part["contexts"])]
        assert [each["values"] for each in feature["activations"]] == [context["activations"] for context in shown]


@pytest.mark.parity
@pytest.mark.parametrize("tool", ["saelens", "saebench_core", "sparsify", "dictionary_learning", "overcomplete"])
def test_a_tool_gives_our_figures_of_an_sae(tool, tools, sae, tmp_path):
    tokens = TOKENS if tool.startswith("sae") else tools.STEPS * tools.BATCH // 2
    found = tools.TOOLS[tool](tools.Case(sae, tmp_path, tokens))
    assert found.pairs
    if tool == "saebench_core":
        # Its variance is about no mean: docs/interoperability.md.
        del found.pairs["explained_variance"]
    for name, (theirs, ours) in found.pairs.items():
        # SAELens's and SAEBench's KL is over positions without a next token too.
        assert theirs == pytest.approx(ours, rel=0.05 if name.startswith("kl") else 2e-4, abs=2e-5), name
    if "last_fvu" in found.theirs:
        # And it learns.
        assert found.theirs["last_fvu"] < 0.98 * found.theirs["untrained_last_fvu"]


@pytest.mark.parity
def test_saebench_s_sparse_probing_finds_what_ours_finds(tools, sae, tmp_path):
    found = tools.saebench_probing(tools.Case(sae, tmp_path, TOKENS))
    for name, (theirs, ours) in found.pairs.items():
        # Other texts of other classes, and other probes.
        assert theirs == pytest.approx(ours, abs=0.04), name
    assert found.pairs["llm_test_accuracy"][0] > 0.7


@pytest.mark.parity
def test_saebench_s_absorption_is_ours_of_the_same_activations(tools, tmp_path):
    spelling = tools.ROOT / "runs" / "spelling" / "sae"
    if not spelling.exists():
        pytest.skip("needs runs/spelling/sae: the command is in tests/parity/spelling.yaml")
    found = tools.saebench_absorption(tools.Case(str(spelling), tmp_path, TOKENS))
    for name, (theirs, ours) in found.pairs.items():
        assert theirs == pytest.approx(ours, abs=1e-4), name
    assert found.theirs["letters"] >= 20
    assert found.pairs["mean_absorption_fraction_score"][0] > 0


@pytest.mark.parity
def test_circuit_tracer_attributes_as_we_do_and_serves_our_graph(tools, transcoders, tmp_path):
    found = tools.circuit_tracer(tools.Case(transcoders, tmp_path, TOKENS))
    for name, (theirs, ours) in found.pairs.items():
        # The same nodes and, with its token nodes, the same scores; our token nodes hold position embeddings too.
        assert theirs == pytest.approx(ours, rel=0.06 if name.endswith("_score") else 1e-4), name
    assert found.theirs["edge_difference"] < 1e-4
    assert found.theirs["served_nodes"] > 10
