"""The command line and the facade, as a user meets them."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
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
    path, out, store = (
        write_recipe(recipe_values | {"eval_tokens": 600}),
        recipe_values["out_dir"],
        recipe_values["harvest"]["store"],
    )
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
    assert "topk, k 5 " in judged.stdout
    assert '{"' not in judged.stdout
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
    recipe_values["harvest"]["tokens"] = 700
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
        assert f"Evaluate it with: sparsary eval {recipe_values['out_dir']}/k={k}" in trained.stdout
    assert command("info", f"{recipe_values['out_dir']}/k=3").returncode == 0


def test_a_stack_by_layer_and_site_is_planned_harvested_trained_told_and_loaded(command, recipe_values, write_recipe):
    del recipe_values["harvest"]["hooks"]
    recipe_values["harvest"]["tokens"] = 700
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
    recipe_values["harvest"]["tokens"] = 700
    assert command("harvest", write_recipe(recipe_values)).returncode == 0
    shard = Path(recipe_values["harvest"]["store"]) / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    described = command("info", recipe_values["harvest"]["store"])
    assert described.returncode == 2
    assert "train-00000.safetensors" in described.stderr
    assert "1 damaged" in described.stdout


def test_the_facade(recipe_values, write_recipe, no_page):
    recipe_values["harvest"]["tokens"] = 2000
    path = write_recipe(recipe_values | {"eval_tokens": 600})
    store = sparsary.harvest(path, **{"dictionary.n_latents": 71})
    assert store.tokens("train") >= 1800
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


# Where each command meets a layer: what is made to fail there.
SEAMS = {
    "sae": ("sparsary.training.info.read_config", ["info", "DICTIONARY"]),
    "sae, converting": ("sparsary.sae.checkpoint_files.write_json", ["convert", "DICTIONARY", "NEW"]),
    "transcoders": ("sparsary.transcoders.convert.convert", ["convert", "DICTIONARY", "NEW"]),
    "recipe": ("sparsary.training.recipe.grid.load_grid", ["train", "RECIPE"]),
    "plan": ("sparsary.training.preflight.plan_all", ["train", "RECIPE", "--dry-run"]),
    "model": ("transformers.AutoTokenizer.from_pretrained", ["harvest", "RECIPE"]),
    "harvest": ("sparsary.training.activations.harvest.rows_of", ["harvest", "RECIPE"]),
    "harvest's writer": ("sparsary.training.activations.store_writer.encode", ["harvest", "RECIPE"]),
    "stream": ("sparsary.training.activations.store_stream.StoreStream.rows_at", ["train", "RECIPE", "harvest.tokens=700"]),
    "loop": ("sparsary.training.loop.step", ["train", "RECIPE", "harvest.tokens=700", "tokens=202"]),
    "calibration": ("sparsary.training.run.finish", ["train", "RECIPE", "harvest.tokens=700", "tokens=202"]),
    "eval": ("sparsary.eval.report.evaluate.evaluate_all", ["eval", "DICTIONARY"]),
    "features": ("sparsary.eval.features.run.features", ["features", "DICTIONARY"]),
    "probe": ("sparsary.eval.probing.run.probe", ["probe", "DICTIONARY"]),
    "circuits": ("sparsary.eval.circuits.benchmark.circuits", ["circuits", "DICTIONARY"]),
    "compare": ("sparsary.eval.compare.run.compare", ["compare", "DICTIONARY"]),
    "render": ("sparsary.eval.pages.render.render_file", ["render", "report.json"]),
}
UNFORESEEN = [
    RuntimeError("CUDA error: an illegal\n  memory access\n"),
    KeyError("hidden_size"),
    AttributeError("'NoneType' object has no attribute 'shape'"),
    ZeroDivisionError(),
    AssertionError(),
    MemoryError("no"),
    RecursionError("too deep"),
    ImportError("libfoo.so.1: cannot open shared object file"),
    ModuleNotFoundError("No module named 'foo'", name="foo"),
    type("TheirError", (Exception,), {})("\u2603" * 2000),
]


@pytest.mark.parametrize("seam", SEAMS)
def test_no_traceback_reaches_a_user(command, recipe_values, write_recipe, tmp_path, monkeypatch, seam):
    """Whatever fails, wherever: one line with what was being done, the library's error, the log and --debug; status 1."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target, arguments = SEAMS[seam]
    recipe, dictionary = write_recipe(recipe_values), str(tmp_path / "d")
    SAE(128, 67, build_encoder({"name": "topk", "k": 5})).save(dictionary, {"hook": "transformer.h.2:out"})
    paths = {"RECIPE": recipe, "DICTIONARY": dictionary, "NEW": str(tmp_path / "new")}
    arguments = [paths.get(argument, argument) for argument in arguments]
    # Slow ones are thrown at some seams only: the handler is the same.
    errors = UNFORESEEN if seam in ("render", "eval", "sae") else [UNFORESEEN[list(SEAMS).index(seam) % len(UNFORESEEN)]]
    for error in errors:

        def failing(*_arguments, error=error, **_options):
            raise error

        monkeypatch.setattr(target, failing)
        failed = command(*arguments)
        monkeypatch.undo()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert failed.returncode == 1, failed.stderr
        last = failed.stderr.rstrip().splitlines()[-1]
        assert last.startswith("sparsary: while "), last
        assert f"{type(error).__name__}" in last
        assert " ".join(str(error).split())[:100] in last
        assert "--debug shows the traceback" in last
        assert "Traceback" not in failed.stderr + failed.stdout
        log = Path(re.search(r"\(log: (.*?); --debug", last)[1])
        assert "Traceback" in log.read_text()
        assert arguments[0] in log.read_text()


def test_what_was_being_done_is_the_innermost_note(command, recipe_values, write_recipe, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("kernel panic")

    monkeypatch.setattr("sparsary.training.activations.harvest.rows_of", failing)
    failed = command("harvest", write_recipe(recipe_values))
    assert failed.stderr.startswith(
        f"sparsary: while harvesting into {recipe_values['harvest']['store']}: RuntimeError: kernel"
    )


def test_debug_shows_the_traceback_wherever_it_stands(command, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("kernel panic")

    monkeypatch.setattr("sparsary.training.run.harvest", failing)
    for arguments in (["--debug", "harvest", "r.yaml"], ["harvest", "r.yaml", "--debug"], ["harvest", "--debug", "r.yaml"]):
        failed = command(*arguments)
        assert failed.returncode == 1
        assert "Traceback" in failed.stderr
        assert (
            failed.stderr.rstrip().splitlines()[-1].startswith("sparsary: while running sparsary harvest r.yaml: RuntimeError")
        )
    assert "--debug" in command("--help").stdout


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        ("ENOSPC", "Free space"),
        ("EDQUOT", "quota"),
        ("EACCES", "writable"),
        ("EROFS", "can be written"),
        ("EIO", "Check the disk"),
    ],
)
def test_errors_of_the_disk_name_the_file_and_what_helps(command, monkeypatch, number, helps):
    code = getattr(errno, number)

    def failing(*_, **__):
        raise OSError(code, os.strerror(code), "runs/x/state")

    monkeypatch.setattr("sparsary.training.run.harvest", failing)
    failed = command("harvest", "r.yaml")
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"sparsary: runs/x/state: {os.strerror(code)}. ")
    assert helps in failed.stderr
    assert "Errno" not in failed.stderr


def test_a_library_s_value_error_says_what_was_being_done(command, monkeypatch):
    def failing(*_, **__):
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr("sparsary.training.run.harvest", failing)
    failed = command("harvest", "r.yaml")
    assert failed.returncode == 2
    assert failed.stderr.startswith("sparsary: while running sparsary harvest r.yaml: ValueError: not enough values")


PAGES = """
import sys, types
sys.argv = ["sparsary", "render", "x.json"]
# The pages' module would load torch and matplotlib.
played = types.ModuleType("sparsary.eval.pages.render")
played.render_file = lambda path: "y" * 100_000
sys.modules[played.__name__] = played
import sparsary
sparsary.main()
"""


def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    run = [sys.executable, "-c", PAGES]
    ended = subprocess.run(run, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(writer)
    # Its library ends it with 1 where it is a print that fails, we with 141 where it is the last flush.
    assert (ended.returncode in (1, 141), ended.stderr) == (True, "render: loading x.json\n")


def test_characters_that_a_terminal_lacks_do_not_end_a_command():
    run = [sys.executable, "-c", PAGES.replace('"y"', '"\\u2603"')]
    ended = subprocess.run(run, capture_output=True, cwd=ROOT, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ended.stdout == b"page: " + rb"\u2603" * 100_000 + b"\n"


def test_the_console_script_runs_as_a_process_of_its_own(tmp_path):
    run = [sys.executable, "-m", "sparsary", "train", str(tmp_path / "none.yaml")]
    failed = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    first, last = failed.stderr.splitlines()
    assert first == f"train: loading recipe {tmp_path / 'none.yaml'}"
    assert last.startswith("sparsary: ")
    assert "none.yaml: expected a recipe file" in last


FIRST_LINE = """
import io, sys

class Watched(io.StringIO):
    def write(self, text):
        if text.strip() and not self.getvalue():
            print(text.strip(), "|", *sorted({"torch", "transformers", "numpy", "scipy"} & sys.modules.keys()), flush=True)
        return super().write(text)

sys.stderr = Watched()
sys.argv = ["sparsary", *ARGUMENTS]
import sparsary
sparsary.main()
"""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train none.yaml", "train: loading recipe none.yaml"),
        ("harvest none.yaml lr=1", "harvest: loading recipe none.yaml"),
        ("eval none/a none/b", "eval: loading none/a, none/b"),
        ("compare none/a none/b", "compare: loading none/a, none/b"),
        ("render none.json", "render: loading none.json"),
        ("bench step --shape none", "bench step: loading torch"),
    ],
)
def test_the_first_line_is_written_before_torch_is_imported(arguments, line):
    script = FIRST_LINE.replace("*ARGUMENTS", f"*{arguments.split()}")
    # The import that comes next is refused: it would take seconds.
    script = "import sys; sys.modules['torch'] = None\n" + script.replace('{"torch", ', "{")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout == f"{line} |\n", run.stderr


@pytest.mark.parametrize("name", ["features", "probe", "circuits", "info", "convert"])
def test_every_command_starts_with_a_line(command, caplog, name, tmp_path):
    caplog.set_level(logging.INFO)
    source = str(tmp_path / "none")
    failed = command(name, source, *([str(tmp_path / "new")] if name == "convert" else []))
    assert failed.returncode == 2
    assert caplog.messages[0] == f"{name}: loading {source}"


def test_the_version_is_shown_without_torch():
    run = "import sys; sys.argv = ['sparsary', '--version']; import sparsary\ntry: sparsary.main()\nexcept SystemExit: pass\n"
    run += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown == f"sparsary {sparsary.__version__}\nFalse\n"


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
    assert "expected one of factors, infomec, supervised, sparse_probing, bottleneck, scr, tpp, absorption" in unknown.stderr
    assert "Did you mean 'factors'?" in unknown.stderr
    lines = [{"text": f"The {word} waits .", "label": word} for word in ("boy", "dog", "king") for _ in range(9)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = [part for task in ("sparse_probing", "tpp", "absorption") for part in ("--task", task)]
    judged = command("probe", out, *tasks, "--labels", str(tmp_path / "words.jsonl"))
    assert judged.returncode == 0, judged.stderr
    assert re.search(r"sparse probing accuracy +top 1 +top 2 +top 5 .*all\n", judged.stdout)
    assert re.search(r"\nlatents +[01]", judged.stdout)
    assert re.search(r"absorption +labels +fraction +full +latents\n", judged.stdout)
    assert not re.search(r"\d\.\d{7}", judged.stdout)
    found = json.loads((Path(out) / "probing" / "probing.json").read_text())
    assert found["probing_version"] == 1
    assert found["sparse_probing_llm_test_accuracy"] == 1
    assert found["tpp_done"]
    assert all(isinstance(value, str | int | float | bool | None) for value in found.values())
    assert json.loads((Path(out) / "probing" / "tpp.json").read_text())["eval_type_id"] == "tpp"
    refused = command("probe", out, "--task", "scr", "--labels", str(tmp_path / "words.jsonl"))
    assert refused.returncode == 2
    assert "a second key, spurious" in refused.stderr


def test_hooks_of_a_model_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparsary", "hooks", "embedded", "--layer", "2"])
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    (line,) = [line for line in said.out.splitlines() if line.startswith("transformer.h.2:out ")]
    assert line.split()[1:] == ["2", "128", "resid_post"]
    assert "transformer.h.1:out" not in said.out
    monkeypatch.setattr(sys, "argv", ["sparsary", "hooks", "embedded", "--layer", "9"])
    with pytest.raises(SystemExit):
        sparsary.main()
    assert "--layer: expected 0 to 3, got 9." in capsys.readouterr().err
