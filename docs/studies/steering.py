"""Known answer of `sparsary steer`: the language of the bilingual embedded model.

Run:  python docs/studies/steering.py --seeds 3

Makes the bilingual model in runs/embedded/bilingual where it is missing, trains the SAE of recipes/steering/embedded.yaml with
every seed over one store, steers from the first language to the second with lists of numbers as neutral text, and writes
docs/results/steering.json. What is there is not made again, so an interrupted command goes on.
"""

import argparse
from pathlib import Path
from typing import Any

from results import write_results

import sparsary
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


def steered(texts: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Return the content of ``steer.json`` of one seed's SAE, which is trained if it is missing."""
    run, neutral = folder / f"seed-{seed}", texts / "numbers.jsonl"
    if not (run / "dictionary.json").is_file():
        sparsary.train(RECIPE, seed=seed, out_dir=str(run))
    path = run / "steer" / "steer.json"
    if not path.is_file():
        sparsary.steer(run, texts / "second.jsonl", texts / "first.jsonl", neutral=neutral, seed=seed)
    return read_json(path)


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
    keys = ("classifier_accuracy", "most_selective", "directions", "clean", "documents")
    return {"seed": seed, **{key: found[key] for key in keys}, "edits": edits, "curves": curves}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    arguments = parser.parse_args()
    texts = make_bilingual("runs/embedded/bilingual", report=print)
    records = [record(steered(texts, arguments.out, seed), seed) for seed in range(arguments.seeds)]
    write_results(RESULTS, {"recipe": "recipes/steering/embedded.yaml", "most_kl": 0.05, "seeds": records})
    for each in records:
        aurocs = [row["auroc"] for row in each["most_selective"]]
        print(f"seed {each['seed']}: AUROC {min(aurocs):.4f} to {max(aurocs):.4f}")
        for name, edit in each["edits"].items():
            print(f"  {name:12} " + ("no strength within the budget" if edit is None else f"{edit}"))
