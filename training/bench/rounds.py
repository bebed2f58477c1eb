"""Competitors in processes of their own, which take their steps in turn: A B C, A B C, one at a time.

A disturbance of the machine then meets all of them, and what is compared is taken within a round: the ratio of two
competitors is the median over rounds of their ratio in the same round.
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
# A process that is silent for so long is given up; the slowest step known takes tens of seconds.
ANSWER_SECONDS = 600.0
# OpenMP's threads spin for some milliseconds after a step; the next competitor is not to feel it.
PAUSE_SECONDS = 0.02


class Competitor:
    """A process that holds a step ready, and what its steps took.

    ``error`` says in one line why it takes no part (any more). ``seconds`` holds every counted time by what was ordered.
    """

    def __init__(self, task: BenchTask, command: list[str], environment: dict[str, str]):
        self.task = task
        self.seconds: dict[str, list[float]] = {order: [] for order in (["product"] if task.product else []) + ["step"]}
        self.memory_bytes: int | None = None
        self.version: str | None = None
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
        """Until the step is ready."""
        self.version = self._ask(None).get("version")

    def settle(self) -> None:
        """Let the peak of memory count from now on."""
        self._ask("settle")

    def take(self, order: str, counted: bool) -> None:
        """One step, or one product."""
        answer = self._ask(order)
        if answer and counted:
            self.seconds[order].append(answer["seconds"])
            self.memory_bytes = answer.get("memory_bytes", self.memory_bytes)

    def end(self) -> None:
        """Let the process go."""
        if self._process is not None:
            assert self._process.stdin is not None
            # It may be gone already, with an order unread.
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
        """The answer to an order (None: to having been started); empty if there is none, and ``error`` then says why."""
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
        # The last line of a traceback is the exception; killed for memory, a process says nothing.
        return said[-1] if said and status > 0 else f"ended with status {status}"


@contextmanager
def started(tasks: list[tuple[BenchTask, list[str]]]) -> Iterator[list[Competitor]]:
    """All tasks' processes, ready or failed; they end with the context."""
    competitors: list[Competitor] = []
    # Our own packages are found where this file is, installed or not.
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
    """Every competitor's step once a round, in the same order; the first rounds are not counted."""
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
    """Median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Exponent of growth: least squares through the logarithms."""
    return statistics.linear_regression(*([math.log(value) for value in values] for values in (sizes, seconds))).slope
