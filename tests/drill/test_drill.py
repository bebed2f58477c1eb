"""The reduced fault drill: two faults in one process, more in the long ones; ``make drill`` injects three hundred."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).with_name("drill.py")


@pytest.mark.parametrize(
    "options",
    [
        ["--faults", "16", "--one-process"],
        ["--faults", "4", "--only", "train 2"],
        ["--faults", "2", "--only", "SIGKILL save 1", "SIGTERM harvest 1"],
    ],
    ids=["sixteen", "two processes", "one of two kinds"],
)
def test_nothing_is_lost_or_wrong(options):
    command = [sys.executable, str(DRILL), "--seed", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, total = (line for line in done.stdout.splitlines() if line.startswith("all "))
    injected, right, clear, lost, wrong = map(int, re.findall(r"\d+", total))
    assert injected == int(options[1]) == right + clear
    assert (lost, wrong) == (0, 0)
