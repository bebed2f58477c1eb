"""Throughput of data-parallel processes of one thread each against one process with as many threads.

    .venv/bin/python docs/studies/throughput.py [--tokens 4096 8192 16384] [--rounds 3] [--processes 2] [--json FILE]

TopK of width 768 with 12,288 latents and k 32 on random activations; the global batch is the same in both. Rounds alternate, so
that a slow minute of the machine meets both. Prints, for each batch size, the median tokens per second of both and their ratio
(above 1: several processes are faster); then the processor seconds per step, of all processes together, and their ratio, which
other load on the machine changes less. An idle thread of the single process sleeps, so that it uses no processor time.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import psutil
from scale import seconds_of_steps

SHAPE = "768x12288x32"


def measure(tokens: int, processes: int, threads: int, steps: int) -> dict[str, float]:
    """Return a run's median seconds of a step: by the clock, and of the processor, of all processes together."""
    ranks = seconds_of_steps(f"{tokens}x{SHAPE}", processes, threads, steps)
    clock = max(statistics.median(seconds) for seconds, _ in ranks)
    return {"clock": clock, "processor": sum(statistics.median(seconds) for _, seconds in ranks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16_384], help="tokens of a step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="steps of a run; the first five are not counted")
    parser.add_argument("--json", help="write the figures of every round here")
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    runs: list[dict[str, Any]] = []
    for tokens in options.tokens:
        ratios: dict[str, list[float]] = {"clock": [], "processor": []}
        ways: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
        for _ in range(options.rounds):
            one = measure(tokens, 1, options.processes, options.steps)
            several = measure(tokens, options.processes, 1, options.steps)
            runs.append({"tokens": tokens, "one": one, "several": several, "load": psutil.getloadavg()[0]})
            for found, way in zip((one, several), ways, strict=True):
                way.append(found)
            for key, each in ratios.items():
                each.append(one[key] / several[key])
        for key, unit in (("clock", "tokens/s"), ("processor", "ms of processor time a step")):
            one, several = (statistics.median(run[key] for run in way) for way in ways)
            shown = [tokens / x if key == "clock" else x * 1000 for x in (one, several)]
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios[key])
            print(
                f"{tokens:6}: {shown[0]:6.0f} and {shown[1]:6.0f} {unit}; ratio {statistics.median(ratios[key]):.2f} ({each})",
                flush=True,
            )
    if options.json:
        figures = {"shape": SHAPE, "processes": options.processes, "cores": os.cpu_count(), "runs": runs}
        Path(options.json).write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
