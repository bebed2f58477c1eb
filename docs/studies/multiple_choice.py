"""Multiple choice where the heads are known: what finds them, and how many directions their queries, keys and values need.

    python docs/studies/multiple_choice.py [--seeds 3] [--options 3]

Trains transformers of two layers with four heads to answer at two given heads (eval/circuits/known/choice.py), and measures on
other prompts: accuracy, AUC of the scores of discovery methods for the two heads among all eight, direct effects on the answer,
and the rank test. Half of 256 pairs fit directions and choose heads, the other half judge. Finished models are kept in
docs/results/multiple-choice.json; prints the tables of docs/circuits.md.
"""

import argparse
from pathlib import Path
from typing import Any

from results import write_results

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.heads.low_rank import HeadProjections
from sparsary.eval.circuits.heads.tables import head_tables
from sparsary.eval.circuits.known.choice import INDEX, LETTER, Choices, accuracies_of, trained_choice
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.tasks.competence import competence
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.sae.files import read_json

RESULTS = Path("docs/results/multiple-choice.json")
FINDERS = ("exact", "attribution", "integrated_activations")
PAIRS = 256
Row = dict[str, Any]


def measure(options: int, seed: int) -> Row:
    """Train one model and return its figures."""
    known = trained_choice(options, n_pairs=PAIRS, seed=seed)
    chosen, judged = known.pairs.take(slice(0, PAIRS // 2)), known.pairs.take(slice(PAIRS // 2, PAIRS))
    space = NodeSpace(known.model, components(known.model))
    truth = known.node_labels("resample", [name.replace("/", ".h") for name in space.names()])
    row: Row = {
        "options": options,
        "seed": seed,
        "accuracy": competence(known.model, judged).accuracy,
        "accuracy_patched": min(accuracies_of(known.module, Choices(options), seed + 99).values()),
    }
    for name in FINDERS:
        row[f"auc_{name}"] = roc_auc(METHODS[name]().discover(space, chosen).values.abs(), truth)
    effects, _ = head_tables(known.model, chosen, judged, seed)
    own = {effect["node"]: effect for effect in effects}
    row["largest_direct"] = effects[0]["node"]
    row["direct_share_letter"], row["direct_share_index"] = (own[node]["direct_share"] for node in (LETTER, INDEX))
    row["attention_right"], row["attends"] = own[LETTER]["attention_right"], own[LETTER]["attends"]
    for head, parts in ((LETTER, "qkv"), (INDEX, "q")):
        layer, number = (int(part) for part in head.removeprefix("a").split(".h"))
        projections = HeadProjections(known.model, [(layer, number)], chosen, seed)
        for part in parts:
            curve = projections.curve(part, judged, range(projections.anatomy.d_head + 1))
            row[f"{head}.{part}"] = {"needed": curve.needed, "by_rank": curve.accuracy, "random": curve.random}
    return row


def shown(rows: list[Row]) -> None:
    """Print the tables of the page."""
    finders = "exact | attribution | integrated activations"
    print(f"| options | seed | accuracy | AUC {finders} | direct share, letter | index | right label |\n|" + "---|" * 9)
    for row in rows:
        aucs = " | ".join(f"{row[f'auc_{name}']:.2f}" for name in FINDERS)
        shares = f"{row['direct_share_letter']:.2f} | {row['direct_share_index']:.2f} | {row['attention_right']:.2f}"
        print(f"| {row['options']} | {row['seed']} | {row['accuracy']:.3f} | {aucs} | {shares} |")
    print("\n| options | seed | q | k | v | q of the index's head | accuracy by rank 0, 1, ... of q | of k |\n|" + "---|" * 8)
    for row in rows:
        needed = " | ".join(str(row[key]["needed"]) for key in (f"{LETTER}.q", f"{LETTER}.k", f"{LETTER}.v", f"{INDEX}.q"))
        curves = (", ".join(f"{value:.2f}" for value in row[f"{LETTER}.{part}"]["by_rank"][: row["options"]]) for part in "qk")
        print(f"| {row['options']} | {row['seed']} | {needed} | {' | '.join(curves)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--options", type=int, nargs="+", default=[3])
    arguments = parser.parse_args()
    rows: list[Row] = read_json(RESULTS)["rows"] if RESULTS.exists() else []
    for seed in range(arguments.seeds):
        for options in arguments.options:
            if not any((row["options"], row["seed"]) == (options, seed) for row in rows):
                rows.append(measure(options, seed))
                write_results(RESULTS, {"pairs": PAIRS, "rows": sorted(rows, key=lambda row: (row["options"], row["seed"]))})
    shown(sorted(rows, key=lambda row: (row["options"], row["seed"])))


if __name__ == "__main__":
    main()
