"""Time until a resumed run makes its first step, beside the time of importing torch alone.

    .venv/bin/python docs/studies/resume.py [--recipe recipes/quickstart.yaml] [--rounds 3] [key.sub=value ...]

The recipe is first trained for a hundred steps, harvest included, in a temporary folder, and stopped as by Ctrl-C. Then the
same command resumes it until its first step, and torch is imported, in turn. Prints the least of all rounds: seconds by the
clock, from the start of the process, and of the processor. Python compiles the modules in the first round, unless
PYTHONDONTWRITEBYTECODE forbids it to keep them: every round then does.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 100


def stop_at(steps: int, began: float) -> None:
    """Train by the command line's arguments up to step ``steps``, then stop; print the times of the first step."""
    import sparsary
    from sparsary.training import loop

    own, made = loop.step, 0

    def counted(*arguments: Any) -> Any:
        nonlocal made
        if made == 0 and steps == 1:
            print(time.time() - began, time.process_time(), flush=True)
            os._exit(0)
        made += 1
        if made == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return own(*arguments)

    loop.step = counted
    sparsary.main()


def run(steps: int, arguments: list[str], folder: str) -> str:
    """Train in a process of its own, which stops at step ``steps``; return its output."""
    code = f"import resume; resume.stop_at({steps}, {time.time()})"
    command = [sys.executable, "-c", code, "train", *arguments]
    place = {"PYTHONPATH": str(Path(__file__).parent)}
    found = subprocess.run(command, cwd=folder, env=os.environ | place, check=False, capture_output=True, text=True)
    if steps == 1 and found.returncode:
        raise SystemExit(found.stderr)
    return found.stdout


def imported() -> tuple[float, float]:
    """Return the seconds of a process that imports torch and ends: by the clock, and of the processor."""
    code = "import time, torch; print(time.time(), time.process_time())"
    began = time.time()
    ended, processor = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    return ended - began, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="recipe keys to change")
    options = parser.parse_args()
    arguments = [str(Path(options.recipe).resolve()), *options.overrides]
    resumed: list[tuple[float, ...]] = []
    torch: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        run(STEPS, arguments, folder)
        for _ in range(options.rounds):
            resumed.append(tuple(map(float, run(1, arguments, folder).splitlines()[-1].split())))
            torch.append(imported())
    for name, rounds in (("first step", resumed), ("torch alone", torch)):
        clock, processor = map(min, zip(*rounds, strict=True))
        print(f"{name:12} {clock:5.2f} s, {processor:5.2f} s of processor time")


if __name__ == "__main__":
    main()
