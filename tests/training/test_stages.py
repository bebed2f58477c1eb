"""Progress of stages: bars on a terminal, lines in a log."""

import io
import logging
import sys
import threading
import types

import pytest

from sparsary.training import stages
from sparsary.training.console import StandardErrorHandler
from sparsary.training.stages import DISPLAY, StageProgress, duration, rounded, stage


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the stages read, set by the test."""
    now = [100.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_unit_that_takes_minutes_is_shown_by_its_time(clock):
    shown = StageProgress("probing", 6, "tasks")
    clock[0] += 150
    shown.update(1)
    assert shown.figures() == "17 %  1 of 6 tasks  2 min 30 s per task  12 min 30 s left"
    shown.close()


def test_rate_and_time_left_count_from_the_first_step(clock):
    shown = StageProgress("training topk", 10_000, done=2_000)
    assert shown.figures() == "20 %  2,000 of 10,000 tokens"
    # The first step compiles kernels: 30 seconds.
    clock[0] += 30
    shown.update(3_000)
    assert shown.figures() == "30 %  3,000 of 10,000 tokens  33.3 tokens/s  3 min 30 s left"
    clock[0] += 2
    shown.update(5_000, "fvu 0.1")
    assert shown.rate() == 1000
    assert shown.figures() == "50 %  5,000 of 10,000 tokens  1,000 tokens/s  5.0 s left  fvu 0.1"
    # Where there is less room, what training says of itself stays.
    assert shown.figures(60) == "50 %  1,000 tokens/s  5.0 s left  fvu 0.1"
    assert shown.figures(30) == "50 %  5.0 s left  fvu 0.1"
    shown.close()
    shown.close()
    assert not DISPLAY.bars


def test_a_log_has_a_line_at_the_start_one_per_minute_and_one_at_the_end(clock, caplog):
    caplog.set_level(logging.INFO)
    with stage("harvest", 1_000_000) as shown:
        clock[0] += 1
        shown.update(200_000)
        clock[0] += 59
        shown.update(300_000)
        # Updates write nothing, only the thread does, once a minute.
        assert caplog.messages == ["harvest: 1,000,000 tokens"]
        DISPLAY.log_open()
        clock[0] += 40
        shown.update(1_000_000)
    assert caplog.messages[1:] == [
        "harvest: 30 %  300,000 of 1,000,000 tokens  1,690 tokens/s  6 min 53 s left",
        "harvest: 1,000,000 tokens in 1 min 40 s, 10,000 tokens/s",
    ]


def test_lines_come_without_updates_too_and_end_with_the_last_stage(monkeypatch):
    monkeypatch.setattr(stages, "LOG_SECONDS", 0.001)
    written, lines = threading.Event(), []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())
            # Lines are written as soon as the first stage is open, maybe before the second is.
            if "of 2 tasks" in lines[-1]:
                written.set()

    handler = Handler()
    monkeypatch.setattr(stages.log, "level", logging.INFO)
    stages.log.addHandler(handler)
    try:
        with stage("circuits", 3, "steps"), stage("inner", 2, "tasks"):
            assert written.wait(600)
    finally:
        stages.log.removeHandler(handler)
    assert "circuits: 0 %  0 of 3 steps" in lines
    assert "inner: 0 %  0 of 2 tasks" in lines
    assert DISPLAY.stopped.is_set()


def test_a_failed_stage_says_where_it_stopped(caplog):
    caplog.set_level(logging.INFO)

    def fail():
        with stage("evaluation", 500) as shown:
            shown.update(120)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert caplog.messages == ["evaluation: 500 tokens", "evaluation: stopped at 120 of 500 tokens."]


def test_a_terminal_gets_one_live_display_and_log_lines_stay_whole(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    logger = logging.getLogger("sparsary.test_stages")
    handler = StandardErrorHandler()
    logger.addHandler(handler)
    try:
        with stage("training a", 1000) as first, stage("training b", 1000):
            progress = DISPLAY.progress
            clock[0] += 1
            first.update(250)
            logger.warning("a warning")
            progress.refresh()
            written = terminal.getvalue()
    finally:
        logger.removeHandler(handler)
    assert DISPLAY.progress is None
    for words in ("training a", "training b", "25 %  250 of 1,000 tokens  250 tokens/s  3.0 s left", "a warning\n"):
        assert words in written
    # No start line: the bar says it.
    assert "training a: 1,000 tokens" not in written


def test_numbers_are_short():
    assert [rounded(value) for value in (1234567.8, 100.4, 99.96, 0.00123456)] == ["1,230,000", "100", "100", "0.00123"]
    assert [duration(seconds) for seconds in (59.6, 3599.6, 86400)] == ["1 min 00 s", "1 h 00 min", "24 h 00 min"]


class Cell:
    """Interface of a kernel's IPython: the number of the running cell, and displays that are updated."""

    def __init__(self, monkeypatch):
        self.outputs, self.updates = [], 0
        self.shell = types.SimpleNamespace(kernel=None, execution_count=1)
        ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        ipython.get_ipython, display.display = lambda: self.shell, self.display
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def display(self, data, raw, display_id):
        at = len(self.outputs)
        self.outputs.append(data["text/plain"])
        return types.SimpleNamespace(update=lambda data, raw: self.update(at, data["text/plain"]))

    def update(self, at, text):
        self.outputs[at] = text
        self.updates += 1


def test_a_notebook_s_cell_has_one_output_for_all_its_stages(monkeypatch, clock, caplog):
    cell = Cell(monkeypatch)
    caplog.set_level(logging.INFO)
    with stage("harvest", 1000) as shown:
        assert cell.outputs == [f"harvest  {20 * '─'}  0 %  0 of 1,000 tokens"]
        clock[0] += 1
        for done in range(1, 501):
            # A notebook would be flooded with 500 updates.
            shown.update(done)
        assert cell.updates == 2
        assert cell.outputs == [f"harvest  {20 * '─'}  0 %  1 of 1,000 tokens  1 tokens/s  16 min 39 s left"]
        clock[0] += 1
        shown.update(500)
        assert cell.outputs[0].startswith(f"harvest  {10 * '━'}{10 * '─'}  50 %  500 of 1,000 tokens")
    with stage("training", 10) as shown:
        assert cell.outputs[0].splitlines()[0] == "harvest: 500 tokens in 2.0 s, 250 tokens/s"
        assert cell.outputs[0].splitlines()[1].startswith("training  ─")
    assert len(cell.outputs) == 1
    # Log lines are for those who ask for them: the end of a stage, as on a terminal.
    assert [line.split(":")[0] for line in caplog.messages] == ["harvest", "training"]
    cell.shell.execution_count = 2
    with stage("evaluation", 5):
        pass
    assert cell.outputs[1] == "evaluation: 0 tokens in 0.0 s"


def test_many_stages_of_a_cell_stay_short(monkeypatch, clock):
    cell = Cell(monkeypatch)
    for number in range(25):
        with stage(f"run {number}", 5):
            pass
    lines = cell.outputs[0].splitlines()
    assert lines[0] == "... 15 earlier stages"
    assert lines[-1] == "run 24: 0 tokens in 0.0 s"
    assert len(lines) == 11


def test_a_program_that_imports_ipython_is_no_notebook(monkeypatch, caplog):
    cell = Cell(monkeypatch)
    cell.shell = None
    caplog.set_level(logging.INFO)
    with stage("harvest", 5):
        pass
    assert cell.outputs == []
    assert caplog.messages[0] == "harvest: 5 tokens"
