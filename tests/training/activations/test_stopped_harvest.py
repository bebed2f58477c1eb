"""Processes that harvest together stop together on a signal, and name one that hangs."""

import json

import pytest

HOOK = "transformer.h.2:out"
# Rank 1 does something to itself when it runs its first batch.
RANK = """
import signal, sys, time
handle = os.open(f"{output}/{rank}.txt", os.O_CREAT | os.O_WRONLY)
os.dup2(handle, 2)
os.dup2(handle, 1)
sys.stdout = sys.stderr = open(2, "w", closefd=False)
import sparsary
from datetime import timedelta
from sparsary.training import watch
from sparsary.training.activations import harvest
watch.TIMEOUT = timedelta(seconds=20 if what == "hang" else 600)
real, calls = harvest.rows_of, []
def rows_of(*arguments):
    calls.append(1)
    if rank == 1 and len(calls) == 1:
        if what == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            time.sleep(3600)
    return real(*arguments)
harvest.rows_of = rows_of
sys.argv = ["sparsary", "harvest", recipe]
sparsary.main()
"""


@pytest.fixture
def recipe(tmp_path):
    values = {
        "text": {"context_length": 32},
        "harvest": {"hooks": [HOOK], "tokens": 4000, "shard_tokens": 400, "batch_contexts": 4, "store": str(tmp_path / "s")},
        "dictionary": {"hook": HOOK, "n_latents": 64, "encoder": {"name": "topk", "k": 4}},
        "tokens": 1000,
        "batch_tokens": 100,
        "out_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    return str(path)


def test_a_signal_at_one_process_stops_all_with_one_message(load_beside, recipe, tmp_path):
    values = {"recipe": recipe, "output": str(tmp_path), "what": "terminate"}
    assert load_beside("rank_processes").run_ranks(2, RANK, values) == [143, 143]
    said = "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    (line,) = [line for line in said.splitlines() if line.startswith(("Stopped", "sparsary: "))]
    assert line.startswith("Stopped in the harvest; ")
    assert line.endswith(" of 4,000 tokens are stored. The same command continues.")
    assert "Traceback" not in said
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.safetensors")}
    # The first rank's unit may be complete, and then it is kept.
    assert load_beside("rank_processes").run_ranks(1, RANK, values) == [0]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_a_process_that_hangs_is_named(load_beside, recipe, tmp_path):
    values = {"recipe": recipe, "output": str(tmp_path), "what": "hang", "hanging": 1}
    statuses = load_beside("rank_processes").run_ranks(2, RANK, values)
    assert statuses == [1, -9]
    (line,) = [line for line in (tmp_path / "0.txt").read_text().splitlines() if line.startswith("sparsary: ")]
    assert "rank 1 of 2 ended or does not answer (last seen harvesting unit 1, " in line
