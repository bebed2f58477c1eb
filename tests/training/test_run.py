"""Whole runs: determinism, resume, refusal, and what a run leaves behind."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsary
from sparsary.sae import errors, files, load_dictionary
from sparsary.training import members, resolve_hooks
from sparsary.training import preflight as preflight_module
from sparsary.training import run as run_module
from sparsary.training.activations.shards import ActivationStore
from sparsary.training.locks import locked
from sparsary.training.preflight import preflight
from sparsary.training.recipe import check_recipe
from sparsary.training.report import TrainingLog
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import run_harvest, train, train_recipe
from sparsary.training.signals import Stopped, StopRequest


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("stores") / "shared")


@pytest.fixture
def values(recipe_values, shared_store):
    """The small recipe, over one store for all tests of this file."""
    recipe_values["harvest"]["store"] = shared_store
    return recipe_values


def run(values, **changes):
    return train_recipe(resolve_recipe(check_recipe(values | changes, "recipe")))


def final_state(directory):
    return load_file(Path(directory) / "state.safetensors")


def assert_equal_runs(a, b):
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_a_run_leaves_a_checkpoint_that_works_on_raw_activations(values):
    directory = run(values)
    names = {path.name for path in directory.iterdir()} - {".lock"}
    tensors = {f"{name}.safetensors" for name in ("dictionary", "state", "usage")}
    assert names == {"dictionary.json", "metrics.jsonl", "recipe.yaml"} | tensors
    dictionary = load_dictionary(directory)
    assert (dictionary.d_in, dictionary.n_latents) == (128, 67)
    assert float(dictionary.in_scale) != 1.0
    torch.testing.assert_close(dictionary.W_dec.norm(dim=-1), torch.ones(67), atol=1e-6, rtol=0)
    provenance = json.loads((directory / "dictionary.json").read_text())["provenance"]
    assert provenance["training_tokens"] == 3030
    assert provenance["hook"] == "transformer.h.2:out"
    assert provenance["model"]["id"] == "embedded"
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert {"loss", "fvu", "l0", "aux", "dead", "lr", "tokens", "tokens_per_second", "data_wait_share"} <= lines[0].keys()
    assert lines[-1]["lr"] < 1e-3


def test_two_runs_are_bit_equal_and_another_seed_differs(values, tmp_path):
    a = run(values, out_dir=str(tmp_path / "a"))
    b = run(values, out_dir=str(tmp_path / "b"))
    c = run(values, out_dir=str(tmp_path / "c"), seed=1)
    assert_equal_runs(a, b)
    assert not torch.equal(final_state(a)["dictionary/W_dec"], final_state(c)["dictionary/W_dec"])


class StopAt:
    """A stop request that arrives after so many steps."""

    def __init__(self, step):
        self.left = step

    def __get__(self, stop, _owner):
        self.left -= 1
        if self.left < 0:
            stop.signal_number = signal.SIGTERM
        return self.left < 0


@pytest.mark.parametrize("live", [False, True])
def test_stopped_and_continued_is_bit_equal_to_not_stopped(values, tmp_path, monkeypatch, live):
    steps = [5, 10, 15] if live else [5, 10, 15, 20, 25, 30]
    values["tokens"] = 101 * steps[-1]
    if live:
        values["harvest"] = values["harvest"] | {"store": None, "live_buffer_tokens": 900}
    whole = run(values, out_dir=str(tmp_path / "whole"))
    for stop in (1, 7) if live else (1, 7, 3):
        monkeypatch.setattr(StopRequest, "requested", StopAt(stop))
        with pytest.raises(Stopped) as stopped:
            run(values, out_dir=str(tmp_path / "parts"))
        assert stopped.value.signal_number == signal.SIGTERM
        monkeypatch.undo()
    parts = run(values, out_dir=str(tmp_path / "parts"))
    assert_equal_runs(whole, parts)
    assert [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()] == steps


def test_a_finished_run_is_finished(values):
    directory = run(values)
    before = (directory / "dictionary.safetensors").read_bytes()
    assert run(values) == directory
    assert (directory / "dictionary.safetensors").read_bytes() == before


def test_a_mid_run_checkpoint_loads_and_reconstructs(values, monkeypatch):
    monkeypatch.setattr(StopRequest, "requested", StopAt(13))
    with pytest.raises(Stopped):
        run(values)
    dictionary = load_dictionary(values["out_dir"])
    store = ActivationStore.open(values["harvest"]["store"])
    moments = store.moments("transformer.h.2:out")
    from sparsary.training.activations.store_stream import StoreStream

    x = StoreStream(store, ("transformer.h.2:out",), 100, seed=9, split="heldout").sample(200).x
    error = (dictionary(x) - x).pow(2).sum(-1).mean()
    assert error < 0.8 * moments.variance()


def test_gradient_accumulation_changes_only_rounding(values, tmp_path):
    values = values | {"batch_tokens": 100, "tokens": 1000, "auxk_weight": 0.0}
    whole = final_state(run(values, out_dir=str(tmp_path / "whole")))
    pieces = final_state(run(values, out_dir=str(tmp_path / "pieces"), accumulate=4))
    torch.testing.assert_close(whole["dictionary/W_dec"], pieces["dictionary/W_dec"], atol=2e-4, rtol=0)


def test_bf16_autocast_trains(values):
    directory = run(values, precision="bf16")
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["fvu"] < 0.6
    assert load_dictionary(directory).W_enc.dtype == torch.float32


def test_dead_latents_are_revived_by_auxk(values):
    """Latents too weak to be chosen come back with AuxK and stay away without."""
    counts = {}
    for weight in (0.0, 1 / 32):
        values["out_dir"] += "x"
        recipe = check_recipe(
            values | {"auxk_weight": weight, "dead_after_tokens": 101, "tokens": 10_100, "lr": 3e-3}, "recipe"
        )
        initialize = members.initialize

        def with_dead(dictionary, *arguments, initialize=initialize):
            initialize(dictionary, *arguments)
            with torch.no_grad():
                dictionary.W_enc[:20] *= 0.02

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(members, "initialize", with_dead)
            state = final_state(train_recipe(resolve_recipe(recipe)))
        counts[weight] = int((state["silent_for"][:20] > 2000).sum())
    assert counts[0.0] >= 15
    assert counts[1 / 32] <= counts[0.0] - 10


def test_tensors_instead_of_a_model(values):
    torch.manual_seed(0)
    rows = [torch.randn(500, 19) @ torch.randn(19, 19) for _ in range(3)]
    directory = train_recipe(resolve_recipe(check_recipe(values, "recipe")), rows)
    assert load_dictionary(directory).d_in == 19
    with pytest.raises(ValueError, match=r"the iterator ended after 1010 of 3030 tokens"):
        train_recipe(
            resolve_recipe(check_recipe(values | {"out_dir": values["out_dir"] + "2"}, "recipe")), iter([torch.randn(1100, 19)])
        )


def test_wandb_offline_gets_every_line(values, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = run(values, wandb={"project": "test", "mode": "offline"})
    assert list(directory.glob("wandb/offline-run-*/*.wandb"))


# Refusals.


def test_an_out_dir_of_another_run_is_refused(values):
    run(values)
    with pytest.raises(ValueError, match="got another run") as caught:
        run(values, lr=5e-4)
    assert "lr: 0.001 there, 0.0005 here" in str(caught.value)
    assert "Choose another out_dir" in str(caught.value)


def test_an_out_dir_with_other_things_is_refused(values):
    Path(values["out_dir"]).mkdir()
    (Path(values["out_dir"]) / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="expected an empty directory or a run"):
        run(values)


def test_a_read_only_out_dir_is_refused(values, monkeypatch):
    # Root may write anywhere, so the operating system's refusal is played.
    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sparsary.training.locks.FileLock.acquire", refuse)
    with pytest.raises(ValueError, match=r"out_dir: .* cannot be written \(Permission denied\)"):
        run(values)
    values["out_dir"] = "/proc/nowhere/run"
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"out_dir: /proc/nowhere/run cannot be written"):
        run(values)


def test_an_out_dir_in_use_is_refused(values):
    from sparsary.training.checkpoints import claimed

    recipe = check_recipe(values, "recipe")
    with claimed(Path(values["out_dir"]), recipe), pytest.raises(ValueError, match="in use by another process"):
        train_recipe(resolve_recipe(recipe))
    # Nothing is left to be cleared away.
    with claimed(Path(values["out_dir"]), recipe):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from sparsary.training.locks import locked
with locked(Path(sys.argv[1]), "out_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            message = r"out_dir: .*run is in use by another process\. Wait for it, or choose another out_dir\."
            with pytest.raises(ValueError, match=message), locked(tmp_path / "run", "out_dir"):
                pass
        finally:
            holder.kill()
    with locked(tmp_path / "run", "out_dir"):
        pass


def test_a_damaged_store_is_not_trained_on(values, tmp_path):
    recipe = check_recipe(values, "recipe")
    store = run_harvest(resolve_recipe(recipe))
    shutil.copytree(store.directory, tmp_path / "copy")
    values["harvest"]["store"] = str(tmp_path / "copy")
    path = tmp_path / "copy" / "train-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"train-00001\.safetensors: .*damaged"):
        run(values)
    assert not (Path(values["out_dir"]) / "state.safetensors").exists()


def test_a_damaged_state_is_named_and_nothing_is_overwritten(values):
    directory = run(values)
    path = directory / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a safetensors file"):
        run(values)
    assert path.stat().st_size == 1000


def test_a_state_with_a_tensor_missing_is_named(values):
    directory = run(values)
    tensors = load_file(directory / "state.safetensors")
    del tensors["silent_for"]
    save_file(tensors, directory / "state.safetensors", metadata={"counters": "{}"})
    with pytest.raises(ValueError, match=r"state\.safetensors: expected the state of this run"):
        run(values)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(values, monkeypatch):
    from sparsary.training.objective import Objective

    forward, steps = Objective.forward, []

    def exploding(self, batch, dead):
        loss, terms = forward(self, batch, dead)
        steps.append(1)
        if len(steps) == 23:
            loss = loss * float("inf")
            terms.named["loss"] = loss.detach()
        return loss, terms

    monkeypatch.setattr(Objective, "forward", exploding)
    with pytest.raises(ValueError, match=r"loss: not finite between steps 20 and 25.*step 20 is kept"):
        run(values)
    assert all(torch.isfinite(t.float()).all() for t in final_state(values["out_dir"]).values())
    assert torch.isfinite(load_dictionary(values["out_dir"]).W_dec).all()


def test_a_full_disk_while_saving_keeps_the_last_state(values, monkeypatch):
    memory, written, allowed = files._memory, [], []

    def full(tensor):
        written.append(tensor)
        # Room for the first state and dictionary, and for half of the next state.
        if allowed and len(written) > allowed[0]:
            raise OSError(28, "No space left on device")
        if (Path(values["out_dir"]) / "dictionary.safetensors").exists() and not allowed:
            allowed.append(len(written) + 5)
        return memory(tensor)

    monkeypatch.setattr(files, "_memory", full)
    message = (
        r"run/\S+: could not be written \(No space left on device\)\. The state of step \d+ is kept\. Free space .* continues"
    )
    with pytest.raises(OSError, match=message) as ended:
        run(values)
    assert ended.value.errno == 28
    monkeypatch.undo()
    assert load_dictionary(values["out_dir"]).n_latents == 67
    assert not list(Path(values["out_dir"]).glob(".*.partial"))
    whole = run(values, out_dir=values["out_dir"] + "-whole")
    assert_equal_runs(run(values), whole)


@pytest.mark.parametrize("where", ["metrics", "state", "dictionary", "recipe"])
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_whatever_cannot_be_written_is_named_with_what_is_kept(values, monkeypatch, where, number):
    """Afterwards the same call goes on, to what a run that never failed gives."""
    names = {"metrics": "metrics.jsonl", "state": "state.safetensors", "dictionary": "dictionary.json", "recipe": "recipe.yaml"}
    values |= {"save_every": 10, "tokens": 2020, "calibration_tokens": 300}
    if where == "metrics":
        real = members.TrainingLog.flush

        def broken(self):
            with errors.writing(self.path):
                if self.latest.get("step", 0) >= 20:
                    raise OSError(number, os.strerror(number))
            return real(self)

        monkeypatch.setattr(members.TrainingLog, "flush", broken)
        values["log_every"] = 5
    else:
        real, times = files.sync_folder, []

        def failing(folder):
            times.append(folder)
            if len(times) > 4 or where == "recipe":
                raise OSError(number, os.strerror(number))
            return real(folder)

        monkeypatch.setattr(files, "sync_folder", failing)
    with pytest.raises(OSError, match=r"could not be written") as ended:
        run(values)
    text = str(ended.value)
    assert text.startswith(values["out_dir"])
    assert os.strerror(number) in text
    assert "continues" in text
    assert "Errno" not in text
    if where == "metrics":
        assert names[where] in text
        assert "The state of step 10 is kept." in text
    monkeypatch.undo()
    assert_equal_runs(run(values), run(values, out_dir=values["out_dir"] + "-whole"))


def test_training_in_another_thread_leaves_signals_alone(values):
    """As web applications, notebooks' executors and Ray do; the same run as in the main thread."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        directory = pool.submit(run, values).result()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert_equal_runs(directory, run(values, out_dir=values["out_dir"] + "-main"))


def test_bad_tokens_are_in_the_provenance_also_of_a_run_that_was_stopped(values, monkeypatch, caplog):
    """And in the log at the end."""
    rows = torch.randn(3000, 19, generator=torch.Generator().manual_seed(0)) @ torch.randn(19, 19)
    rows[[5, 700, 2000], 3] = float("nan")
    tensors = list(rows.split(100))

    def trained(out_dir, tokens=3030):
        changed = values | {"out_dir": out_dir, "tokens": tokens}
        return train_recipe(resolve_recipe(check_recipe(changed, "recipe")), tensors)

    whole = trained(values["out_dir"])
    assert "Excluded from training, or repaired: tokens whose activations are not finite: 3." in caplog.text
    said = json.loads((whole / "dictionary.json").read_text())["provenance"]["skipped"]
    assert said == {"tokens whose activations are not finite": 3}
    steps = iter(range(10**6))
    monkeypatch.setattr(StopRequest, "signal_number", 15, raising=False)
    monkeypatch.setattr(StopRequest, "__init__", lambda self, agree: None)
    monkeypatch.setattr(StopRequest, "requested", property(lambda self: next(steps) >= 12))
    with pytest.raises(Stopped):
        trained(values["out_dir"] + "-part")
    monkeypatch.undo()
    part = trained(values["out_dir"] + "-part")
    assert_equal_runs(whole, part)
    assert json.loads((part / "dictionary.json").read_text())["provenance"]["skipped"] == said
    again = trained(values["out_dir"] + "-part")
    assert json.loads((again / "dictionary.json").read_text())["provenance"]["skipped"] == said


class PlayedWandb:
    """What is used of wandb's package."""

    def __init__(self, mode, login=True):
        self.mode, self.result, self.asked, self.begun = mode, login, [], []

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, prompt=True, verify=False):
        self.asked.append((prompt, verify))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def init(self, **options):
        self.begun.append(options["mode"])
        return SimpleNamespace(log=self.log, finish=lambda: None)

    def log(self, row, step):
        raise BrokenPipeError("the service is gone")


@pytest.mark.parametrize(
    ("environment", "recipe", "login", "refused"),
    [
        ("online", None, False, "wandb: not logged in. Run `wandb login`"),
        ("online", None, RuntimeError("key is\n wrong"), r"rejected the login (key is wrong). Run `wandb login`"),
        ("online", None, ConnectionError("no route"), "(no route)"),
        ("online", "online", False, "not logged in"),
        ("online", None, True, None),
        ("offline", None, False, None),
        ("disabled", None, False, None),
        ("dryrun", None, False, None),
        ("online", "offline", False, None),
        ("online", "disabled", False, None),
        ("disabled", "online", False, None),
    ],
)
def test_wandb_is_checked_before_any_work_and_the_environment_counts_where_the_recipe_is_silent(
    values, monkeypatch, environment, recipe, login, refused
):
    played = PlayedWandb(environment, login)
    monkeypatch.setitem(sys.modules, "wandb", played)
    values |= {"wandb": {"project": "x"} | ({} if recipe is None else {"mode": recipe}), "tokens": 202}
    if refused is not None:
        values["harvest"] = values["harvest"] | {"store": values["out_dir"] + "-store", "tokens": 700}
        with pytest.raises(ValueError, match=re.escape(refused)):
            run(values)
        assert not Path(values["harvest"]["store"]).exists()
        assert not Path(values["out_dir"]).exists()
        return
    # A service that breaks off later does not end the run.
    assert (run(values, log_every=1) / "dictionary.json").exists()
    assert played.begun == [recipe]
    assert played.asked == ([(False, True)] if (recipe or environment) == "online" else [])


def test_wandb_without_its_package_is_refused_before_any_work(values, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb in a recipe: needs wandb: pip install 'sparsary\[wandb\]'"):
        preflight(resolve_recipe(check_recipe(values | {"wandb": {"project": "x"}}, "recipe")))


# Preflight.


@pytest.mark.parametrize("door", ["python", "command"])
def test_a_recipe_is_resolved_and_planned_once(values, write_recipe, monkeypatch, count_calls, door):
    values["dictionary"] = {"layer": 2, "site": "resid_post", "n_latents": 67, "encoder": {"name": "topk", "k": 5}}
    path = write_recipe(values | {"tokens": 202})
    resolving, planning = ("resolve_recipes", "skeleton"), ("preflight_all", "_plan")
    seen = count_calls(*((resolve_hooks, name) for name in resolving), *((preflight_module, name) for name in planning))
    # Bound when it was imported.
    monkeypatch.setattr(run_module, "preflight_all", preflight_module.preflight_all)
    monkeypatch.setattr(run_module, "resolve_recipes", resolve_hooks.resolve_recipes)
    if door == "python":
        sparsary.train(path)
    else:
        monkeypatch.setattr("sys.argv", ["sparsary", "train", path])
        with pytest.raises(SystemExit) as end:
            sparsary.main()
        assert end.value.code == 0
    assert (Path(values["out_dir"]) / "dictionary.safetensors").exists()
    assert seen == {"resolve_recipes": 1, "skeleton": 1, "preflight_all": 1, "_plan": 1}


def test_preflight_tells_sizes_without_doing_anything(values, tmp_path):
    values["harvest"]["store"] = str(tmp_path / "none")
    member = resolve_recipe(check_recipe(values, "recipe"))
    plan = preflight(member)
    assert plan.steps == 30
    assert plan.widths == {"transformer.h.2:out": 128}
    assert plan.disk_bytes == 6000 * (128 * 4 + 16)
    assert plan.shuffle_tokens == 5700
    assert plan.parameters == 2 * 67 * 128 + 67 + 128
    assert plan.memory_bytes > 16 * plan.parameters
    assert not (tmp_path / "none").exists()
    assert not Path(values["out_dir"]).exists()
    shown = dict(plan.lines(member))
    assert "the whole store" in shown["shuffle"]


def test_preflight_refuses_what_cannot_work(values, tmp_path):
    values["harvest"] |= {"store": str(tmp_path / "none"), "tokens": 100}
    with pytest.raises(ValueError, match=r"batch_tokens: expected at most the 95 training tokens"):
        preflight(resolve_recipe(check_recipe(values, "recipe")))
    values["harvest"] |= {"tokens": 10**15}
    with pytest.raises(ValueError, match=r"harvest\.store: .* needs about .* TB, .* are free"):
        preflight(resolve_recipe(check_recipe(values, "recipe")))
    values["harvest"] |= {"tokens": 6000, "hooks": ["transformer.h.7:out"]}
    values["dictionary"]["hook"] = "transformer.h.7:out"
    with pytest.raises(ValueError, match=r"does not exist in embedded\. Nearest"):
        preflight(resolve_recipe(check_recipe(values, "recipe")))


# Processes that are killed.


def spawn(recipe_path):
    command = [sys.executable, "-m", "sparsary", "train", recipe_path]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2])


def wait_for_state(directory, alive, after=0):
    """Until a state is saved that is newer; its time. ``None`` once the process is gone. A hang is the test's time limit."""
    state = Path(directory) / "state.safetensors"
    while alive():
        if state.exists() and (saved := state.stat().st_mtime_ns) > after:
            return saved
        time.sleep(0.003)
    return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_this_process_saves_first(values, monkeypatch, number):
    real = TrainingLog.__call__

    def interrupted(self, state, *rest):
        real(self, state, *rest)
        if state.step == 10:
            signal.raise_signal(number)

    monkeypatch.setattr(TrainingLog, "__call__", interrupted)
    with pytest.raises(Stopped) as stopped:
        run(values, save_every=100)
    assert stopped.value.signal_number == number
    saved = json.loads((Path(values["out_dir"]) / "dictionary.json").read_text())["provenance"]["training_tokens"]
    assert saved == 10 * 101
    monkeypatch.undo()
    assert_equal_runs(run(values), run(values, out_dir=values["out_dir"] + "-whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(values, write_recipe, number):
    values |= {"tokens": 2_000_000, "save_every": 10}
    process = spawn(write_recipe(values))
    wait_for_state(values["out_dir"], lambda: process.poll() is None)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number, output
    assert "Stopped at step" in output
    assert "Traceback" not in output
    saved = json.loads((Path(values["out_dir"]) / "dictionary.json").read_text())["provenance"]["training_tokens"]
    assert f"step {saved // 101};" in output


@pytest.mark.parametrize("kills", [1, 8])
def test_kills_end_bit_equal_to_none(values, write_recipe, tmp_path, load_beside, kills):
    """SIGKILL at random moments, saves included; the same run again each time; the same weights at the end."""
    import multiprocessing
    import random

    # At most four saves between two kills, however fast the machine: no run is over before the last of them, nor soon after.
    values |= {"tokens": 101 * (28 * kills + 40), "save_every": 7, "log_every": 13}
    values["dictionary"]["n_latents"] = 509
    whole = run(values, out_dir=str(tmp_path / "whole"))
    path, directory = write_recipe(values), Path(values["out_dir"])
    # Processes that need not import anew what the run above has imported.
    processes, generator, saved = multiprocessing.get_context("forkserver"), random.Random(0), 0
    processes.set_forkserver_preload(load_beside("rank_processes").preloaded())
    for _ in range(kills):
        process = processes.Process(target=train, args=(path,))
        process.start()
        times = []
        for _ in range(generator.randint(2, 3)):
            saved = wait_for_state(directory, process.is_alive, saved)
            times.append(time.monotonic())
        # Anywhere between this save and the next.
        time.sleep(generator.random() * (times[-1] - times[-2]))
        assert process.is_alive()
        process.kill()
        process.join()
        load_dictionary(directory)
    run(values)
    assert_equal_runs(whole, directory)
    assert torch.equal(load_dictionary(whole).W_dec, load_dictionary(directory).W_dec)


# VmHWM is this program's own peak; getrusage would report the parent's where that was larger.
MEMORY = """
import json, re, sys
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe
train_recipe(resolve_recipe(check_recipe(json.loads(sys.argv[1]), "recipe")))
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
"""


def test_memory_of_training_does_not_grow_with_the_store(values, tmp_path):
    """Peak resident size over a store of 20,000 tokens and of 200,000, training only."""
    peaks = {}
    for tokens in (20_000, 200_000):
        values["harvest"] |= {"tokens": tokens, "store": str(tmp_path / f"store{tokens}"), "shard_tokens": 10_000}
        values |= {"batch_tokens": 1000, "tokens": 150_000, "out_dir": str(tmp_path / f"run{tokens}")}
        run_harvest(resolve_recipe(check_recipe(values, "recipe")))
        command = [sys.executable, "-c", MEMORY, json.dumps(values)]
        peaks[tokens] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    print(peaks)
    assert peaks[200_000] < 1.1 * peaks[20_000], peaks
