"""Sets the seconds of ``slow.txt`` from a run's report, and lists slow tests that have no line.

.venv/bin/pytest -m "not gpu and not network and not parity and not bench" --junitxml report.xml
.venv/bin/python tests/slow_seconds.py report.xml
"""

import argparse
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SLOW = Path(__file__).with_name("slow.txt")
# From here on a test is worth a line.
LEAST = 0.5


def measured(report: Path) -> dict[str, float]:
    """Return the seconds of every test of a junit report by its id, less those that were skipped."""
    cases = [case for case in ElementTree.parse(report).iter("testcase") if case.find("skipped") is None]
    return {f"{c.get('classname', '').replace('.', '/')}.py::{c.get('name')}": float(c.get("time", 0)) for c in cases}


def updated(text: str, seconds: dict[str, float]) -> tuple[str, set[str]]:
    """Return the text of ``slow.txt`` with the seconds of the tests that were run, and the ids that its lines cover."""
    lines, covered = [], set()
    for line in text.splitlines():
        match = re.fullmatch(r"(long)? *([\d.]+) (.*)", line)
        if match is None:
            lines.append(line)
            continue
        long, old, entry = match.groups()
        pattern = re.compile(re.escape(entry).replace(r"\*", ".*") + r"(::.*|\[.*)?")
        own = [name for name in seconds if pattern.fullmatch(name)]
        covered |= set(own)
        # A long line of tests that were not run keeps what it has.
        value = sum(seconds[name] for name in own) if own else float(old)
        lines.append(f"{long or '':4} {max(value, 0.1):6.1f} {entry}")
    return "\n".join(lines) + "\n", covered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    seconds = measured(parser.parse_args().report)
    text, covered = updated(SLOW.read_text(encoding="utf-8"), seconds)
    SLOW.write_text(text, encoding="utf-8")
    for name in sorted(seconds.keys() - covered, key=lambda name: -seconds[name]):
        if seconds[name] >= LEAST:
            print(f"{seconds[name]:6.1f} {name}")


if __name__ == "__main__":
    main()
