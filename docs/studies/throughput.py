"""Throughput of two processes of one thread each against one process with two threads.

    .venv/bin/python docs/studies/throughput.py [--tokens 4096 8192 16384] [--rounds 3] [--json FILE]
    .venv/bin/python docs/studies/throughput.py --tokens 4096 --rounds 3

TopK of width 768 with 12,288 latents and k 32 on random activations; all ways have the same global batch. The two processes
divide each batch, or the latents (``distributed.latents: 2``). Rounds alternate, so that a slow minute meets all.
Prints a line for each batch size and way: tokens per second, the median over the steps and rounds, and the ratio to one process
(above 1 is faster); then milliseconds of processor time per step, of all processes together, the least over steps and rounds,
and the ratio of one process to them, which other load on the machine changes less. An idle thread of the single process sleeps,
so that it uses no processor time. The second command takes about two minutes on two idle cores.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from scale import seconds_of_steps

SHAPE = "768x12288x32"


@dataclass
class Way:
    """Number of processes, their threads, and how many of them divide the latents; with the seconds of each round's steps."""

    name: str
    processes: int
    threads: int
    latents: int
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def measure(self, tokens: int, steps: int) -> None:
        """Add a round: the median step of the slowest process, and the least processor time of a step of all processes."""
        ranks = seconds_of_steps(f"{tokens}x{SHAPE}", self.processes, self.threads, steps, self.latents)
        self.clock.append(max(statistics.median(seconds) for seconds, _ in ranks))
        self.processor.append(min(map(sum, zip(*(seconds for _, seconds in ranks), strict=True))))


def line(tokens: int, way: Way, one: Way) -> str:
    """Return the figures of a way beside those of one process."""
    rounds = ", ".join(f"{a / b:.2f}" for a, b in zip(one.clock, way.clock, strict=True))
    speed, ratio = tokens / statistics.median(way.clock), statistics.median(one.clock) / statistics.median(way.clock)
    return (
        f"{tokens:6} {way.name:28} {speed:6.0f} tokens/s, ratio {ratio:.2f} (rounds {rounds}); processor "
        f"{min(way.processor) * 1000:5.0f} ms, ratio {min(one.processor) / min(way.processor):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16_384], help="tokens of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="steps of a run; the first five are not counted")
    parser.add_argument("--json", help="write the figures of every round here")
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    runs = []
    for tokens in options.tokens:
        ways = [
            Way("one process", 1, 2, 1),
            Way("two that divide the batch", 2, 1, 1),
            Way("two that divide the latents", 2, 1, 2),
        ]
        for _ in range(options.rounds):
            for way in ways:
                way.measure(tokens, options.steps)
        for way in ways:
            print(line(tokens, way, ways[0]), flush=True)
            runs.append({"tokens": tokens, "way": way.name, "clock": way.clock, "processor": way.processor})
        print(f"       load {psutil.getloadavg()[0]:.1f}", flush=True)
    if options.json:
        figures = {"shape": SHAPE, "cores": os.cpu_count(), "runs": runs}
        Path(options.json).write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
