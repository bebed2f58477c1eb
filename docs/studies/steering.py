"""Known answer of `sparsary steer`: the language of the bilingual embedded model.

Run:  python docs/studies/steering.py --seeds 3

Makes the bilingual model in runs/embedded/bilingual where it is missing, trains the SAE of recipes/steering/embedded.yaml with
every seed over one store, steers from the first language to the second with lists of numbers as neutral text, and writes
docs/results/steering.json. What is there is not made again, so an interrupted command goes on.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from results import write_results

import sparsary
from sparsary.eval.checkpoint import open_checkpoint
from sparsary.eval.features.records import number
from sparsary.eval.steer.codes import document_codes, selectivity
from sparsary.eval.steer.task import steer_task, steered_subject
from sparsary.sae.files import read_json
from sparsary.training.embedded.bilingual import make_bilingual

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/steering/embedded.yaml"
RESULTS = ROOT / "docs" / "results" / "steering.json"
KEPT = (
    "strength",
    "share",
    "share_low",
    "share_high",
    "token_share",
    "target_mass",
    "kl",
    "kl_low",
    "kl_high",
    "towards_kl",
    "ce",
)
DOCUMENTS = 1600
# Of the comparison: how a latent is pooled, and over how many tokens.
POOLED = [(pooling, piece) for pooling in ("max", "mean") for piece in (32, 64, 128, 256)]


def steered(texts: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Return the content of ``steer.json`` of one seed's SAE, which is trained if it is missing."""
    run, neutral = folder / f"seed-{seed}", texts / "numbers.jsonl"
    if not (run / "dictionary.json").is_file():
        sparsary.train(RECIPE, seed=seed, out_dir=str(run))
    path = run / "steer" / "steer.json"
    if not path.is_file():
        sparsary.steer(run, texts / "second.jsonl", texts / "first.jsonl", neutral=neutral, documents=DOCUMENTS, seed=seed)
    return read_json(path)


def selectivities(texts: Path, run: Path, seed: int) -> list[dict[str, Any]]:
    """Return the AUROCs of the ten most selective latents by pooling and length of the pieces, as ``steer`` reports them."""
    subject = steered_subject(open_checkpoint(str(run)))
    task = steer_task(subject, texts / "second.jsonl", texts / "first.jsonl", None, None, DOCUMENTS, seed)
    halves = (task.towards.choosing, task.away_from.choosing, task.towards.reporting, task.away_from.reporting)
    codes = [document_codes(subject, rows) for rows in halves]
    rows = []
    for pooling, piece in POOLED:
        chosen_on, reported_on = (selectivity(a, b, pooling, piece) for a, b in (codes[:2], codes[2:]))
        best = reported_on[np.argsort(-chosen_on, kind="stable")[:10]]
        rows.append({"pooling": pooling, "piece": piece, "reached": int((best >= 0.99).sum()), "lowest": number(best.min())})
    return rows


def record(found: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the figures of one seed that the page quotes."""
    edits = {
        row["name"]: {key: row["chosen"][key] for key in KEPT if key in row["chosen"]} if row["chosen"] else None
        for row in found["edits"]
    }
    curves = {
        row["name"]: [{key: point[key] for key in ("strength", "kl", "share", "token_share")} for point in row["points"]]
        for row in found["edits"]
    }
    keys = ("classifier_accuracy", "pooling", "lengths", "most_selective", "directions", "clean", "documents")
    return {"seed": seed, **{key: found[key] for key in keys}, "edits": edits, "curves": curves}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    arguments = parser.parse_args()
    texts = make_bilingual("runs/embedded/bilingual", report=print)
    records = []
    for seed in range(arguments.seeds):
        found = record(steered(texts, arguments.out, seed), seed)
        records.append(found | {"selectivity": selectivities(texts, arguments.out / f"seed-{seed}", seed)})
    write_results(RESULTS, {"recipe": "recipes/steering/embedded.yaml", "most_kl": 0.05, "seeds": records})
    for each in records:
        aurocs = [row["auroc"] for row in each["most_selective"]]
        print(f"seed {each['seed']}: AUROC {min(aurocs):.4f} to {max(aurocs):.4f}")
        for row in each["selectivity"]:
            print(f"  {row['pooling']} over {row['piece']} tokens: {row['reached']} of ten, lowest {row['lowest']:.4f}")
        for name, edit in each["edits"].items():
            print(f"  {name:12} " + ("no strength within the budget" if edit is None else f"{edit}"))
