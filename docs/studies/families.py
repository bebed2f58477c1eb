"""Table of docs/families.md: means over seeds, 95 % intervals over seeds and documents, dead latents by both windows.

sparsary compare recipes/embedded --seeds 3 --out runs/compare-embedded --against topk
.venv/bin/python docs/studies/families.py runs/compare-embedded/comparison.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

FIGURES = (
    ("CE increase", "ce_increase", ".4f"),
    ("KL", "kl_spliced", ".4f"),
    ("l0", "l0_mean", ".2f"),
    ("dead, scored", "dead_fraction", ".1%"),
    ("dead, training", "dead_training_fraction", ".1%"),
    ("dense", "dense_fraction", ".1%"),
    ("linear error", "linear_error_share", ".2f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    families = json.loads(parser.parse_args().comparison.read_text(encoding="utf-8"))["families"]
    print("| encoder | fvu | " + " | ".join(label for label, _, _ in FIGURES) + " |\n|" + "---|" * (2 + len(FIGURES)))
    for family in sorted(families, key=lambda family: family["figures"]["fvu"]["mean"]):
        fvu = family["figures"]["fvu"]
        cells = [f"{fvu['mean']:.4f} ({fvu['low']:.4f}-{fvu['high']:.4f})"]
        cells += [_cell(family["figures"].get(key), form) for _, key, form in FIGURES]
        print(f"| `{family['name']}`{' (off target)' * family['off_target']} | " + " | ".join(cells) + " |")


def _cell(figure: dict[str, Any] | None, form: str) -> str:
    return "-" if figure is None or figure["mean"] is None else format(figure["mean"], form)


if __name__ == "__main__":
    main()
