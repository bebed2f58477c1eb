"""Runs of several processes, started by torch's launcher or forked, against runs of one."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sparsary
from sparsary.training import processes
from sparsary.training.checkpoints import require_same_run
from sparsary.training.recipe import check_recipe

WORKER = Path(__file__).with_name("train_on_ranks.py")
# The same as the worker, for processes that need not import everything anew.
TRAINED = """
import runpy
import sparsary
from sparsary.training import processes
activations = runpy.run_path(worker)["activations"]()
for directory, recipe in runs:
    sparsary.train(recipe, [activations], out_dir=directory)
processes.leave()
"""
STEPS = 30
# One of each way to choose latents: by token, over the batch, by gradients, by thresholds.
FEW = ("topk", "mutual_choice", "gradient_topk", "jumprelu")


def recipe(encoder, latents=1, **changes):
    return {
        "harvest": {"gradients": True},
        "dictionary": {"n_latents": 32, "encoder": encoder, "hook": "a:out"},
        "tokens": 48 * STEPS,
        "batch_tokens": 48,
        "dead_after_tokens": 300,
        "auxk_latents": 4,
        "log_every": 5,
        "save_every": 10,
        "distributed": {"latents": latents},
    } | changes


def on_ranks(processes, directory, recipes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(WORKER)]
    done = subprocess.run([*command, str(directory), *map(json.dumps, recipes)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [directory / str(number) for number in range(len(recipes))]


def worker():
    spec = importlib.util.spec_from_file_location("train_on_ranks", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_ranks(load_beside, embedded_model):
    """Return the function that forks ranks from a server, which imports what is imported here: the model's libraries too."""
    return load_beside("rank_processes").run_ranks


@pytest.fixture(scope="module")
def activations():
    return worker().activations()


@pytest.fixture(scope="module")
def alone(activations, encoder_specs, tmp_path_factory):
    """Return a function that trains the encoder of a test id in one process, once."""
    directory, specs = tmp_path_factory.mktemp("alone"), {encoder_specs.spec_id(spec): spec for spec in encoder_specs.STARTED}

    @functools.cache
    def train(name):
        return sparsary.train(recipe(specs[name]), [activations], out_dir=str(directory / name))

    return train


def assert_same_run(one, other):
    """The weights agree to float32 rounding, and the log says the same."""
    first, second = (sparsary.load(directory).state_dict() for directory in (one, other))
    for name, tensor in first.items():
        # Adam divides by the root of squared gradients: rounding is a share of a step, not of the weight.
        torch.testing.assert_close(
            second[name], tensor, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{other}: {name}: {text}"
        )
    logs = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (one, other)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for mine, theirs in zip(*logs, strict=True):
        for key in ("fvu", "l0", "dead", "loss"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("processes", "latents", "names"),
    [(2, 1, FEW), (2, 1, None), (2, 2, None), (4, 2, None)],
    ids=["two, few", "two", "two for the latents", "four"],
)
def test_several_processes_train_as_one(alone, encoder_specs, tmp_path, run_ranks, processes, latents, names):
    """Every save compares the ranks' weights bit by bit, so that the run would have ended if they differed."""
    specs = [spec for spec in encoder_specs.STARTED if latents == 1 or spec in encoder_specs.DIVIDED]
    specs = [spec for spec in specs if names is None or spec["name"] in names]
    recipes = [recipe(spec, latents) for spec in specs]
    if names is None:
        found = on_ranks(processes, tmp_path, recipes)
    else:
        found = [tmp_path / str(number) for number in range(len(recipes))]
        runs = [(str(directory), values) for directory, values in zip(found, recipes, strict=True)]
        assert run_ranks(processes, TRAINED, {"worker": str(WORKER), "runs": runs}) == [0] * processes
    for spec, directory in zip(specs, found, strict=True):
        assert_same_run(alone(encoder_specs.spec_id(spec)), directory)


# Encoders of crosscoders; their two sites are the activations, and the same in another order of columns.
CROSSCODED = ("topk", "batch_topk", "jumprelu", "relu")


@pytest.mark.parametrize("latents", [1, 2])
def test_several_processes_train_crosscoders_as_one(activations, encoder_specs, tmp_path, latents):
    section = {"kind": "crosscoder", "hook": None, "hooks": ["a:out", "b:out"]}
    runs = []
    for spec in encoder_specs.STARTED:
        if spec["name"] in CROSSCODED and (latents == 1 or spec in encoder_specs.DIVIDED):
            values = recipe(spec, latents, harvest={})
            runs.append(values | {"dictionary": values["dictionary"] | section})
    assert len(runs) > 1
    x = worker().side_by_side(activations[0])
    for number, (values, directory) in enumerate(zip(runs, on_ranks(2, tmp_path, runs), strict=True)):
        one = sparsary.train(values | {"distributed": {"latents": 1}}, [x], out_dir=str(tmp_path / f"one{number}"))
        assert_same_run(one, directory)


def test_a_run_continues_on_another_mesh(activations, tmp_path):
    encoder = {"name": "topk", "k": 3}
    # The schedule is that of the whole run, whose second half is added afterwards.
    half = recipe(encoder, tokens=48 * STEPS // 2, lr_decay=0.0, lr_warmup_steps=0)
    whole = half | {"tokens": 48 * STEPS}
    one = sparsary.train(whole, [activations], out_dir=str(tmp_path / "one"))
    (two,) = on_ranks(2, tmp_path / "two", [half | {"distributed": {"latents": 2}}])
    on_ranks(2, tmp_path / "two", [whole])
    assert_same_run(one, two)
    (three,) = on_ranks(2, tmp_path / "three", [half])
    assert_same_run(one, sparsary.train(whole, [activations], out_dir=str(three)))


def test_a_start_is_taken_over_by_several_processes_as_by_one(activations, alone, encoder_specs, tmp_path):
    """With more latents, whose directions and biases come from a sample that every process draws, and another encoder."""
    old = next(encoder_specs.spec_id(spec) for spec in encoder_specs.STARTED if spec["name"] == "topk")
    section = {"start": str(alone(old)), "n_latents": 40, "encoder": {"name": "batch_topk"}, "hook": "a:out"}
    runs = [recipe(None, latents) | {"dictionary": section} for latents in (1, 2)]
    one = sparsary.train(runs[0], [activations], out_dir=str(tmp_path / "one"))
    record = sparsary.load(one).provenance["start"]
    for directory in on_ranks(2, tmp_path, runs):
        assert_same_run(one, directory)
        found = sparsary.load(directory).provenance["start"]
        for when in ("as_read", "before", "after"):
            assert found[when] == pytest.approx(record[when], rel=1e-3)
        assert found["content"] == record["content"]


def test_what_another_rank_is_about_to_write_is_no_other_run(tmp_path):
    """Ranks look at the folder while the first one locks it and writes the recipe; a kill leaves such files behind."""
    new = check_recipe(recipe({"name": "topk", "k": 3}, out_dir=str(tmp_path)), "recipe")
    for name in (".lock", ".recipe.yaml.12-ab.partial", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / ".sparsary-probe").mkdir()
    assert require_same_run(tmp_path, new) is None
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="got other files"):
        require_same_run(tmp_path, new)


# Runs without a store, all in one group of two processes.
LIVE_RUNS = """
import sparsary
from sparsary.training import processes
for directory, recipe in runs:
    sparsary.train(recipe, out_dir=directory)
processes.leave()
"""
HOOK = "transformer.h.1:out"
LAYERS = {"kind": "cross_layer_transcoder", "hook": None, "layers": "all", "site": "mlp", "n_latents": 16}
LIVE = {
    "live": {},
    "live, latents": {"distributed": {"latents": 2}},
    "live, gradients in micro-batches": {
        "dictionary": {"encoder": {"name": "gradient_topk", "k": 4, "beta": 0.5}},
        "harvest": {"gradients": True},
        "accumulate": 2,
    },
    "live, layers together": {
        "harvest": {"hooks": []},
        "dictionary": LAYERS | {"joint": True},
        "distributed": {"latents": 2},
    },
    "crosscoder, latents": {
        "harvest": {"hooks": []},
        "dictionary": {
            "kind": "crosscoder",
            "hook": None,
            "hooks": ["transformer.h.0:out", HOOK, "transformer.h.2.mlp.c_proj:in"],
            "encoder": {"name": "batch_topk", "k": 4},
        },
        "distributed": {"latents": 2},
    },
    # The second model with another hook stands for a tuned one.
    "crosscoder of two models": {
        "models": ["embedded", "embedded"],
        "harvest": {"hooks": []},
        "dictionary": {"kind": "crosscoder", "hook": None, "hooks": [HOOK, "transformer.h.2:out"]},
    },
    "kl, latents": {"objective": "kl", "distributed": {"latents": 2}},
    "kl of prefixes": {"objective": "kl", "dictionary": {"encoder": {"name": "matryoshka", "k": 4}}},
    "kl from the middle": {"phases": [{"start": 0.5, "objective": "kl", "reconstruction_weight": 0.5}]},
}


def live_recipe(changes):
    values = {
        "text": {"context_length": 32},
        "harvest": {"hooks": [HOOK], "store": None, "live_buffer_tokens": 500, "batch_contexts": 5},
        "dictionary": {"hook": HOOK, "n_latents": 64, "encoder": {"name": "topk", "k": 4}},
        "tokens": 92 * 8,
        "batch_tokens": 92,
        "lr": 1e-3,
        "lr_warmup_steps": 0,
        "calibration_tokens": 600,
        "log_every": 2,
        "save_every": 3,
    }
    return values | {key: values[key] | value if key in ("harvest", "dictionary") else value for key, value in changes.items()}


@pytest.fixture(scope="module")
def live_runs(request, run_ranks, tmp_path_factory):
    """Directories of a run in one process and in two, by case; one is continued by two that one began."""
    # Those cases only that are tested.
    chosen = {
        item.callspec.params["name"] for item in request.session.items if "live_runs" in getattr(item, "fixturenames", ())
    }
    folder, apart, runs = tmp_path_factory.mktemp("live"), {}, []
    for number, (name, changes) in enumerate(LIVE.items()):
        if name in chosen:
            apart[name] = str(folder / f"one{number}"), str(folder / f"two{number}")
            sparsary.train(live_recipe(changes) | {"distributed": {"latents": 1}}, out_dir=apart[name][0])
            runs.append((apart[name][1], live_recipe(changes)))
    if "continued" in chosen:
        # The shorter run begins with the sample of the longer one.
        begun = live_recipe({"lr_decay": 0.0, "tokens": 92 * 4, "calibration_tokens": 300})
        apart["continued"] = str(folder / "whole"), str(folder / "begun")
        sparsary.train(begun | {"tokens": 92 * 8}, out_dir=apart["continued"][0])
        sparsary.train(begun, out_dir=apart["continued"][1])
        runs.append((apart["continued"][1], begun | {"tokens": 92 * 8}))
    assert run_ranks(2, LIVE_RUNS, {"runs": runs}) == [0, 0]
    return apart


@pytest.mark.parametrize("name", [*LIVE, "continued"])
def test_two_processes_that_share_the_language_model_train_as_one(live_runs, name):
    assert_same_run(*map(Path, live_runs[name]))


def test_a_process_that_ends_leaves_its_group(monkeypatch):
    """Threads of a group that is open when Python ends may abort the process."""
    registered = []
    monkeypatch.setattr(processes.atexit, "register", registered.append)
    monkeypatch.setattr(processes, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    processes.leave()
    try:
        processes.own_ranks()
        assert dist.is_initialized()
        for function in registered:
            function()
        assert not dist.is_initialized()
    finally:
        processes.leave()
