"""``sparsary plan`` on the command line."""

import json
import logging
import sys

import pytest

import sparsary

GIVEN = ("--memory", "141", "--bandwidth", "4800", "--flops", "989")
MODEL = ("--d-model", "4096", "--parameters", "8e9", "--layers", "32")


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs a command in this process; returns its status, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparsary", *map(str, arguments)])
        monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            sparsary.main()
        return ended.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def brief(monkeypatch):
    """Few rounds of the probe: these tests see that it measures, not what."""
    monkeypatch.setattr("sparsary.training.scale.probe.MOST_ROUNDS", 3)


@pytest.fixture
def path(tmp_path):
    text = """
model: {id: some-lab/model-of-8b}
text: {source: files, files: [text.jsonl]}
harvest: {store: there, tokens: 1_000_000}
dictionary: {layer: 15, site: resid_post, n_latents: 131_072, encoder: {name: topk, k: 64}}
tokens: 1_000_000_000
batch_tokens: 8192
out_dir: nowhere
"""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_plan_of_a_model_that_is_not_here(command, path, tmp_path):
    status, out, err = command("plan", path, "--devices", 8, *GIVEN, *MODEL, "--json", tmp_path / "plan.json")
    assert status == 0, err
    assert "8 x 1" in out
    assert "best" in out
    assert "tokens" in out
    assert not (tmp_path / "nowhere").exists()
    written = json.loads((tmp_path / "plan.json").read_text())
    assert len(written["meshes"]) == 4
    assert written["best"] in [[each["data"], each["latents"]] for each in written["meshes"]]


def test_plan_measures_this_machine_on_the_model_it_names(command, brief, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "harvest: {store: null}\n"
        "dictionary: {layer: 2, site: resid_post, n_latents: 256, encoder: {name: relu, target_l0: 8}}\n"
        "tokens: 100_000\nbatch_tokens: 256\nout_dir: nowhere\n"
    )
    status, out, err = command("plan", file, "--json", tmp_path / "plan.json")
    assert status == 0, err
    assert "measured" in out
    (mesh,) = json.loads((tmp_path / "plan.json").read_text())["meshes"]
    assert mesh["seconds"]["forward"] > 0
    assert mesh["seconds"]["update"] > 0
    assert mesh["seconds"]["model"] > 0
    assert mesh["memory"]["model"] > 0


def test_plan_measures_processes_together(command, brief, path, tmp_path):
    small = ("dictionary.n_latents=1024", "batch_tokens=512", "model.device=cpu", "--d-model", 64)
    status, _, err = command("plan", path, *small, "--devices", 2, "--json", tmp_path / "plan.json")
    assert status == 0, err
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["machine"]["near"]["latency"] > 0
    assert written["machine"]["near"]["bandwidth"] > 0
    assert [mesh["seconds"]["exchange"] > 0 for mesh in written["meshes"]] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", 0, *GIVEN, *MODEL], "--devices: expected at least 1, got 0"),
        (["--devices", 4, *GIVEN[:4], *MODEL], "--flops: expected all of"),
        (["--devices", 3, *GIVEN, *MODEL], "is not a multiple of 3 ranks"),
        ([*GIVEN, *MODEL, "dictionary.encoder={name: relu, sparsity: 0.1}"], "--l0: expected the latents per token"),
        ([*GIVEN, *MODEL, "dictionary.n_latents=16777216"], "expected enough memory on 1"),
        (
            [*GIVEN, "--d-model", 64, "dictionary={kind: cross_layer_transcoder, layers: all, site: mlp, n_latents: 64, "
             "encoder: {name: topk, k: 4}}"],
            "--layers: expected the number of layers",
        ),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_message(command, path, arguments, words):
    status, _, err = command("plan", path, *arguments)
    assert status == 2
    assert words in err
    assert "Traceback" not in err
