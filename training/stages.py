"""Progress of a command's stages (harvest, training, evaluation, ...): bars on a terminal or in a notebook, else log lines."""

import importlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

# Seconds between the log lines of a stage, where standard error is not a terminal.
LOG_SECONDS = 60.0
# Columns below which the bar itself is left out, so that the figures fit.
WIDE = 100
# Units a second below which the time of one unit is shown instead.
SLOWEST_RATE = 0.2
# A notebook's output is updated no more often than this, in seconds, and shows this many finished stages of a cell.
NOTEBOOK_SECONDS = 0.3
NOTEBOOK_LINES = 10
BAR, FULL, EMPTY = 20, "\u2501", "\u2500"

log = logging.getLogger(__name__)


class StageProgress:
    """One stage of a command: the amount done, the rate and the time left.

    On a terminal a stage is a progress bar. In a notebook all stages of a cell share one output: a bar for each open stage, a
    line for each finished one. Elsewhere a stage is logged: a line at the start, one per minute, and one at the end. The rate
    and the time left count from the end of the first step, which may include one-time work such as the compilation of kernels.

    Args:
        name: Shown in front, for example ``harvest``.
        total: Amount to do.
        unit: Plural noun for the amounts.
        done: Amount done before, by an interrupted run; it does not count for the rate.

    >>> stage = StageProgress("harvest", 2000)
    >>> stage.update(500)
    >>> stage.figures().split("  ")[:2]
    ['25 %', '500 of 2,000 tokens']
    >>> stage.close()
    """

    def __init__(self, name: str, total: int, unit: str = "tokens", done: int = 0):
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.stats = ""
        self.begun = self.first = self.latest = (time.perf_counter(), done)
        self.updates = 0
        self.closed = False
        DISPLAY.open(self)

    def update(self, done: int, stats: str | None = None) -> None:
        """Record the amount done so far, and optionally further figures to show."""
        self.done, self.stats = done, self.stats if stats is None else stats
        if done > self.latest[1]:
            self.latest = (time.perf_counter(), done)
            self.first = self.first if self.updates else self.latest
            self.updates += 1
        DISPLAY.refresh()

    def rate(self) -> float | None:
        """Return the amount per second since the first step; since the start if there was one step only."""
        since = self.first if self.updates > 1 else self.begun
        seconds, done = (now - then for now, then in zip(self.latest, since, strict=True))
        return done / max(seconds, 1e-9) if done else None

    def figures(self, columns: int | None = None) -> str:
        """Return the share done, the amounts, the rate, the time left and the further figures.

        Args:
            columns: Room there is; amounts, then the rate, are left out if they do not fit.
        """
        share = f"{self.done / self.total:.0%}".replace("%", " %") if self.total else ""
        amounts, rate, left = f"{self.done:,} of {self.total:,} {self.unit}", "", ""
        if per_second := self.rate():
            rate = self._speed(per_second)
            if self.done < self.total:
                left = f"{duration((self.total - self.done) / per_second)} left"
        lines = (
            "  ".join(part for part in parts if part)
            for parts in ((share, amounts, rate, left, self.stats), (share, rate, left, self.stats), (share, left, self.stats))
        )
        shortest = ""
        for shortest in lines:
            if columns is None or len(shortest) <= columns:
                break
        return shortest

    def close(self, failed: bool = False) -> None:
        """End the stage and log its amount and time. A failed one is logged only if it did something."""
        if self.closed:
            return
        self.closed = True
        outcome = self._outcome(failed)
        DISPLAY.close(self, outcome)
        log.info("%s", outcome)

    def _speed(self, per_second: float) -> str:
        """Return the rate in words: units a second, or the time of one unit that takes seconds."""
        slow = per_second < SLOWEST_RATE
        return (
            f"{duration(1 / per_second)} per {self.unit.removesuffix('s')}" if slow else f"{rounded(per_second)} {self.unit}/s"
        )

    def _outcome(self, failed: bool) -> str:
        if failed:
            return f"{self.name}: stopped at {self.done:,} of {self.total:,} {self.unit}."
        seconds = time.perf_counter() - self.begun[0]
        done = self.done - self.begun[1]
        rate = f", {self._speed(done / seconds)}" if done and seconds else ""
        stats = f"  {self.stats}" if self.stats else ""
        return f"{self.name}: {done:,} {self.unit} in {duration(seconds)}{rate}{stats}"


@contextmanager
def stage(name: str, total: int, unit: str = "tokens", done: int = 0) -> Iterator[StageProgress]:
    """Show a block of work as a stage, which the block updates."""
    shown = StageProgress(name, total, unit, done)
    try:
        yield shown
    except BaseException as error:
        # A generator that is no longer needed ends its stage without failure.
        shown.close(failed=not isinstance(error, GeneratorExit))
        raise
    shown.close()


class _Figures(ProgressColumn):
    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        # What the name and the bar, if there is one, leave.
        room = self.console.width - len(task.description) - 2 - (22 if self.console.width >= WIDE else 0)
        return Text(task.fields["stage"].figures(room), no_wrap=True, overflow="ellipsis")


class _CellOutput:
    """Output of one notebook cell, updated in place: its finished stages, the latest last, and a bar for each open one."""

    def __init__(self, cell: int):
        self.cell = cell
        self.finished: list[str] = []
        self.updated = -NOTEBOOK_SECONDS
        # Plain text: it also reads well where HTML is not shown, as in a notebook's diff.
        self.handle: Any = importlib.import_module("IPython.display").display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, stages: Iterable[StageProgress], now: bool = True) -> None:
        """Update the output; unless ``now``, only if the last update is long enough ago."""
        seconds = time.perf_counter()
        if not now and seconds - self.updated < NOTEBOOK_SECONDS:
            return
        self.updated = seconds
        left_out = len(self.finished) - NOTEBOOK_LINES
        earlier = [f"... {left_out} earlier stages"] if left_out > 0 else []
        lines = [*earlier, *self.finished[-NOTEBOOK_LINES:], *map(_with_bar, stages)]
        self.handle.update({"text/plain": "\n".join(lines)}, raw=True)


def _with_bar(shown: StageProgress) -> str:
    full = round(BAR * min(1.0, shown.done / shown.total)) if shown.total else 0
    return f"{shown.name}  {FULL * full}{EMPTY * (BAR - full)}  {shown.figures()}"


class _Display:
    """All open stages of the process.

    A terminal has one live display, a notebook's cell one output, and a log one thread that writes every minute.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bars: dict[StageProgress, TaskID | None] = {}
        self.progress: Progress | None = None
        self.output: _CellOutput | None = None
        self.stopped = threading.Event()

    def open(self, shown: StageProgress) -> None:
        with self.lock:
            if on_terminal():
                if self.progress is None:
                    self.progress = _progress()
                    self.progress.start()
                self.bars[shown] = self.progress.add_task(shown.name, total=shown.total, completed=shown.done, stage=shown)
                return
            if (cell := notebook_cell()) is not None:
                self.bars[shown] = None
                if self.output is None or self.output.cell != cell:
                    self.output = _CellOutput(cell)
                self.output.show(self.bars)
                return
            self.output = None
            if not self.bars and log.isEnabledFor(logging.INFO):
                self.stopped = threading.Event()
                threading.Thread(target=self._log_every_minute, args=(self.stopped,), daemon=True).start()
            self.bars[shown] = None
        log.info("%s: %s %s", shown.name, f"{shown.total - shown.done:,}", shown.unit)

    def refresh(self) -> None:
        """Update the output of a notebook's cell; terminals and logs are updated by threads."""
        if self.output is not None:
            with self.lock:
                self.output.show(self.bars, now=False)

    def close(self, shown: StageProgress, outcome: str) -> None:
        with self.lock:
            bar = self.bars.pop(shown)
            if self.output is not None:
                self.output.finished.append(outcome)
                self.output.show(self.bars)
            if self.progress is not None and bar is not None:
                self.progress.remove_task(bar)
            if not self.bars:
                self.stopped.set()
                if self.progress is not None:
                    self.progress.stop()
                    self.progress = None

    def log_open(self) -> None:
        """Log one line per open stage."""
        with self.lock:
            shown = list(self.bars)
        for each in shown:
            log.info("%s: %s", each.name, each.figures())

    def _log_every_minute(self, stopped: threading.Event) -> None:
        while not stopped.wait(LOG_SECONDS):
            self.log_open()


class _Bar(ProgressColumn):
    def __init__(self, console: Console):
        super().__init__()
        self.console, self.bar = console, BarColumn(bar_width=20)

    def render(self, task: Task) -> RenderableType:
        task.completed = task.fields["stage"].done
        return self.bar.render(task) if self.console.width >= WIDE else Text("")


def on_terminal() -> bool:
    """Return True if progress bars can be shown on standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def notebook_cell() -> int | None:
    """Return the number of the notebook cell that is running; ``None`` outside a Jupyter kernel."""
    # The kernel has imported IPython; a program that has not is not in a notebook.
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return None if shell is None or not hasattr(shell, "kernel") else shell.execution_count


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(TextColumn("{task.description}"), _Bar(console), _Figures(console), console=console, transient=True)


def rounded(value: float) -> str:
    """Format a positive number with three significant digits and thousands separators.

    >>> rounded(61234.5), rounded(0.012345)
    ('61,200', '0.0123')
    """
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format a duration with its two largest units.

    >>> duration(0.41), duration(17), duration(144), duration(7500)
    ('0.4 s', '17 s', '2 min 24 s', '2 h 05 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole:02} s" if minutes else f"{whole} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


DISPLAY = _Display()
