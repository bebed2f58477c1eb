"""Known answer of `sparsary name` and of the concept bottleneck: planted towers of images and words.

Run:  python docs/studies/names.py --seeds 3

With every seed, images and words are drawn anew, for the SAE whose latents are the planted concepts, and for one that is
trained on 6,000 images of concepts that are not orthogonal. Writes docs/results/names.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from results import write_results
from scipy.optimize import linear_sum_assignment
from two_towers import CONCEPTS, planted_sae, trained_sae, write_towers

import sparsary

RESULTS = Path(__file__).parents[1] / "results" / "names.json"


def figures(run: Path, concepts: np.ndarray, words: Path, seed: int) -> dict[str, Any]:
    """Return the figures of one SAE, whose latents are matched one to one with the concepts by the cosines of directions.

    ``right`` is the share of matched latents with their concept's name, ``right_above_floor`` the share that is above the floor
    besides; ``others_above_floor`` is the share of the other latents above the floor. ``recall_zeroed`` is the largest recall
    that a class keeps without its strongest concept, ``others_zeroed`` the smallest that the others then have.
    """
    cosines = sparsary.load(run).atoms.detach().numpy() @ concepts.T
    latents, matched = linear_sum_assignment(-cosines)
    rows = sparsary.name(run, words, seed=seed)["latents"]
    own = [rows[latent] for latent in latents]
    right = np.array([row["name"] == f"concept {place}" for row, place in zip(own, matched, strict=True)])
    above = np.array([row["above_floor"] for row in own])
    others = [row["above_floor"] for latent, row in enumerate(rows) if latent not in set(latents)]
    report = sparsary.probe(run, tasks=["bottleneck"], seed=seed).report
    lines = (run / "probing" / "bottleneck.jsonl").read_text(encoding="utf-8").splitlines()
    # The other class is the absence of all concepts.
    classes = [row for line in lines if (row := json.loads(line))["class"] != "none"]
    return {
        "latents": len(rows),
        "right": float(right.mean()),
        "right_above_floor": float((right & above).mean()),
        "others": len(others),
        "others_above_floor": float(np.mean(others)),
        "matched_cosine": float(cosines[latents, matched].mean()),
        "bottleneck_accuracy": report["bottleneck_accuracy"],
        "dense_accuracy": report["bottleneck_dense_accuracy"],
        "recall_zeroed": max(row["recall_zeroed"] for row in classes),
        "others_zeroed": min(row["others_zeroed"] for row in classes),
    }


def study(seed: int) -> dict[str, Any]:
    """Return the figures of one seed."""
    found: dict[str, Any] = {"seed": seed, "concepts": CONCEPTS}
    for kind, images in (("planted", 1200), ("trained", 6000)):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            concepts = write_towers(place, images, seed, orthonormal=kind == "planted")
            run = planted_sae(place, concepts, seed=seed) if kind == "planted" else trained_sae(place, seed)
            found[kind] = figures(run, concepts, place / "words.safetensors", seed)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = [study(seed) for seed in range(parser.parse_args().seeds)]
    write_results(RESULTS, {"seeds": seeds})
    for each in seeds:
        for kind in ("planted", "trained"):
            print(f"seed {each['seed']}, {kind}: " + ", ".join(f"{name} {value:.4g}" for name, value in each[kind].items()))
