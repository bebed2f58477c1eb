"""Fault drill: harvests, trains, saves, resumes and evaluates while something is made to fail, and counts how it ends.

    make drill                                 # 300 faults, seed 0
    python tests/drill/drill.py --faults 20 --seed 3 --only "SIGKILL train 2"

Faults are drawn from the registry in ``faults.py`` by the seed; the timing of processes is the machine's own. Exit status 1 if
anything was lost or wrong.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from faults import CLEAR, LOST, RIGHT, WRONG, choose
from runs import Workshop

WORDS = (RIGHT, CLEAR, LOST, WRONG)


def table(counts: dict[tuple[str, str, int], Counter[str]]) -> str:
    """Return the counts by kind, stage and number of processes, with their sums."""
    rows = [("fault", "stage", "processes", "injected", *WORDS)]
    for (kind, stage, processes), found in sorted(counts.items()):
        rows.append((kind, stage, str(processes), str(found.total()), *(str(found[word]) for word in WORDS)))
    total = sum(counts.values(), Counter())
    rows.append(("all", "", "", str(total.total()), *(str(total[word]) for word in WORDS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def drill(faults: int, seed: int, only: Sequence[str] = (), two: bool = True, seconds: float | None = None) -> int:
    """Inject faults, print what went wrong and the counts, and return the exit status.

    Args:
        only: Parts of ``KIND STAGE PROCESSES`` of which chosen faults must have one.
        two: Include faults of runs in two processes.
        seconds: Stop after this time.
    """
    begun, counts, problems = time.monotonic(), {}, 0
    with tempfile.TemporaryDirectory(prefix="sparsary-drill-") as folder:
        os.environ["SPARSARY_CACHE"] = str(Path(folder) / "cache")
        workshop = Workshop(Path(folder))
        chosen = choose(faults, random.Random(seed), only, workshop.mounts, two)
        workshop.prepare({each.processes for each in chosen}, {each.stage for each in chosen})
        print(f"prepared in {time.monotonic() - begun:.0f} s; {len(chosen)} faults, seed {seed}", flush=True)
        for number, fault in enumerate(chosen):
            own = Path(folder) / f"fault{number}"
            own.mkdir()
            then = time.monotonic()
            outcome = fault.inject(workshop, own, random.Random(seed * 1_000_003 + number))
            key = (fault.kind, fault.stage, fault.processes)
            counts.setdefault(key, Counter())[outcome.word] += 1
            if outcome.word in (LOST, WRONG):
                problems += 1
                print(f"fault {number}, {' '.join(map(str, key))}: {outcome.word}: {outcome.why}", flush=True)
            elif sys.stdout.isatty() or os.environ.get("DRILL_VERBOSE"):
                print(f"{number}: {' '.join(map(str, key))}: {outcome.word}, {time.monotonic() - then:.1f} s", flush=True)
            workshop.clear(own)
            if seconds is not None and time.monotonic() - begun > seconds:
                break
    print(table(counts))
    print(f"{time.monotonic() - begun:.0f} s")
    return int(problems > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300, help="number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=(), help="parts of KIND STAGE PROCESSES")
    parser.add_argument("--one-process", action="store_true", help="leave out runs in two processes")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    given = parser.parse_args()
    sys.exit(drill(given.faults, given.seed, given.only, not given.one_process, given.seconds))


if __name__ == "__main__":
    main()
