"""Comparison of two folders of outputs, figure by figure: ``python docs/studies/same_outputs.py BEFORE AFTER``.

For changes that must not alter any figure: run the same commands in two checkouts, then compare their outputs. Tensors must
have equal bytes, JSON equal values; commits, paths, times and addresses of files may differ. Exit status 1 if they do not
match.
"""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

# Keys for where, when and how fast a result was made.
IGNORED = {
    "git_commit",
    "tokens_per_second",
    "seconds",
    "data_wait_share",
    "datetime_epoch_millis",
    "path",
    "page_path",
    "report_path",
}
# Hash of a file whose header names the commit.
IGNORED |= {"weights_sha256", "checksum"}


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Return one line for each value of a JSON document that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted((before.keys() | after.keys()) - IGNORED)
        return [
            line
            for key in keys
            for line in (
                differences(before[key], after[key], f"{where}.{key}")
                if key in before and key in after
                else [f"{where}.{key}: only {'before' if key in before else 'after'}"]
            )
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [line for i, pair in enumerate(zip(before, after, strict=True)) for line in differences(*pair, f"{where}[{i}]")]
    return [] if before == after else [f"{where}: {str(before)[:60]} -> {str(after)[:60]}"]


def compare_files(before: Path, after: Path) -> list[str]:
    """Return one line for each difference between two files of the same name."""
    if before.suffix == ".safetensors":
        old, new = load_file(before), load_file(after)
        names = sorted(old.keys() | new.keys())
        equal = {
            name
            for name in old.keys() & new.keys()
            if old[name].dtype == new[name].dtype and old[name].numpy().tobytes() == new[name].numpy().tobytes()
        }
        return [f"{name}: tensors differ" for name in names if name not in equal]
    if before.suffix == ".jsonl":
        lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (before, after)]
        return differences(*lines)
    return differences(json.loads(before.read_text()), json.loads(after.read_text()))


def main() -> None:
    """Print the differences, at most a few per file."""
    roots = [Path(argument) for argument in sys.argv[1:]]
    if len(roots) != 2:
        sys.exit("same_outputs.py: expected two folders, BEFORE and AFTER.")
    names = [
        {
            str(p.relative_to(r))
            for s in ("safetensors", "json", "jsonl")
            for p in r.rglob(f"*.{s}")
            if "eval_cache" not in p.parts
        }
        for r in roots
    ]
    missing = sorted(names[0] ^ names[1])
    found = {name: compare_files(roots[0] / name, roots[1] / name) for name in sorted(names[0] & names[1])}
    for name, lines in found.items():
        print(f"{'equal ' if not lines else 'DIFFER'} {name}")
        for line in lines[:8]:
            print(f"       {line}")
    for name in missing:
        print(f"ONLY {'BEFORE' if name in names[0] else 'AFTER'} {name}")
    print(f"{sum(not lines for lines in found.values())} of {len(found)} files equal, {len(missing)} on one side only")
    sys.exit(1 if missing or any(found.values()) else 0)


if __name__ == "__main__":
    main()
