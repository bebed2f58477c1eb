"""The command line and the facade, as a user meets them."""

import json
import logging
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder

ROOT = Path(__file__).parents[1]


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the console script's function in this process: a new one would spend seconds importing torch."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparsary", *arguments])
        # basicConfig does nothing where a handler is set, and pytest sets one.
        monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            sparsary.main()
        return Finished(ended.value.code, *capfd.readouterr())

    return run


def test_harvest_train_eval_info(command, recipe_values, write_recipe, caplog):
    path, out, store = write_recipe(recipe_values), recipe_values["out_dir"], recipe_values["harvest"]["store"]
    harvested = command("harvest", path)
    assert harvested.returncode == 0, harvested.stderr
    assert "training and" in harvested.stdout
    with caplog.at_level(logging.INFO):
        trained = command("train", path, "lr=2e-3")
    assert trained.returncode == 0, trained.stderr
    assert "sparsary eval" in trained.stdout
    assert "fvu" in caplog.text
    judged = command("eval", out, "--out", out + "/judged")
    assert judged.returncode == 0, judged.stderr
    assert "recovered" in judged.stdout
    assert json.loads((Path(out) / "judged" / "report.json").read_text())["fvu"] < 0.6
    for path, word in ((out, "matches"), (store, "0 damaged")):
        described = command("info", path)
        assert described.returncode == 0, described.stderr
        assert word in described.stdout


def test_dry_run_shows_the_plan_and_does_nothing(command, recipe_values, write_recipe):
    planned = command("train", write_recipe(recipe_values), "--dry-run")
    assert planned.returncode == 0, planned.stderr
    for word in ("shuffle", "memory", "30 steps", "6,000 tokens", "128 -> 67"):
        assert word in planned.stdout
    assert not Path(recipe_values["out_dir"]).exists()
    assert not Path(recipe_values["harvest"]["store"]).exists()


def test_a_grid_is_planned_and_trained_member_by_member(command, recipe_values, write_recipe):
    path = write_recipe(recipe_values | {"tokens": 202, "grid": {"dictionary.encoder.k": [2, 3]}})
    planned = command("train", path, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    for word in ("k=2", "k=3", "128 -> 67", "2 on 1 stream of batches", "for each member"):
        assert word in planned.stdout
    assert not Path(recipe_values["out_dir"]).exists()
    assert command("harvest", path).returncode == 0
    trained = command("train", path)
    assert trained.returncode == 0, trained.stderr
    for k in (2, 3):
        assert f"Judge it with: sparsary eval {recipe_values['out_dir']}/k={k}" in trained.stdout
    assert command("info", f"{recipe_values['out_dir']}/k=3").returncode == 0


def test_a_stack_by_layer_and_site_is_planned_harvested_trained_told_and_loaded(command, recipe_values, write_recipe):
    del recipe_values["harvest"]["hooks"]
    recipe_values["dictionary"] = {"kind": "transcoder", "site": "mlp", "n_latents": 67, "encoder": {"name": "topk", "k": 5}}
    path = write_recipe(recipe_values | {"tokens": 202, "grid": {"dictionary.layer": [0, 1]}})
    planned = command("train", path, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    for word in ("layer=1", "transcoder 128 -> 67", "without skip", "17,347 parameters", "transformer.h.1.mlp:out (128)"):
        assert word in " ".join(planned.stdout.split())
    assert command("harvest", path).returncode == 0
    trained = command("train", path)
    assert trained.returncode == 0, trained.stderr
    described = command("info", recipe_values["out_dir"])
    assert described.returncode == 0
    assert "transformer.h.1.mlp:in -> transformer.h.1.mlp:out" in " ".join(described.stdout.split())
    assert "predicts" in command("info", f"{recipe_values['out_dir']}/layer=1").stdout
    stack = sparsary.load(recipe_values["out_dir"])
    assert list(stack) == ["transformer.h.0.mlp:out", "transformer.h.1.mlp:out"]
    assert sparsary.load(f"{recipe_values['out_dir']}/layer=0").n_latents == 67


def test_a_plan_without_room_is_refused_also_as_a_dry_run(command, recipe_values, write_recipe):
    cross_layer = {"kind": "cross_layer_transcoder", "layers": "all", "site": "mlp", "encoder": {"name": "topk", "k": 5}}
    # Terabytes.
    recipe_values |= {"dictionary": cross_layer | {"n_latents": 10**10}}
    del recipe_values["harvest"]["hooks"]
    refused = command("train", write_recipe(recipe_values), "--dry-run")
    assert refused.returncode == 2
    assert refused.stderr.startswith("sparsary: memory: training needs about 2")
    assert "parameters" in refused.stderr
    assert not Path(recipe_values["out_dir"]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "RECIPE", "lrr=1"], "Did you mean 'lr'?"),
        (["train", "RECIPE", "dictionary.encoder.k=1000"], "expected at most n_latents = 67, got 1000"),
        (["train", "RECIPE", "harvest.hooks=[transformer.h.9:out]", "dictionary.hook=transformer.h.9:out"], "Nearest: "),
        (["train", "RECIPE", "model.id=/nowhere/model", "text.source=files", "text.files=[x.txt]"], "embedded"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "RECIPE", "dictionary.skip=true"], "dictionary.skip: expected it with kind transcoder only"),
        (["harvest", "RECIPE", "dictionary.hook=null", "dictionary.layer=9", "dictionary.site=mlp_out"], "0 to 3"),
        (["train", "RECIPE", "grid.lrr=[1, 2]"], "Did you mean 'lr'?"),
        (["train", "RECIPE", "grid.dictionary.encoder.k=[2, 1000]"], "grid k=1000: dictionary.encoder.k: expected at most"),
        (["train", "RECIPE", "loud"], "key.sub=value"),
        (["harvest", "RECIPE", "harvest.store=null"], "stores nothing"),
        (["eval", "/nowhere"], "expected a checkpoint directory"),
        (["info", "/nowhere"], "found none"),
        (["info"], "Missing argument"),
        (["trian"], "No such command"),
        (["train", "RECIPE", "out_dir=/proc/x/y"], "cannot be written"),
    ],
)
def test_a_user_s_error_is_one_message_and_status_2(command, recipe_values, write_recipe, arguments, message):
    path = write_recipe(recipe_values)
    failed = command(*(path if argument == "RECIPE" else argument for argument in arguments))
    assert failed.returncode == 2, failed.stderr
    assert message in failed.stderr
    assert failed.stderr.startswith("sparsary: ")
    assert "Traceback" not in failed.stderr + failed.stdout


def test_info_finds_damage(command, recipe_values, write_recipe):
    assert command("harvest", write_recipe(recipe_values)).returncode == 0
    shard = Path(recipe_values["harvest"]["store"]) / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    described = command("info", recipe_values["harvest"]["store"])
    assert described.returncode == 2
    assert "train-00000.safetensors" in described.stderr
    assert "1 damaged" in described.stdout


def test_the_facade(recipe_values, write_recipe):
    path = write_recipe(recipe_values)
    store = sparsary.harvest(path, **{"dictionary.n_latents": 71})
    assert store.tokens("train") >= 6000
    directory = sparsary.train(path, dictionary__n_latents=71, lr=2e-3)
    d = sparsary.load(str(directory))
    assert (d.d_in, d.d_out, d.n_latents, d.training) == (128, 128, 71, False)
    x = torch.randn(13, 128)
    code = d.encode(x)
    assert code.to_dense(d.n_latents).shape == (13, 71)
    torch.testing.assert_close(d.decode(code), d(x))
    report = sparsary.evaluate(str(directory))
    assert report.keys() >= {"fvu", "l0_mean", "ce_recovered_zero", "fvu_nonlinear"}
    described = sparsary.info(directory, sparsary.CheckpointOptions(settings={"text.context_length": 16}))
    assert described.problems == []
    assert described.sanity(500)["transformer.h.2:out"].fvu < 0.9


def test_render_prints_where_the_pages_are(command, monkeypatch):
    played = types.ModuleType("sparsary.eval.pages.render")
    played.render_file = lambda path: Path(path).with_suffix(".html")
    monkeypatch.setitem(sys.modules, "sparsary.eval.pages.render", played)
    rendered = command("render", "a/report.json", "b/circuits.json")
    assert rendered.returncode == 0, rendered.stderr
    assert rendered.stdout.replace("\\", "/") == "page: a/report.html\npage: b/circuits.html\n"
    assert command("render").returncode == 2


def test_ctrl_c_ends_with_status_130_and_says_what_to_do(command, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsary.training.run.harvest", interrupted)
    stopped = command("harvest", "recipe.yaml")
    assert stopped.returncode == 130
    assert stopped.stderr.endswith("Stopped. What was complete is saved; the same command continues.\n")


def test_the_console_script_runs_as_a_process_of_its_own(tmp_path):
    run = [sys.executable, "-m", "sparsary", "train", str(tmp_path / "none.yaml")]
    failed = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("sparsary: ")
    assert "none.yaml: expected a recipe file" in failed.stderr


def test_help_is_quick_and_lists_the_commands(command):
    shown = command("--help")
    assert shown.returncode == 0
    for name in ("harvest", "train", "eval", "info"):
        assert name in shown.stdout
    heavy = "import sys; sys.argv = ['sparsary', '--help']; import sparsary\ntry: sparsary.main()\nexcept SystemExit: pass\n"
    heavy += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.endswith("False\n")


def test_probe_writes_flat_results_and_names_its_tasks(command, tmp_path):
    out = str(tmp_path / "d")
    hook, text = "transformer.h.2:out", {"source": "embedded", "context_length": 32}
    SAE(128, 67, build_encoder({"name": "topk", "k": 5})).save(
        out, {"hook": hook, "model": {"id": "embedded"}, "text": text, "harvest": {"heldout": 0.05}}
    )
    unknown = command("probe", out, "--task", "factor")
    assert unknown.returncode == 2
    assert "expected one of factors, supervised, sparse_probing, scr, tpp, absorption" in unknown.stderr
    assert "Did you mean 'factors'?" in unknown.stderr
    lines = [{"text": f"The {word} waits .", "label": word} for word in ("boy", "dog", "king") for _ in range(9)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = [part for task in ("sparse_probing", "tpp", "absorption") for part in ("--task", task)]
    judged = command("probe", out, *tasks, "--labels", str(tmp_path / "words.jsonl"))
    assert judged.returncode == 0, judged.stderr
    assert "sparse probing" in judged.stdout
    found = json.loads((Path(out) / "probing" / "probing.json").read_text())
    assert found["probing_version"] == 1
    assert found["sparse_probing_llm_test_accuracy"] == 1
    assert found["tpp_done"]
    assert all(isinstance(value, str | int | float | bool | None) for value in found.values())
    assert json.loads((Path(out) / "probing" / "tpp.json").read_text())["eval_type_id"] == "tpp"
    refused = command("probe", out, "--task", "scr", "--labels", str(tmp_path / "words.jsonl"))
    assert refused.returncode == 2
    assert "a second key, spurious" in refused.stderr
