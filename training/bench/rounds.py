"""Scheduler of a benchmark: competitors run in separate processes and take steps in turn, A B C, A B C, one at a time.

Background load then affects all of them alike, and comparisons are made within a round: the ratio of two competitors is the
median over rounds of their ratio in the same round.
"""

import json
import math
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .worker import BenchTask

WARMUP_ROUNDS = 2
# Timeout of one order; the slowest known step takes tens of seconds.
ANSWER_SECONDS = 600.0
# OpenMP threads spin for some milliseconds after a step and would slow down the next competitor.
PAUSE_SECONDS = 0.02


class Competitor:
    """Benchmarked process and its measured times.

    ``error`` is a one-line reason why it was dropped. ``seconds`` holds the counted times by order ("product", "step").
    """

    def __init__(self, task: BenchTask, command: list[str], environment: dict[str, str]):
        self.task = task
        self.seconds: dict[str, list[float]] = {order: [] for order in (["product"] if task.product else []) + ["step"]}
        self.memory_bytes: int | None = None
        self.version: str | None = None
        # L0 and entries per token of our steps.
        self.counted: dict[str, float] = {}
        self.error: str | None = None
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                [*command, json.dumps(asdict(task))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=environment,
                text=True,
            )
        except OSError as error:
            self.error = f"{command[0]}: {error.strerror}"

    def wait(self) -> None:
        """Wait until the process is ready to take steps."""
        self.version = self._ask(None).get("version")

    def settle(self) -> None:
        """Reset the process's peak memory counter."""
        self._ask("settle")

    def take(self, order: str, counted: bool) -> None:
        """Run one order ("step" or "product") and record its time if ``counted``."""
        answer = self._ask(order)
        if answer and counted:
            self.seconds[order].append(answer["seconds"])
            self.memory_bytes = answer.get("memory_bytes", self.memory_bytes)
            self.counted = answer.get("counted") or self.counted

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            # The process may have exited with an unread order.
            try:
                self._process.stdin.close()
                self._process.wait(5)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        self._complaints.close()

    def _ask(self, order: str | None) -> dict[str, Any]:
        """Send an order (None: await the start-up message) and return the answer; on failure set ``error`` and return {}."""
        if self.error is not None:
            return {}
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        given_up = threading.Event()

        def give_up() -> None:
            given_up.set()
            process.kill()

        patience = threading.Timer(ANSWER_SECONDS, give_up)
        patience.start()
        try:
            if order is not None:
                process.stdin.write(order + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            patience.cancel()
        if not line:
            self.error = self._last_words(process, given_up.is_set())
            return {}
        return json.loads(line)

    def _last_words(self, process: subprocess.Popen[str], given_up: bool) -> str:
        status = process.wait()
        if given_up:
            return f"no answer within {ANSWER_SECONDS:.0f} s"
        self._complaints.seek(0)
        words = self._complaints.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in words if line.strip()]
        # The last line of a traceback is the exception; a process killed for memory leaves no message.
        return said[-1] if said and status > 0 else f"ended with status {status}"


@contextmanager
def started(tasks: list[tuple[BenchTask, list[str]]]) -> Iterator[list[Competitor]]:
    """Yield the processes of all tasks, ready or failed; they end with the context."""
    competitors: list[Competitor] = []
    # Makes this source tree's sparsary importable even if it is not installed.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    try:
        for task, command in tasks:
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(task.threads))
            competitors.append(Competitor(task, command, {**os.environ, **threads, "PYTHONPATH": path}))
        for competitor in competitors:
            competitor.wait()
        yield competitors
    finally:
        for competitor in competitors:
            competitor.end()


def take_turns(
    competitors: list[Competitor], rounds: int, done: Callable[[], None] = lambda: None, warmup: int = WARMUP_ROUNDS
) -> None:
    """Run every competitor's orders once per round, in the same sequence; warm-up rounds are not counted."""
    for number in range(warmup + rounds):
        if number == warmup:
            for competitor in competitors:
                competitor.settle()
        for competitor in competitors:
            for order in competitor.seconds:
                time.sleep(PAUSE_SECONDS)
                competitor.take(order, number >= warmup)
        done()


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Return the growth exponent: the least-squares slope of log seconds against log size."""
    return statistics.linear_regression(*([math.log(value) for value in values] for values in (sizes, seconds))).slope
