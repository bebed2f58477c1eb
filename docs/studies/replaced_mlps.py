"""Transcoders in place of MLPs, per layer and all at once, compared with SAEs of the MLP's output and with ablation.

    python docs/studies/replaced_mlps.py embedded [--seeds 3]        # recipes/transcoders/embedded/base.yaml
    python docs/studies/replaced_mlps.py stories3M

Trains, for every seed, three stacks over all layers (transcoders, transcoders with skip paths, SAEs of the MLPs' outputs) and
two cross-layer transcoders (k latents per layer, and the same number shared by all layers), and evaluates each with all
layers replaced and with one layer replaced. All use one store, one width and one budget per layer. Finished runs are reused.
Writes docs/results/transcoders-NAME.json and prints the tables of docs/transcoders.md; intervals are Student's t over seeds,
differences are paired by seed.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from results import write_results
from scipy.stats import t

from sparsary.eval.report.evaluate import evaluate
from sparsary.training.recipe import read_values
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipes
from sparsary.training.run import train_all

LAYERS = {"embedded": 4, "stories3M": 6}
STACKS = {
    "transcoder": {},
    "skip transcoder": {"dictionary.skip": True},
    "SAE of the output": {"dictionary.kind": "sae", "dictionary.site": "mlp_out"},
}
CROSS = {
    "cross-layer": {"dictionary.kind": "cross_layer_transcoder", "dictionary.layers": "all"},
    "cross-layer, joint": {"dictionary.kind": "cross_layer_transcoder", "dictionary.layers": "all", "dictionary.joint": True},
}
CLAIMS = (
    ("transcoder", "SAE of the output"),
    ("skip transcoder", "transcoder"),
    ("cross-layer", "transcoder"),
    ("cross-layer, joint", "cross-layer"),
)
FIGURES = ("ce_increase", "kl_spliced", "top1_agreement")


def run(folder: str, kind: str, seed: int, tokens: int) -> dict:
    """Train and evaluate one stack or cross-layer transcoder and return its report."""
    out = Path("runs/transcoders") / folder / "study" / kind.replace(" ", "-").replace(",", "") / f"seed-{seed}"
    report = out / "report.json"
    if not report.exists():
        changes = (STACKS | CROSS)[kind] | {"seed": seed, "out_dir": str(out)}
        values = read_values(f"recipes/transcoders/{folder}/base.yaml", changes)
        if kind in STACKS:
            values["grid"] = {"dictionary.layer": list(range(LAYERS[folder]))}
        train_all(resolve_recipes(check_grid(values, kind).recipes))
        evaluate(str(out), tokens=tokens)
    return json.loads(report.read_text())


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of the 95 % interval (Student's t)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.4f} +- {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", choices=LAYERS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--kind", action="append", choices=STACKS | CROSS, help="only these; repeatable")
    options = parser.parse_args()
    reports: dict[str, list[dict]] = {kind: [] for kind in options.kind or STACKS | CROSS}
    for seed in range(options.seeds):
        for kind, found in reports.items():
            print(f"{kind}, seed {seed}", flush=True)
            found.append(run(options.folder, kind, seed, options.tokens))
    write_results(Path("docs/results") / f"transcoders-{options.folder}.json", {"seeds": options.seeds, "reports": reports})
    tables(options.folder, reports)


def tables(folder: str, reports: dict[str, list[dict]]) -> None:
    first = reports["transcoder"][0]
    print(f"\nAll MLPs replaced; clean cross-entropy {first['ce_clean']:.4f}, {first['documents']} documents:\n")
    print("| in place of all MLPs | parameters | fvu, mean of layers | cross-entropy + | KL | same top token | dead |")
    print("|---|---|---|---|---|---|---|")
    for kind, found in reports.items():
        cells = [shown([report[key] for report in found]) for key in ("fvu_layer_mean", *FIGURES)]
        dead = statistics.mean(report["dead_fraction"] for report in found)
        print(f"| {kind} | {found[0]['parameters']:,} | {' | '.join(cells)} | {dead:.1%} |")
    for name in ("zero", "mean"):
        cells = (first[f"ce_{name}"] - first["ce_clean"], first[f"kl_{name}"], first[f"top1_{name}"])
        print(f"| {name} | | | {' | '.join(f'{cell:.4f}' for cell in cells)} | |")
    print("\nOne MLP replaced, cross-entropy + (fvu), means over seeds:\n")
    print(f"| layer | {' | '.join(reports)} | zero | mean |\n|---|{'---|' * (len(reports) + 2)}")
    for layer in range(LAYERS[folder]):
        cells = []
        for found in reports.values():
            ce = statistics.mean(report["layer_ce_spliced"][layer] - report["ce_clean"] for report in found)
            cells.append(f"{ce:.4f} ({statistics.mean(report['layer_fvu'][layer] for report in found):.4f})")
        cells += [f"{first[f'layer_ce_{name}'][layer] - first['ce_clean']:.4f}" for name in ("zero", "mean")]
        print(f"| {layer} | {' | '.join(cells)} |")
    print("\nDifferences with all MLPs replaced, paired by seed, 95 % intervals:\n")
    print("| question | figure | difference | answer |\n|---|---|---|---|")
    for better, worse in CLAIMS:
        if better not in reports or worse not in reports:
            continue
        for figure in ("ce_increase", "kl_spliced"):
            pairs = zip(reports[better], reports[worse], strict=True)
            mean, half = interval([left[figure] - right[figure] for left, right in pairs])
            answer = "no difference" if abs(mean) <= half else "yes" if mean < 0 else "no: the opposite"
            print(f"| {better} loses less than {worse} | {figure} | {mean:+.4f} +- {half:.4f} | {answer} |")


if __name__ == "__main__":
    main()
