"""Predictions of `sparsary plan` beside measured runs in 1, 2 and 4 processes.

    .venv/bin/python docs/studies/scale.py [--shape 2048x256x8192x16] [--processes 1 2 4] [--rounds 3] [--json FILE]
    .venv/bin/python docs/studies/scale.py --shape 2048x256x8192x16 --shape 2048x512x4096x32 \\
        --rounds 2 --probe-rounds 6 --steps 20

The second command takes about four minutes on two idle cores.

A run trains TopK on random activations, an equal global batch whatever the number of processes, one thread each. For every
shape and number of processes, in turn, the plan is made and the run measured. The table has milliseconds of a step: processor
time of a process, messages included, which other load on the machine hardly changes, and time by the clock, which it does.
Measured figures are of the slowest process. All are the least over steps and rounds. Processes beyond the cores share them, so
that the clock is predicted to show a multiple of the processor time. The load is the system's average over a minute.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import sparsary
from sparsary.training import loop
from sparsary.training.recipe import check_recipe
from sparsary.training.scale import probe
from sparsary.training.scale.plan import Device, plan_run
from sparsary.training.scale.sizes import Given

SHAPES = ("2048x256x8192x16", "2048x512x4096x32", "8192x256x4096x16")
HOOK = "inputs:out"
# Steps that compile and fill caches.
WARM_UP = 5


@dataclass(frozen=True)
class Shape:
    """Tokens of the global batch, width, latents and k."""

    tokens: int
    d: int
    n_latents: int
    k: int

    def recipe(self, steps: int, out_dir: str) -> dict[str, Any]:
        return {
            "harvest": {"hooks": [HOOK]},
            "dictionary": {"hook": HOOK, "n_latents": self.n_latents, "encoder": {"name": "topk", "k": self.k}},
            "tokens": steps * self.tokens,
            "batch_tokens": self.tokens,
            "save_every": 1_000_000,
            "log_every": 1_000_000,
            "calibration_tokens": self.tokens,
            "out_dir": out_dir,
        }


def train(shape: Shape, steps: int, folder: str, latents: int) -> None:
    """Train in one process of several, and write the seconds of its steps: by the clock, and of the processor.

    Args:
        latents: Number of processes that divide the latents; the others divide the batch.
    """
    marks: list[tuple[float, float]] = []
    own = loop.step

    def marked(*arguments: Any) -> Any:
        marks.append((time.perf_counter(), time.process_time()))
        return own(*arguments)

    loop.step = marked
    x = torch.randn(4 * shape.tokens, shape.d, generator=torch.Generator().manual_seed(0))
    sparsary.train(shape.recipe(steps, f"{folder}/run") | {"distributed": {"latents": latents}}, x)
    pairs = list(itertools.pairwise(marks))[WARM_UP:]
    seconds = [[after[i] - before[i] for before, after in pairs] for i in range(2)]
    Path(folder, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seconds))


def seconds_of_steps(
    name: str, processes: int, threads: int, steps: int, latents: int = 1
) -> list[tuple[list[float], list[float]]]:
    """Train in so many processes; return every rank's seconds of its steps, by the clock and of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        worker = [__file__, "--worker", folder, "--shape", name, "--steps", str(steps), "--latents", str(latents)]
        command = [sys.executable, *(launcher if processes > 1 else []), *worker]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stderr=subprocess.DEVNULL)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    assert len(found) == processes
    return [(clock, processor) for clock, processor in found]


def measured(name: str, processes: int, steps: int) -> tuple[float, float]:
    """Return the least seconds of a step, by the clock and of the processor, of the slowest process of a run."""
    ranks = seconds_of_steps(name, processes, 1, steps)
    clock, processor = (max(min(seconds[i]) for seconds in ranks) for i in range(2))
    return clock, processor


def predicted(shape: Shape, processes: int) -> dict[str, float]:
    """Return the plan for a mesh of these processes along data: seconds of a step."""
    recipe = check_recipe(shape.recipe(100, "nowhere"), "study")
    plan = plan_run([recipe], processes, Device(), Given(d_model=shape.d), threads=1)
    mesh = next(each for each in plan.tried if each.mesh.latents == 1)
    assert mesh.seconds is not None
    return {"clock": mesh.seconds.total, "processor": mesh.seconds.total / plan.machine.crowd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="TOKENSxDxLATENTSxK; repeatable")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--probe-rounds", type=int, default=probe.MOST_ROUNDS, help="rounds of the plan's probe, at most")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--latents", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = {name: Shape(*map(int, name.split("x"))) for name in options.shape or SHAPES}
    if options.worker:
        train(next(iter(shapes.values())), options.steps, options.worker, options.latents)
        return
    probe.MOST_ROUNDS = options.probe_rounds
    runs: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        found: dict[int, list[dict[str, float]]] = {processes: [] for processes in options.processes}
        for _ in range(options.rounds):
            for processes in options.processes:
                plan = predicted(shape, processes)
                clock, processor = measured(name, processes, options.steps)
                load = psutil.getloadavg()[0]
                row = {f"predicted_{key}": value for key, value in plan.items()}
                found[processes].append(row | {"clock": clock, "processor": processor, "load": load})
        for processes, rounds in found.items():
            least = {key: min(each[key] for each in rounds) for key in rounds[0]}
            least["load"] = statistics.median(each["load"] for each in rounds)
            runs.append({"shape": name, "processes": processes} | least)
            print(line(runs[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"cores": os.cpu_count(), "rounds": options.rounds, "runs": runs}) + "\n")


def line(run: dict[str, Any]) -> str:
    """Return a row of the table in docs/scale.md."""

    def pair(key: str) -> str:
        a, b = run[f"predicted_{key}"] * 1000, run[key] * 1000
        return f"{a:.1f} | {b:.1f} | {a / b - 1:+.0%}"

    return f"| {run['shape']} | {run['processes']} | {pair('processor')} | {pair('clock')} | {run['load']:.1f} |"


if __name__ == "__main__":
    main()
