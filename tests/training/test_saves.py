"""Saves are written while training continues: what they hold, how they fail, and that nothing is left of them."""

import errno
import json
import shutil
import threading
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparsary.sae import errors, load_dictionary
from sparsary.training import members
from sparsary.training import preflight as preflight_module
from sparsary.training import run as run_module
from sparsary.training import snapshot as snapshot_module
from sparsary.training.objective import Objective
from sparsary.training.preflight import preflight
from sparsary.training.recipe import check_recipe
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train
from sparsary.training.signals import Stopped, StopRequest
from sparsary.training.snapshot import Snapshot
from sparsary.training.state import StateContents
from sparsary.training.training_plan import grid_lines

D, TOKENS, STEPS = 11, 48, 12
TOPK = {"name": "topk", "k": 3}
CROSS_LAYER = {"hook_in": ["a:out", "b:out"], "hook_out": ["c:out", "d:out"]}
# Dictionaries whose parts are named differently in a state and in a dictionary's own file.
KINDS = {
    "sae": {"dictionary": {"n_latents": 17, "encoder": TOPK}},
    "batch_wide": {"dictionary": {"n_latents": 17, "encoder": {"name": "batch_topk", "k": 3}}},
    "phases": {
        "dictionary": {"n_latents": 17, "encoder": {"name": "jumprelu", "target_l0": 3}},
        "phases": [{"start": 0.3, "blend": 0.4, "encoder": {"name": "batch_topk", "k": 3}}],
    },
    "cross_layer": {"dictionary": {"kind": "cross_layer_transcoder", "n_latents": 17, "encoder": TOPK, **CROSS_LAYER}},
}


class Immediate(Executor):
    """Writer that is done before training continues."""

    def submit(self, function, /, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        return future


class Latest(Executor):
    """Writer as slow as can be: it begins to write when it is waited for."""

    class Job(Future):
        def __init__(self, work):
            super().__init__()
            self.work = work

        def result(self, timeout=None):
            return self.work()

    def submit(self, function, /, *arguments):
        return self.Job(lambda: function(*arguments))


@pytest.fixture
def recipe(tmp_path):
    return {
        "tokens": TOKENS * STEPS,
        "batch_tokens": TOKENS,
        "lr_warmup_steps": 2,
        "dead_after_tokens": 3 * TOKENS,
        "log_every": 1,
        "save_every": 2,
        "calibration_tokens": 200,
        "out_dir": str(tmp_path / "run"),
        **KINDS["sae"],
    }


def rows(kind="sae"):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(700, 2 * D, generator=generator)
    return [(part, part.flip(1) + 1) for part in x.split(100)] if kind == "cross_layer" else x[:, :D]


def written_by(monkeypatch, writer):
    monkeypatch.setattr(run_module, "ThreadPoolExecutor", lambda *_: writer())


def state_of(directory):
    path = Path(directory) / "state.safetensors"
    with safe_open(path, "pt") as handle:
        counters = json.loads(handle.metadata()["counters"])
    # Lines of the log contain speeds, whose digits differ in number.
    del counters["metrics_bytes"], counters["metrics_crc32"]
    return counters, load_file(path)


def assert_equal_states(first, second):
    (counters, tensors), (others, other) = state_of(first), state_of(second)
    assert counters == others
    assert tensors.keys() == other.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], other[name])]


def no_thread_is_left():
    return not [thread.name for thread in threading.enumerate() if thread.name.startswith("sparsary-save")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_is_of_one_step_however_long_training_goes_on_meanwhile(recipe, kind, tmp_path, monkeypatch):
    """State and dictionary, of a writer slower than ``save_every``, against one that keeps training waiting."""
    write, kept = members.Checkpoints._write, {}

    def keeping(self, state, contents, config, usage):
        write(self, state, contents, config, usage)
        step = contents.counters["step"]
        assert config["provenance"]["training_steps"] == step
        kept[writer.__name__, step] = shutil.copytree(self.directory, tmp_path / "kept" / f"{writer.__name__}-{step}")

    monkeypatch.setattr(members.Checkpoints, "_write", keeping)
    for writer in (Immediate, Latest):
        written_by(monkeypatch, writer)
        train(recipe | KINDS[kind] | {"out_dir": str(tmp_path / writer.__name__)}, rows(kind))
    assert sorted(step for name, step in kept if name == "Latest") == list(range(2, STEPS + 1, 2))
    for step in range(2, STEPS + 1, 2):
        first, second = kept["Immediate", step], kept["Latest", step]
        assert_equal_states(first, second)
        one, other = load_dictionary(first), load_dictionary(second)
        assert not [n for n, t in one.state_dict().items() if not torch.equal(t, other.state_dict()[n])]
        saved = load_file(second / "state.safetensors")
        assert torch.equal(other.training_usage.silent_for, saved["silent_for"])
        for name, tensor in other.state_dict().items():
            if not name.startswith("encoder."):
                assert torch.equal(tensor, saved[f"dictionary/{name}"]), name
    assert_equal_states(tmp_path / "Immediate", tmp_path / "Latest")


def test_training_is_not_held_while_a_state_is_written(recipe, monkeypatch):
    """Steps are taken during a write. The writer waits for them, so that a loop which waited would never end."""
    begun, stepped, seen = threading.Event(), threading.Event(), []
    write, step = StateContents.write, members.TrainState.advance

    def slow(self, directory):
        seen.append(threading.current_thread().name)
        begun.set()
        assert stepped.wait(600)
        write(self, directory)

    def advance(self, tokens, terms):
        step(self, tokens, terms)
        if begun.is_set():
            stepped.set()

    monkeypatch.setattr(StateContents, "write", slow)
    monkeypatch.setattr(members.TrainState, "advance", advance)
    # No other save: the end of training would be waited for.
    train(recipe | {"save_every": STEPS // 2}, rows())
    assert len(seen) == 2
    assert all(name.startswith("sparsary-save") for name in seen)
    assert no_thread_is_left()


@pytest.mark.parametrize("fails_at", [2, 6, STEPS])
def test_a_write_that_fails_ends_the_run_with_the_step_that_is_kept(recipe, monkeypatch, fails_at):
    write = StateContents.write

    def full(self, directory):
        if self.counters["step"] == fails_at:
            with errors.writing(directory / "state.safetensors"):
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, directory)

    written_by(monkeypatch, Immediate)
    monkeypatch.setattr(StateContents, "write", full)
    kept = f"The state of step {fails_at - 2} is kept." if fails_at > 2 else "No state had been saved."
    message = rf"state\.safetensors: could not be written \(No space left on device\)\. {kept} Free space on that disk; then"
    with pytest.raises(errors.WriteError, match=message):
        train(recipe, rows())
    lines = (Path(recipe["out_dir"]) / "metrics.jsonl").read_text().splitlines()
    # The step after the save is the last.
    assert json.loads(lines[-1])["step"] == fails_at
    monkeypatch.undo()
    train(recipe, rows())
    assert_equal_states(recipe["out_dir"], train(recipe | {"out_dir": recipe["out_dir"] + "-whole"}, rows()))


def test_a_dictionary_that_is_not_written_leaves_the_state_of_its_step(recipe, monkeypatch):
    real, times = members.Checkpoints._write.__globals__["write_dictionary_files"], []

    def full(directory, *contents):
        times.append(directory)
        if len(times) == 3:
            with errors.writing(directory / "dictionary.safetensors"):
                raise OSError(errno.ENOSPC, "No space left on device")
        real(directory, *contents)

    monkeypatch.setitem(members.Checkpoints._write.__globals__, "write_dictionary_files", full)
    with pytest.raises(errors.WriteError, match=r"dictionary\.safetensors: .* The state of step 6 is kept\."):
        train(recipe, rows())
    assert state_of(recipe["out_dir"])[0]["step"] == 6
    assert no_thread_is_left()


def test_a_stop_waits_for_the_writer(recipe, monkeypatch):
    asked = []

    def requested(stop):
        asked.append(1)
        stop.signal_number = 15 if len(asked) > 5 else None
        return stop.signal_number is not None

    written_by(monkeypatch, Latest)
    monkeypatch.setattr(StopRequest, "requested", property(requested))
    with pytest.raises(Stopped, match="step 5"):
        train(recipe, rows())
    assert state_of(recipe["out_dir"])[0]["step"] == 5
    assert load_dictionary(recipe["out_dir"]).provenance["training_steps"] == 5


@pytest.mark.parametrize("log_every", [1, STEPS])
def test_a_loss_that_is_not_finite_names_the_step_whose_write_was_under_way(recipe, monkeypatch, log_every):
    forward, steps = Objective.forward, []

    def exploding(self, batch, usage):
        loss, terms = forward(self, batch, usage)
        steps.append(1)
        if len(steps) == 5:
            terms.named["loss"] = loss.detach() * float("inf")
        return loss, terms

    written_by(monkeypatch, Latest)
    monkeypatch.setattr(Objective, "forward", exploding)
    with pytest.raises(ValueError, match=r"loss: not finite between steps 4 and [56].*step 4 is kept"):
        train(recipe | {"log_every": log_every}, rows())
    assert state_of(recipe["out_dir"])[0]["step"] == 4


def test_no_thread_is_left_by_a_run_that_ends_otherwise(recipe, monkeypatch):
    """Here by an error between a save and the next."""
    advance = members.TrainState.advance

    def failing(self, tokens, terms):
        advance(self, tokens, terms)
        if self.step == 5:
            raise RuntimeError("device lost")

    monkeypatch.setattr(members.TrainState, "advance", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        train(recipe, rows())
    assert no_thread_is_left()
    assert state_of(recipe["out_dir"])[0]["step"] == 4
    monkeypatch.undo()
    train(recipe, rows())
    assert_equal_states(recipe["out_dir"], train(recipe | {"out_dir": recipe["out_dir"] + "-whole"}, rows()))


def test_without_memory_for_a_copy_training_waits_for_its_saves(recipe, monkeypatch):
    class Forbidden(Executor):
        def submit(self, function, /, *arguments):
            raise AssertionError("written apart")

    whole = train(recipe, rows())
    written_by(monkeypatch, Forbidden)
    monkeypatch.setattr(snapshot_module, "free_bytes", lambda device: 1000)
    assert_equal_states(whole, train(recipe | {"out_dir": recipe["out_dir"] + "-waiting"}, rows()))


def test_a_copy_is_of_its_moment_and_reuses_its_memory():
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(3)}
    snapshot = Snapshot()
    first = snapshot.take(tensors)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["a"].add_(1)
    assert all(torch.equal(first[name], wanted[name]) for name in wanted)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = snapshot.take(tensors | {"c": torch.ones(2)})
    assert torch.equal(second["a"], tensors["a"])
    assert {name: second[name].data_ptr() for name in places} == places
    assert second["a"].is_contiguous()


def test_a_copy_fits_if_its_memory_is_free_or_its_own(monkeypatch):
    tensors, snapshot = {"a": torch.ones(100)}, Snapshot()
    monkeypatch.setattr(snapshot_module, "free_bytes", lambda device: 399)
    assert not snapshot.fits(tensors)
    monkeypatch.setattr(snapshot_module, "free_bytes", lambda device: 400)
    assert snapshot.fits(tensors)
    snapshot.take(tensors)
    monkeypatch.setattr(snapshot_module, "free_bytes", lambda device: 0)
    assert snapshot.fits(tensors)


def test_the_plan_says_whether_saves_hold_training_up(recipe_values, monkeypatch):
    recipe = resolve_recipe(check_recipe(recipe_values, "recipe"))
    plan = preflight(recipe)
    size = 12 * plan.parameters + 16 * 67
    assert plan.snapshot_bytes == size
    grid = check_grid(recipe_values, "recipe")
    shown = dict(grid_lines(grid, [recipe], [plan]))["saving"]
    assert shown == f"while training continues, from a copy of its state: {size / 1000:.1f} KB more"
    for free, waits in ((plan.memory_bytes + size, False), (plan.memory_bytes + size - 1, True)):
        monkeypatch.setattr(preflight_module, "free_bytes", lambda device, free=free: free)
        found = preflight(recipe)
        assert found.waits_for_saves == waits
        assert dict(grid_lines(grid, [recipe], [found]))["saving"].startswith("training waits for each save") == waits
