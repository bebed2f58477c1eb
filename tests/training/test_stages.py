"""Progress of stages: bars on a terminal, lines in a log."""

import io
import logging
import threading

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
            if "of 3 steps" in lines[-1]:
                written.set()

    handler = Handler()
    monkeypatch.setattr(stages.log, "level", logging.INFO)
    stages.log.addHandler(handler)
    try:
        with stage("circuits", 3, "steps"), stage("inner", 2, "tasks"):
            assert written.wait(60)
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
