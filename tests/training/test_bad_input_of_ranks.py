"""Mistakes that several processes make together, or one of them: one message, from one rank, and exit status 2 of all."""

import json
import shutil

import pytest

import sparsary

HOOK = "transformer.h.2:out"
# All commands in one group of processes, each as the console script runs it, but for the end of the process.
TOGETHER = """
import json, sys
from contextlib import ExitStack
from unittest import mock
import sparsary
from sparsary.training import processes
ranks, told = processes.own_ranks(), []
sys.stdout = open(os.devnull, "w")
for case in cases:
    own = case[rank]
    os.chdir(own["folder"])
    sys.argv = ["sparsary", *own["arguments"]]
    with ExitStack() as stack:
        for target, value in own["patches"].items():
            stack.enter_context(mock.patch(target, eval(value)))
        try:
            status, message = sparsary._run()
        except BaseException as error:
            status, message = processes.told_by_one_rank(*sparsary._ended(error), error)
    told.append([status, message])
    ranks.wait()
    if rank == 0:
        for key in ("sparsary/failures", "sparsary/status", processes.HEED):
            processes._store().delete_key(key)
    ranks.wait()
with open(f"{output}/{rank}.json", "w") as handle:
    json.dump(told, handle)
processes.leave()
"""
# A whole process, whose standard error is a file.
WHOLE = """
import sys
from contextlib import ExitStack
from unittest import mock
handle = os.open(f"{output}/{rank}.txt", os.O_CREAT | os.O_WRONLY)
os.dup2(handle, 2)
sys.stderr = open(2, "w", closefd=False)
import sparsary
sys.argv = ["sparsary", *arguments]
with ExitStack() as stack:
    for target, value in patches[rank].items():
        stack.enter_context(mock.patch(target, eval(value)))
    sparsary.main()
"""
WRITE = "fsspec.implementations.memory.MemoryFileSystem.pipe_file"
REFUSED = "lambda *_, **__: (_ for _ in ()).throw(PermissionError('403 Forbidden'))"
FEATURE_CHOICE = "dictionary.encoder={name: feature_choice, k: 4}"
# Name -> arguments of both ranks, those of rank 1 alone, patches of both, of rank 1 alone, folders, words of the message.
CASES = {
    "a mesh larger than the world": (["distributed.latents=4"], [], {}, {}, "whole", "divisor of the 2 processes, got 4"),
    "different recipes": (
        [],
        ["lr=5e-4"],
        {},
        {},
        "whole",
        "rank 1 differs from rank 0's: lr: 0.0005, not lr: 0.001",
    ),
    "different code": (
        [],
        [],
        {"sparsary.training.same_run.git_commit": "lambda: '1234'"},
        {"sparsary.training.same_run.git_commit": "lambda: '5678'"},
        "whole",
        "code of rank 1 differs from rank 0's",
    ),
    "different stores": (
        [],
        [],
        {"sparsary.training.activations.harvest.SHARED_SECONDS": "0.1"},
        {},
        "apart",
        "rank 1 does not see rank 0's manifest.json",
    ),
    "a store on a URL without rights": (
        ["harvest.store=memory://closed/store"],
        [],
        {WRITE: REFUSED},
        {},
        "whole",
        "memory://closed/store cannot be written (PermissionError: 403 Forbidden)",
    ),
    "a missing shard": ([], [], {}, {}, "missing", "train-00001.safetensors"),
    "latents of an encoder that is not divided": (
        ["distributed.latents=2", FEATURE_CHOICE],
        [],
        {},
        {},
        "whole",
        "distributed.latents: expected 1 for FeatureChoice, because its budgets follow",
    ),
    "a batch that is not divided": (["batch_tokens=101"], [], {}, {}, "whole", "batch_tokens: expected a multiple of 2"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of both ranks: with one store, with one that misses a shard, and with a store for the first rank alone."""
    whole = tmp_path_factory.mktemp("ranks") / "whole"
    whole.mkdir()
    values = {
        "text": {"context_length": 32},
        "harvest": {"hooks": [HOOK], "tokens": 1500, "shard_tokens": 500, "batch_contexts": 8, "store": "store"},
        "dictionary": {"hook": HOOK, "n_latents": 64, "encoder": {"name": "topk", "k": 4}},
        "tokens": 1000,
        "batch_tokens": 100,
        "lr": 1e-3,
        "lr_warmup_steps": 2,
        "dead_after_tokens": 500,
        "eval_tokens": 60,
        "out_dir": "out",
    }
    recipe = whole.parent / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    sparsary.harvest(str(recipe), harvest__store=str(whole / "store"))
    for name in ("missing", "apart"):
        shutil.copytree(whole, whole.with_name(name))
    (whole.with_name("missing") / "store" / "train-00001.safetensors").unlink()
    whole.with_name("nothing").mkdir()
    return {name: [str(whole.with_name(name))] * 2 for name in ("whole", "missing")} | {
        "apart": [str(whole.with_name("apart")), str(whole.with_name("nothing"))],
        "recipe": str(recipe),
    }


@pytest.fixture(scope="module")
def told(folders, load_beside, tmp_path_factory):
    """Exit status and message of both ranks, by case."""
    output, cases = tmp_path_factory.mktemp("told"), []
    for number, (both, last, patches, last_patches, where, _) in enumerate(CASES.values()):
        command = ["train", folders["recipe"], f"out_dir={output}/run{number}", *both]
        cases.append(
            [
                {"arguments": command, "patches": patches, "folder": folders[where][0]},
                {"arguments": [*command, *last], "patches": patches | last_patches, "folder": folders[where][1]},
            ]
        )
    values = {"cases": cases, "output": str(output)}
    assert load_beside("rank_processes").run_ranks(2, TOGETHER, values) == [0, 0]
    ranks = [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]
    assert not [path for path in output.glob("run*/*") if path.suffix == ".safetensors"]
    return dict(zip(CASES, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_one_rank_tells_and_all_end_with_status_2(told, case):
    assert [status for status, _ in told[case]] == [2, 2]
    (message,) = [message for _, message in told[case] if message]
    assert message.startswith("sparsary: ")
    assert CASES[case][-1] in message
    assert "log: " not in message


@pytest.mark.parametrize("who", ["both", "one"])
def test_processes_end_with_one_line_together(folders, load_beside, tmp_path, who):
    """A rank that waits for another is told of its mistake."""
    arguments = ["train", folders["recipe"], f"out_dir={tmp_path}/run", "harvest.store=memory://closed/store"]
    arguments += ["batch_tokens=101"] if who == "both" else []
    patches = [{}, {} if who == "both" else {WRITE: REFUSED}]
    values = {"arguments": arguments, "patches": patches, "output": str(tmp_path)}
    assert load_beside("rank_processes").run_ranks(2, WHOLE, values) == [2, 2]
    lines = [line for rank in range(2) for line in (tmp_path / f"{rank}.txt").read_text().splitlines()]
    (line,) = [line for line in lines if line.startswith("sparsary: ")]
    assert ("batch_tokens: expected a multiple of 2" if who == "both" else "sparsary: rank 1: harvest.store: ") in line
    assert not [line for line in lines if "Traceback" in line]
