"""Recovery of planted dictionaries by every encoder, over seeds.

    .venv/bin/python docs/studies/planted.py [--seeds 3] [--out docs/results/planted.json]

Width and budget are those of the ground truth: as many latents as planted features, and k the nearest integer to the true
mean l0 (at least 1). Every encoder sees the same batches of 1024 tokens; Adam at 3e-3 with 100 steps of warm-up and linear
decay to 0 over the last fifth; no encoder was tuned on these data. ``feature_choice`` is mutual choice with feature choice for
the last fifth.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from results import write_results

from sparsary.eval.synthetic.planted import PLANTED
from sparsary.eval.synthetic.recovery import evaluate_recovery
from sparsary.sae import load_dictionary
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe

BATCH, STEPS, HELDOUT = 1024, 1200, 20_000
FIGURES = ("mcc", "recall_09", "detector_f1", "fvu", "l0", "dead_fraction")


def families(k: int) -> dict[str, dict]:
    """Return recipe entries by encoder."""
    third = [[0.0, 0.0], [0.1, 8.0], [0.8, 8.0], [0.95, 0.0]]
    later = [{"start": 0.8, "blend": 0.05, "encoder": {"name": "feature_choice", "k": k}}]
    return {
        "topk": {"encoder": {"name": "topk", "k": k}},
        "mutual_choice": {"encoder": {"name": "mutual_choice", "k": k}, "aux_zipf_tau": 0.1},
        "feature_choice": {"encoder": {"name": "mutual_choice", "k": k}, "aux_zipf_tau": 0.1, "phases": later},
        "gradient_topk": {"encoder": {"name": "gradient_topk", "k": k, "beta": 8.0}, "schedules": {"beta": third}},
        "gradient_topk_kept": {"encoder": {"name": "gradient_topk", "k": k, "beta": 8.0}},
        "matching_pursuit": {"encoder": {"name": "matching_pursuit", "k": k}},
        "batch_topk": {"encoder": {"name": "batch_topk", "k": k}},
        "matryoshka": {"encoder": {"name": "matryoshka", "k": k}},
        "relu": {"encoder": {"name": "relu", "target_l0": k}},
        "jumprelu": {"encoder": {"name": "jumprelu", "target_l0": k}},
        "gated": {"encoder": {"name": "gated", "target_l0": k}},
    }


def run(name: str, entries: dict, dataset: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one encoder on one planted dataset and evaluate it on fresh tokens."""
    planted = PLANTED[dataset](seed)
    hook = "planted:out"
    values = {
        "harvest": {"hooks": [hook], "tokens": 1, "gradients": True},
        "dictionary": {"hook": hook, "n_latents": planted.n_features, "encoder": entries["encoder"], "init": "random"},
        "tokens": STEPS * BATCH,
        "batch_tokens": BATCH,
        "lr": 3e-3,
        "dead_after_tokens": 100 * BATCH,
        "calibration_tokens": 50 * BATCH,
        "seed": seed,
        "log_every": STEPS,
        "save_every": STEPS,
        "out_dir": str(folder / f"{name}-{dataset}-{seed}"),
    } | {key: value for key, value in entries.items() if key != "encoder"}
    samples = (planted.sample(BATCH, 1000 + i) for i in range(STEPS))
    pairs = [(sample.x, torch.zeros_like(sample.x) if sample.grad is None else sample.grad) for sample in samples]
    directory = train_recipe(resolve_recipe(check_recipe(values, name)), pairs)
    return evaluate_recovery(load_dictionary(directory), planted, HELDOUT, seed=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--datasets", nargs="+", default=list(PLANTED))
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--out")
    options = parser.parse_args()
    found: dict = {"steps": STEPS, "batch": BATCH, "seeds": options.seeds, "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        for dataset in options.datasets:
            truth = PLANTED[dataset](0)
            k = max(1, round(float(truth.firing.probabilities().sum())))
            print(f"\n{dataset}: {truth.n_features} features in {truth.d}, k {k}", flush=True)
            print(f"{'':20s}" + "".join(f"{figure:>18s}" for figure in FIGURES))
            for name, entries in families(k).items():
                if options.families and name not in options.families:
                    continue
                # Without a decision there are no gradients to select by.
                if name.startswith("gradient") and truth.decision is None:
                    continue
                runs = [run(name, entries, dataset, seed, Path(folder)) for seed in range(options.seeds)]
                found["results"].setdefault(dataset, {})[name] = runs
                cells = [[row[figure] for row in runs] for figure in FIGURES]
                spread = [statistics.stdev(cell) if len(cell) > 1 else 0.0 for cell in cells]
                print(
                    f"{name:20s}"
                    + "".join(f"{statistics.mean(c):11.3f} ±{s:5.3f}" for c, s in zip(cells, spread, strict=True)),
                    flush=True,
                )
    if options.out:
        write_results(Path(options.out), found)


if __name__ == "__main__":
    main()
