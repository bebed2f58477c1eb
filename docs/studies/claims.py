"""What the papers claim, against a comparison: paired differences to TopK over seeds, with 95 % intervals.

    sparsary compare recipes/embedded --seeds 3 --out runs/compare-embedded
    .venv/bin/python docs/studies/claims.py runs/compare-embedded/comparison.json

A difference is a family's figure less TopK's at the same seed, which fixes the initial weights and the order of the tokens;
the interval is Student's t over seeds. "no difference" means that it contains 0.
"""

import argparse
import json
import math
import statistics

from scipy.stats import t

CLAIMS = (
    ("mutual_choice", "dead_fraction", "fewer dead latents than TopK (Ayonrinde 2024)"),
    ("mutual_choice", "fvu", "reconstructs better than TopK (Ayonrinde 2024)"),
    ("feature_choice", "dead_fraction", "fewer dead latents than TopK, none in the end (Ayonrinde 2024)"),
    ("feature_choice", "fvu", "reconstructs better than TopK (Ayonrinde 2024)"),
    ("gradient_topk", "ce_increase", "loses less cross-entropy than TopK, plain inference (Olmo et al. 2024)"),
    ("gradient_topk", "dead_fraction", "fewer dead latents than TopK (Olmo et al. 2024)"),
    ("matching_pursuit", "fvu", "reconstructs better than TopK at equal l0 (Costa et al. 2025)"),
    ("batch_topk", "fvu", "reconstructs better than TopK (Bussmann et al. 2024)"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison")
    options = parser.parse_args()
    with open(options.comparison) as handle:
        families = {family["name"]: family["figures"] for family in json.load(handle)["families"]}
    print("| claim | TopK | here | difference, 95 % interval | holds |\n|---|---|---|---|---|")
    for family, figure, claim in CLAIMS:
        if family not in families:
            continue
        ours, theirs = families[family][figure]["values"], families["topk"][figure]["values"]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        mean = statistics.mean(differences)
        half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
        # All of these figures are better when lower.
        verdict = "yes" if mean + half < 0 else ("no: the opposite" if mean - half > 0 else "no difference")
        print(
            f"| `{family}` {claim} | {statistics.mean(theirs):.4g} | {statistics.mean(ours):.4g} "
            f"| {mean:+.4g} ({mean - half:+.4g} to {mean + half:+.4g}) | {verdict} |"
        )


if __name__ == "__main__":
    main()
