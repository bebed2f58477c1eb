"""Learning rate and betas: the recipes' defaults against `lr: auto`, `betas: auto` and further rates, encoder by encoder.

    python docs/studies/rates.py embedded [--seeds 3] [--family topk ...] [--lr 5e-4 ...]
    python docs/studies/rates.py stories3M --seeds 1
    python docs/studies/rates.py transcoders --family transcoder --family skip --auto betas --lr 1e-3

Writes a recipe for every variant of recipes/NAME, trains and evaluates them all with `sparsary compare` over one store, and
prints the tables of docs/families.md: means over seeds, and every variant's difference to the recipe as it is, with Holm's
correction over all of them. `betas: auto` is tried only where it differs from the default. Finished runs are reused. Writes
docs/results/rates-NAME.json.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from results import write_results

from sparsary.eval.compare.groups import family_differences
from sparsary.eval.compare.run import compare
from sparsary.eval.pages.differences import verdict_words
from sparsary.eval.pages.recipes import COLUMNS
from sparsary.sae.encoders import build_encoder
from sparsary.sae.files import write_json
from sparsary.training.recipe import load_recipe
from sparsary.training.recipe.schema import peak_lr

FOLDERS = {"embedded": "embedded", "stories3M": "stories3M", "transcoders": "transcoders/embedded"}
FAMILIES = ("topk", "jumprelu", "gated")
FIGURES = ("fvu", "dead_fraction")


def variants(family: str, path: Path, autos: list[str], rates: list[float]) -> dict[str, dict[str, Any]]:
    """Return the changes to a recipe by the name of the run group; the recipe as it is comes first."""
    recipe = load_recipe(path)
    found: dict[str, dict[str, Any]] = {family: {}}
    if "lr" in autos:
        found[f"{family}-lr_auto"] = {"lr": "auto"}
    if "betas" in autos and build_encoder(recipe.dictionary.known_encoder).betas != recipe.betas:
        found[f"{family}-betas_auto"] = {"betas": "auto"}
    return found | {f"{family}-lr_{rate:g}": {"lr": rate} for rate in rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FOLDERS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--family", action="append", help=f"repeatable; by default {', '.join(FAMILIES)}")
    parser.add_argument("--auto", action="append", choices=("lr", "betas"), help="repeatable; by default both")
    parser.add_argument("--lr", action="append", type=float, default=[], help="a further learning rate; repeatable")
    options = parser.parse_args()
    out = Path("runs/rates") / options.name
    folder = out / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for family in options.family or FAMILIES:
        path = Path("recipes") / FOLDERS[options.name] / f"{family}.yaml"
        groups[family] = variants(family, path, options.auto or ["lr", "betas"], options.lr)
        for name, changes in groups[family].items():
            # JSON is YAML too. No encoder here reads gradients.
            harvest = {"store": str(out / "activations"), "gradients": False}
            write_json(folder / f"{name}.yaml", {"base": os.path.relpath(path, folder), "harvest": harvest} | changes)
    files = [folder / f"{name}.yaml" for members in groups.values() for name in members]
    compare(files, seeds=options.seeds, out=out, against=files[0].stem)
    comparison = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    write_results(Path(f"docs/results/rates-{options.name}.json"), comparison)

    figures = {family["name"]: family for family in comparison["families"]}
    print("| variant | lr | betas | fvu | cross-entropy + | l0 | dead, scored | dead, training |\n|" + "---|" * 8)
    for name in (name for members in groups.values() for name in members):
        recipe = load_recipe(folder / f"{name}.yaml")
        betas = build_encoder(recipe.dictionary.known_encoder).betas if recipe.betas == "auto" else recipe.betas
        found, own = figures[name]["figures"], figures[name]
        ends = "" if found["fvu"].get("low") is None else f" ({found['fvu']['low']:.4f}-{found['fvu']['high']:.4f})"
        cells = [f"`{name}`{' (off target)' * own['off_target']}", f"{peak_lr(recipe):.2g}", ", ".join(f"{b:g}" for b in betas)]
        cells += [f"{found['fvu']['mean']:.4f}{ends}", f"{found['ce_increase']['mean']:.4f}", f"{found['l0_mean']['mean']:.2f}"]
        cells += [f"{found[key]['mean']:.1%}" for key in ("dead_fraction", "dead_training_fraction")]
        print(f"| {' | '.join(cells)} |")
    claims = [
        {"family": name, "against": family, "figure": figure}
        for figure in FIGURES
        for family, members in groups.items()
        for name in list(members)[1:]
    ]
    print("\n| variant | figure | difference, 95 % interval | over | detectable | p (Holm) | verdict |\n|" + "---|" * 7)
    for row in family_differences(comparison, COLUMNS, claims):
        ends = "" if row["low"] is None else f" ({row['low']:+.3g} to {row['high']:+.3g})"
        detectable = "-" if row["detectable"] is None else f"{row['detectable']:.2g}"
        p = "-" if row["p_holm"] is None else "<0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.2g}"
        print(
            f"| `{row['family']}` | {row['figure']} | {row['difference']:+.3g}{ends} | {row['interval_over'] or '-'} "
            f"| {detectable} | {p} | {verdict_words(row)} |"
        )


if __name__ == "__main__":
    main()
