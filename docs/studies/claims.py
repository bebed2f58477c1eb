"""Test of papers' claims on a comparison of runs: differences with intervals over seeds and documents, tested together.

    sparsary compare recipes/embedded --seeds 3 --out runs/compare-embedded --against topk
    .venv/bin/python docs/studies/claims.py runs/compare-embedded/comparison.json

Claims are records of a JSON file, docs/studies/claims.json: family, figure, claim, source; optionally against (default: TopK)
and expected (default: better; equivalent for claims of no difference). Holm's correction covers all claims. "equivalent"
means a difference below the margin that the comparison states, "undecided" that these runs show neither.
"""

import argparse
import json
from pathlib import Path

from sparsary.eval.compare.groups import family_differences
from sparsary.eval.pages.differences import verdict_words
from sparsary.eval.pages.recipes import COLUMNS

CLAIMS = Path(__file__).with_name("claims.json")
HOLDS = {"better": "yes", "worse": "no: the opposite", "equivalent": "no: no difference"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--claims", type=Path, default=CLAIMS)
    options = parser.parse_args()
    comparison = json.loads(options.comparison.read_text(encoding="utf-8"))
    figures = {family["name"]: family["figures"] for family in comparison["families"]}
    claims = [{"against": "topk"} | claim for claim in json.loads(options.claims.read_text(encoding="utf-8"))]
    here = [c for c in claims if all(c["figure"] in figures.get(c[side], ()) for side in ("family", "against"))]
    print("| claim | other | here | difference, 95 % interval | over | detectable | p (Holm) | holds |\n|" + "---|" * 8)
    for found in family_differences(comparison, COLUMNS, here):
        ours, theirs = (figures[found[side]][found["figure"]]["mean"] for side in ("family", "against"))
        known = found["low"] is not None
        ends = f" ({found['low']:+.3g} to {found['high']:+.3g})" if known else ""
        tested = f"{found['detectable']:.2g} | " if known else "- | "
        # Three seeds know the noise of seeds too badly for smaller ones.
        tested += "-" if found["p_holm"] is None else "<0.001" if found["p_holm"] < 0.001 else f"{found['p_holm']:.2g}"
        expected = found.get("expected", "better")
        holds = "yes" if found["verdict"] == expected else HOLDS.get(found["verdict"], verdict_words(found))
        holds = "no" if expected == "equivalent" and found["verdict"] in ("better", "worse") else holds
        print(
            f"| `{found['family']}` {found['claim']} ({found['source']}) | {theirs:.4g} | {ours:.4g} "
            f"| {found['difference']:+.3g}{ends} | {found['interval_over'] or '-'} | {tested} "
            f"| {holds}{', below the margin' * found['negligible']} |"
        )


if __name__ == "__main__":
    main()
