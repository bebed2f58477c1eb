"""Results of studies as JSON with one record per line, so that changing one figure changes one line.

Studies write with ``write_results``; files of ``sparsary bench --json``, ``sparsary compare`` and tests/parity/compare_topk.py
are reformatted by

    .venv/bin/python docs/studies/results.py FILE...
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsary.sae.files import write_text

# Longest line, in characters, for a value that contains records.
WIDTH = 600


def lines(value: Any, indent: str = "") -> Iterator[str]:
    """Yield the lines of a value: one line per record (numbers, strings and lists of them), else one per member."""
    whole = json.dumps(value, allow_nan=False)
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(whole) <= WIDTH or not any(map(_holds_records, members)):
        yield whole
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    yield opening
    for number, (name, member) in enumerate(value.items() if isinstance(value, dict) else enumerate(value), 1):
        head = f"{json.dumps(name)}: " if isinstance(value, dict) else ""
        first, *others = lines(member, indent + " ")
        *body, last = [f"{indent} {head}{first}", *others]
        yield from body
        yield last + ("," if number < len(value) else "")
    yield indent + closing


def _holds_records(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(member, dict) for member in value))


def write_results(path: Path, value: Any) -> None:
    """Write JSON atomically with one record per line. NaN and infinities raise an error, because they are not JSON."""
    write_text(path, "\n".join(lines(value)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        write_results(path, json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
