"""What `sparsary bench` arranges and reports. How fast anything is, no test says."""

import importlib.util
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.training.bench import comparison, steps, worker
from sparsary.training.bench.comparison import BenchPlan, StepShape, parse_shape
from sparsary.training.bench.rounds import ratio, slope, started, take_turns
from sparsary.training.bench.worker import BenchTask

ROOT = Path(__file__).parents[3]
SHAPE = StepShape(17, 7, 23, 3)
# Speaks as a measured process does, without loading torch; writes down what it is told, and fails as it is told to.
FAKE = """
import json, os, sys
folder = os.path.dirname(sys.argv[0])
name = json.loads(sys.argv[1])["library"]
fails_at = json.load(open(folder + "/fails_at")).get(name)
def say(**answer):
    print(json.dumps(answer), flush=True)
if fails_at == 0:
    raise ModuleNotFoundError("No module named 'peer'")
say(version="1.2.3")
step = 0
for order in map(str.strip, sys.stdin):
    if order == "settle":
        say()
        continue
    if order == "step":
        step += 1
    if step == fails_at:
        raise MemoryError("no room")
    with open(folder + "/log", "a") as file:
        file.write(f"{name} {order}\\n")
    say(seconds=step * (0.5 if order == "product" else {"sparsary": 1.0, "sparsify": 2.0}.get(name, 6.0)), memory_bytes=3128)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes tasks and the command of processes that only pretend to step; what they were told stands in ``log``."""
    monkeypatch.setattr("sparsary.training.bench.rounds.PAUSE_SECONDS", 0)

    def make(*libraries, fails_at=None):
        (tmp_path / "fake.py").write_text(FAKE)
        (tmp_path / "fails_at").write_text(json.dumps(fails_at or {}))
        tasks = [BenchTask(name, "topk", *SHAPE, 1, product=name == "sparsary") for name in libraries]
        return [(task, [sys.executable, "-I", "-S", str(tmp_path / "fake.py")]) for task in tasks]

    make.log = tmp_path / "log"
    return make


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the console script's function; returns its status, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparsary", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            sparsary.main()
        return ended.value.code, *capsys.readouterr()

    return run


def plan(**changes):
    return BenchPlan(**{"shapes": (SHAPE,), "families": ("topk",), "rounds": 2, "threads": 1, "overrides": {}} | changes)


def test_competitors_step_in_turn_and_the_first_rounds_do_not_count(fake):
    with started(fake("sparsary", "sparsify", "saelens")) as competitors:
        take_turns(competitors, 3)
    told = fake.log.read_text().splitlines()
    assert told == ["sparsary product", "sparsary step", "sparsify step", "saelens step"] * 5
    ours, sparsify, _ = competitors
    assert ours.seconds == {"product": [1.0, 1.5, 2.0], "step": [3.0, 4.0, 5.0]}
    assert sparsify.seconds == {"step": [6.0, 8.0, 10.0]}
    assert (sparsify.version, sparsify.memory_bytes, sparsify.error) == ("1.2.3", 3128, None)


def test_a_peer_that_fails_is_reported_and_the_others_go_on(fake, tmp_path):
    tasks = fake("sparsary", "sparsify", "saelens", "overcomplete", fails_at={"sparsify": 0, "saelens": 4})
    tasks[3] = (tasks[3][0], [str(tmp_path / "no python")])
    with started(tasks) as competitors:
        take_turns(competitors, 3)
    found = comparison.shape_report(SHAPE, competitors, plan())
    errors = [row["error"] for row in found["competitors"]]
    assert errors == [
        None,
        "ModuleNotFoundError: No module named 'peer'",
        "MemoryError: no room",
        f"{tmp_path / 'no python'}: No such file or directory",
    ]
    assert found["competitors"][0]["seconds"] == [3.0, 4.0, 5.0]
    assert found["competitors"][2] | {"seconds": []} == found["competitors"][2] | {"seconds": [], "times_ours": None}
    table = comparison.tables({"bench": "step", "shapes": [found], "settings": {"rounds": 3}})[0]
    assert [row[0] for row in table.rows] == ["encoder product", "sparsary"]
    assert table.notes[1] == "saelens, topk: left out: MemoryError: no room"


def test_a_peer_that_is_silent_is_given_up(monkeypatch, fake):
    monkeypatch.setattr("sparsary.training.bench.rounds.ANSWER_SECONDS", 0.2)
    (task, _), *_ = fake("sparsify")
    with started([(task, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])]) as (silent,):
        assert silent.error == "no answer within 0 s"


def test_ratios_are_taken_within_rounds():
    # A disturbance that doubles a whole round changes nothing; medians taken first would give 2.5.
    assert ratio([3.0, 60.0, 5.0], [1.0, 20.0, 2.0]) == 3.0


def test_a_shape_s_report_and_table(fake):
    with started(fake("sparsary", "sparsify")) as competitors:
        take_turns(competitors, 3)
    found = comparison.shape_report(SHAPE, competitors, plan())
    ours, theirs = found["competitors"]
    assert found["encoder_output_bytes"] == 4 * 17 * 23
    assert found["product"] == {"seconds": [1.0, 1.5, 2.0], "median_seconds": 1.5}
    assert ours["times_product"] == pytest.approx(8 / 3)
    assert (ours["times_ours"], ours["variant"]) == (1.0, {})
    assert theirs["times_ours"] == 2.0
    assert theirs["memory_over_output"] == 2.0
    table = comparison.tables({"bench": "step", "shapes": [found], "settings": {"rounds": 3}})[0]
    assert table.title == "17 tokens, d 7, 23 latents, k 3; medians of 3 rounds"
    assert table.rows[2] == ["sparsify", "topk", "8.000", "5.33", "2.00", "0", "2.00", "", ""]


def test_slopes_are_exponents():
    assert slope([3, 7, 19], [2 * size**1.25 for size in (3, 7, 19)]) == pytest.approx(1.25)
    measured = [{"step": [2.0 * size, 9.0 * size, 3.0 * size], "product": [1.0 * size] * 3} for size in (4, 8)]
    found = comparison.growth_report([4, 8], measured)
    assert (found["median_step_seconds"], found["times_product"]) == ([12.0, 24.0], [3.0, 3.0])
    assert found["step_slope"] == pytest.approx(1)
    assert found["times_product_slope"] == pytest.approx(0)


def test_the_command_shows_a_table_and_writes_everything(monkeypatch, command, fake, tmp_path):
    made = fake("sparsary")[0][1]
    monkeypatch.setattr(BenchPlan, "command", lambda self, task: made)
    monkeypatch.setattr(comparison, "PEERS", {"topk": ("sparsify",)})
    arguments = ["--quick", "--peers", sys.executable, "--json", str(tmp_path / "out.json")]
    status, out, err = command("step", *arguments, "--variant", "accumulate=2", "--threads", "1")
    assert status == 0, err
    assert "x product" in out
    assert "sparsary accumulate=2" in out
    assert max(map(len, out.splitlines())) <= 120
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["bench"] == "step"
    assert written["environment"].keys() >= {"torch", "cpu", "threads", "sparsary", "commit", "date"}
    assert written["settings"]["rounds"] == 3
    (shape,) = written["shapes"]
    assert shape["shape"] == comparison.QUICK_SHAPE._asdict()
    assert [(row["library"], row["variant"], len(row["seconds"])) for row in shape["competitors"]] == [
        ("sparsary", {}, 3),
        ("sparsary", {"accumulate": 2}, 3),
        ("sparsify", {}, 3),
    ]
    monkeypatch.setattr(comparison, "QUICK_GROWTH", {"n_latents": [128, 256], "tokens": [64, 128]})
    status, out, err = command("step", "--slopes", "--quick", "--json", str(tmp_path / "slopes.json"))
    assert status == 0, err
    assert out.count("slope") == 2
    assert [found["axis"] for found in json.loads((tmp_path / "slopes.json").read_text())["slopes"]] == ["n_latents", "tokens"]


def test_another_report_is_shown_number_by_number():
    report = {"bench": "grid", "environment": {}, "members": 3, "shapes": {"tiny": {"ratio": 1.23456, "steps": 7}}}
    (table,) = comparison.tables(report)
    assert table.title == "grid"
    assert table.rows == [["members", "3"], ["shapes.tiny.ratio", "1.235"], ["shapes.tiny.steps", "7"]]


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ("stream", "int8.gb_per_second"),
        ("harvest", "cpu_ratio"),
        ("grid --members 2", "shapes.tiny.ratio"),
        ("cross-layer", "shapes.small.ratio"),
    ],
)
def test_the_other_measurements_are_commands_too(command, tmp_path, arguments, number):
    code, out, err = command(*arguments.split(), "--quick", "--rounds", "1", "--json", str(tmp_path / "r.json"))
    assert (code, err) == (0, "")
    assert number in out
    found = json.loads((tmp_path / "r.json").read_text())
    for part in number.split("."):
        found = found[part]
    assert found > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_its_measurement_says_what_it_needs(command):
    code, _, err = command("gpu")
    assert code == 2
    assert "needs a CUDA GPU" in err


def test_our_step_that_fails_ends_the_command(monkeypatch, command, fake):
    made = fake("sparsary")[0][1]
    monkeypatch.setattr(BenchPlan, "command", lambda self, task: [*made[:-1], "-c", "raise MemoryError('no room')"])
    status, _, err = command("step", "--quick", "--peers", "none")
    assert (status, err) == (2, "sparsary: bench, topk at 64x32x256x4: MemoryError: no room\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["step", "--shape", "2048x768"],
            "--shape: expected TOKENSxD_INxN_LATENTSxK, for example 2048x768x12288x32, got '2048x768'",
        ),
        (["step", "--shape", "17x7x0x3"], "--shape: expected"),
        (["step", "--family", "topkk"], "got 'topkk'. Did you mean 'topk'?"),
        (["pursuit", "--family", "topk"], "--family: expected one of matching_pursuit, gradient_pursuit"),
        (["step", "--peer", "sparsity"], "Did you mean 'sparsify'?"),
        (["step", "--peers", "nowhere/python"], "--peers: expected a Python that has the peers, or none, got 'nowhere/python'"),
        (["step", "lrr=1"], "bench, topk: lrr: unknown key"),
        (["step", "--variant", "accumulate=2 lrr=1"], "Did you mean 'lr'?"),
        (["step", "loud"], "key.sub=value"),
        (["step", "batch_tokens=5"], "batch_tokens: expected the value from --shape, got 5"),
        (["step", "dictionary.encoder.name=topk"], "expected the value from --family"),
        (["step", "--shape", "17x7x23x29"], "dictionary.encoder.k: expected at most n_latents = 23, got 29"),
        (["step", "objective=kl"], "objective"),
        (["step", "--json"], "--json"),
        (["step", "--rounds", "0"], "--rounds"),
    ],
)
def test_mistakes_end_with_one_message(command, monkeypatch, tmp_path, arguments, message):
    # No process is started for a plan that does not hold.
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.chdir(tmp_path)
    status, _, err = command(*arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_the_peers_python_is_that_of_make_peers_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert comparison.peers_python(None) is None
    link = tmp_path / ".venv-peers" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    # The link itself: resolved, it would be a Python without the peers.
    assert comparison.peers_python(None) == link
    assert comparison.peers_python("none") is None
    assert [task.library for task in plan(peers_python=link, families=("mutual_choice",)).peers(SHAPE)] == [
        "saelens",
        "dictionary_learning",
    ]
    assert [task.library for task in plan(peers_python=link, libraries=("saelens",)).peers(SHAPE)] == ["saelens"]
    assert plan().peers(SHAPE) == []


def test_shapes_are_read_as_they_are_written():
    assert parse_shape("17x7x23x3") == SHAPE
    assert str(SHAPE) == "17x7x23x3"


@pytest.mark.parametrize("family", comparison.STEP_FAMILIES)
def test_every_family_s_step_is_the_loop_s(family):
    task = BenchTask("sparsary", family, 17, 7, 23, 3, 1, overrides={"lr": 0.002, "grad_clip": None})
    recipe = steps.recipe_of(task)
    assert (recipe.lr, recipe.batch_tokens, recipe.dictionary.n_latents) == (0.002, 17, 23)
    run = steps.BenchRun(recipe, worker.random_activations(101, 7, torch.Generator().manual_seed(0)))
    before = run.dictionary.W_dec.detach().clone()
    x = [worker.random_activations(17, 7, torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    run.follow(run.batches(x, x))
    assert (run.state.step, run.state.tokens) == (3, 51)
    assert not torch.equal(run.dictionary.W_dec, before)
    # Adam's two moments beside every weight, and its counters.
    weights = sum(4 * p.numel() for p in run.dictionary.parameters())
    assert 3 * weights <= run.held_bytes() <= 3 * weights + 4 * len(list(run.dictionary.parameters()))


@pytest.mark.parametrize("family", ["relu", "gated", "jumprelu"])
def test_settled_steps_have_the_target_l0(family):
    task = BenchTask("sparsary", family, 67, 16, 48, 3, 1, settled=True)
    generator = torch.Generator().manual_seed(0)
    x = worker.activations(task, task.tokens, generator)
    run = steps.BenchRun(steps.recipe_of(task), steps.sample_of(task, generator))
    run.settle(x)
    counted = run.count_first(1)
    run.follow(run.batches([x, x], [x]))
    assert counted["steps"] == 1
    assert counted["l0"] == pytest.approx(3, abs=0.05)
    # Pre-activations just below their thresholds train them; the others have no such entries.
    assert (counted["entries"] > counted["l0"]) == (family == "jumprelu")


def test_held_bytes_count_a_shared_tensor_once():
    weight = torch.zeros(3, 5)
    state = {0: {"exp_avg": torch.zeros(3, 5), "step": 7}}
    assert worker.held_bytes([weight, weight], state) == 2 * 4 * 15


def test_the_spectrum_falls_as_one_over_rank():
    x = worker.random_activations(4001, 11, torch.Generator().manual_seed(0))
    variance = x.var(0)
    assert variance.mean() == pytest.approx(1, abs=0.05)
    assert variance[0] / variance[9] == pytest.approx(10, rel=0.15)


def test_the_peak_of_memory_counts_from_the_reset():
    if not worker.reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    # Pages of its own, which go back to the system at once, whatever the allocator keeps.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(bytes(64 << 20))
    peak = worker.memory_bytes("VmHWM")
    assert worker.reset_peak()
    assert worker.memory_bytes("VmHWM") < peak - (32 << 20)


def test_the_peers_that_are_asked_for_are_those_the_script_has():
    spec = importlib.util.spec_from_file_location("peer_steps", ROOT / "training/bench/peer_steps.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = {(family, library) for family, libraries in comparison.PEERS.items() for library in libraries}
    assert asked == script.PEERS.keys()


def bench(folder, *arguments):
    """The command in a process of its own, away from the repository, as a user has it; returns what it wrote."""
    call = [sys.executable, "-m", "sparsary", "bench", *arguments, "--quick", "--json", "out.json"]
    run = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "out.json").read_text())


def test_real_steps_are_measured_from_anywhere(tmp_path):
    # Names of ours in the current folder are not what is run.
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise RuntimeError")
    found = bench(tmp_path, "step", "--peers", "none", "--family", "gradient_topk")
    rows = found["shapes"][0]["competitors"]
    assert [(row["family"], len(row["seconds"]), row["error"]) for row in rows] == [("gradient_topk", 3, None)]
    assert all(row["times_product"] > 0 for row in rows)


def test_real_pursuits_are_measured(tmp_path):
    rows = bench(tmp_path, "pursuit", "--peers", "none")["shapes"][0]["competitors"]
    assert [row["family"] for row in rows] == ["matching_pursuit", "gradient_pursuit"]


@pytest.mark.parity
def test_every_peer_takes_its_step(tmp_path):
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs the peers' environment: make peers")
    for command, families in (("step", ("topk", "mutual_choice")), ("pursuit", ("matching_pursuit", "gradient_pursuit"))):
        words = [word for family in families for word in ("--family", family)]
        rows = bench(tmp_path, command, "--peers", str(python), *words)["shapes"][0]["competitors"]
        assert [row["error"] for row in rows] == [None] * len(rows)
        assert {(row["family"], row["library"]) for row in rows if row["library"] != "sparsary"} == {
            (family, library) for family in families for library in comparison.PEERS[family]
        }


def test_loading_is_measured_against_reading_the_bytes(tmp_path):
    from sparsary.training.bench import loading

    # What the processes do, in this one for all formats; two matrices and two biases of float32.
    assert loading._write(tmp_path, 64, 32) == 4 * (2 * 64 * 32 + 64 + 32)
    for name in loading.FORMATS:
        assert loading.measure(name, tmp_path)["seconds"] > 0


def test_loading_is_measured_in_processes_of_its_own(monkeypatch):
    from sparsary.training.bench import loading

    # One that is no safetensors.
    monkeypatch.setattr(loading, "FORMATS", ("gemma_scope",))
    report = loading.bench_loading(64, 32, 1)
    assert report["tensor_bytes"] == 4 * (2 * 64 * 32 + 64 + 32)
    assert report["gemma_scope_time"] > 0
