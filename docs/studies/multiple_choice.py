"""Multiple choice where the heads are known: what finds them, and how many directions their queries, keys and values need.

    python docs/studies/multiple_choice.py [--seeds 3] [--options 3 4 5] [--only written]

Models are transformers of two layers with four heads that answer at two given heads: handwritten ones, in which the number of
directions of queries and keys is known (eval/circuits/known/written_choice.py), and trained ones, in which it is not
(eval/circuits/known/choice.py). Measured on other prompts: accuracy, AUC of the scores of discovery methods for the two heads
among all eight, direct effects on the answer, and the rank test. Half of 256 pairs fit directions and choose heads, the other
half judge. Weights are kept in runs/multiple-choice, finished rows in docs/results/multiple-choice.json; prints the tables of
docs/heads.md.
"""

import argparse
from pathlib import Path
from typing import Any

from results import write_results
from safetensors.torch import load_file, save_file

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.heads.low_rank import HeadProjections
from sparsary.eval.circuits.heads.tables import head_tables
from sparsary.eval.circuits.known import Known, ToyTransformer
from sparsary.eval.circuits.known.choice import INDEX, LETTER, Choices, accuracies_of, known_choice, train_choice
from sparsary.eval.circuits.known.written_choice import SHAPES, ranks_needed, written_choice
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.tasks.competence import competence
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.sae.files import read_json

RESULTS = Path("docs/results/multiple-choice.json")
RUNS = Path("runs/multiple-choice")
FINDERS = ("exact", "attribution", "integrated_activations")
KINDS = (*SHAPES, "trained")
PAIRS, MOST_STEPS = 256, 8000
Row = dict[str, Any]


def made(kind: str, options: int, seed: int) -> Known:
    """Return a model of a kind; a trained one is read if its weights are there."""
    if kind != "trained":
        return written_choice(options, kind, PAIRS, seed)
    weights, choices = RUNS / f"{options}-{seed}.safetensors", Choices(options)
    if not weights.exists():
        RUNS.mkdir(parents=True, exist_ok=True)
        command = f"train_choice(Choices({options}), seed={seed}, max_steps={MOST_STEPS}) of eval.circuits.known.choice"
        save_file(train_choice(choices, seed, MOST_STEPS).state_dict(), weights, {"command": command})
    model = ToyTransformer(choices.config)
    model.load_state_dict(load_file(weights))
    return known_choice(choices, model, PAIRS, seed)


def measure(kind: str, options: int, seed: int) -> Row:
    """Return the figures of one model."""
    known = made(kind, options, seed)
    chosen, judged = known.pairs.take(slice(0, PAIRS // 2)), known.pairs.take(slice(PAIRS // 2, PAIRS))
    space = NodeSpace(known.model, components(known.model))
    truth = known.node_labels("resample", [name.replace("/", ".h") for name in space.names()])
    row: Row = {
        "kind": kind,
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
    if kind != "trained":
        row["expected"] = ranks_needed(kind, options)
    return row


def shown(rows: list[Row]) -> None:
    """Print the tables of the page."""
    written, trained = ([row for row in rows if (row["kind"] == "trained") == which] for which in (False, True))
    print(
        "| shape | options | expected of q, k | found, by seed | accuracy of q by rank 0, 1, ... (seed 0) | of k |\n|"
        + "---|" * 6
    )
    for kind, options in dict.fromkeys((row["kind"], row["options"]) for row in written):
        own = [row for row in written if (row["kind"], row["options"]) == (kind, options)]
        expected = ", ".join(str(own[0]["expected"][part]) for part in "qk")
        found = "; ".join(", ".join(str(row[f"{LETTER}.{part}"]["needed"]) for part in "qk") for row in own)
        print(f"| {kind} | {options} | {expected} | {found} | {' | '.join(_curves(own[0]))} |")
    finders = "exact | attribution | integrated activations"
    print(
        f"\n| options | seed | accuracy | patched | AUC {finders} | direct share, letter | index | right label |\n|"
        + "---|" * 10
    )
    for row in trained:
        aucs = " | ".join(f"{row[f'auc_{name}']:.2f}" for name in FINDERS)
        shares = f"{row['direct_share_letter']:.2f} | {row['direct_share_index']:.2f} | {row['attention_right']:.2f}"
        accuracies = f"{row['accuracy']:.3f} | {row['accuracy_patched']:.3f}"
        print(f"| {row['options']} | {row['seed']} | {accuracies} | {aucs} | {shares} |")
    print("\n| options | seed | q | k | v | q of the index's head | accuracy by rank 0, 1, ... of q | of k |\n|" + "---|" * 8)
    for row in trained:
        needed = " | ".join(str(row[key]["needed"]) for key in (f"{LETTER}.q", f"{LETTER}.k", f"{LETTER}.v", f"{INDEX}.q"))
        print(f"| {row['options']} | {row['seed']} | {needed} | {' | '.join(_curves(row))} |")


def _curves(row: Row) -> list[str]:
    curves = [row[f"{LETTER}.{part}"]["by_rank"][: row["options"]] for part in "qk"]
    return [", ".join(f"{value:.2f}" for value in curve) for curve in curves]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--options", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--only", choices=("written", "trained"), help="default: both")
    arguments = parser.parse_args()
    rows: list[Row] = read_json(RESULTS)["rows"] if RESULTS.exists() else []
    kinds = {"written": SHAPES, "trained": ("trained",), None: KINDS}[arguments.only]
    for seed in range(arguments.seeds):
        for kind, options in ((kind, options) for kind in kinds for options in arguments.options):
            if not any((row["kind"], row["options"], row["seed"]) == (kind, options, seed) for row in rows):
                rows.append(measure(kind, options, seed))
                rows.sort(key=lambda row: (KINDS.index(row["kind"]), row["options"], row["seed"]))
                write_results(RESULTS, {"pairs": PAIRS, "rows": rows})
    shown(rows)


if __name__ == "__main__":
    main()
