"""Circuits with dictionaries that saw the positions of the prompts, against ones whose training left them out.

    python docs/studies/prompt_positions.py --pairs PAIRS_DIRECTORY [--seeds 1] [--layer 3]

Prompts of stories3M's tasks have 3 to 22 tokens with the BOS token. By default, training leaves out BOS and the first 8 tokens
of every context, but circuits replace activations at all positions. Trains TopK SAEs after every block, or after the blocks
given, (recipes/circuits/stories3M.yaml) on activations without either, with the leading positions, and with BOS too: equal
numbers of tokens, of latents and of steps. `sparsary circuits` then finds and judges circuits of their latents by attribution
patching under resampling. Finished runs are reused. Writes docs/results/prompt-positions.json and prints the tables of
docs/circuit_latents.md; intervals are over pairs with one seed, Student's t over seeds with several.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from results import write_results
from scipy.stats import t

from sparsary.eval.circuits.benchmark import CircuitSettings, circuits
from sparsary.sae.files import read_json
from sparsary.training.recipe import read_values
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipes
from sparsary.training.run import train_all

RECIPE = "recipes/circuits/stories3M.yaml"
OUT = Path("runs/circuits/prompt-positions")
TASKS = ("ioi", "pronoun", "agreement")
SEEN = {
    "as in the recipes": {},
    "leading positions too": {"harvest.exclude_leading": 0},
    "BOS too": {"harvest.exclude_leading": 0, "harvest.exclude_special": False},
}
FAMILIES = ("errors as nodes", "errors kept", "errors ablated", "random, errors kept", "random, errors ablated")
SHARED = ("neurons", "MLP neurons", "heads and MLPs")

Row = dict[str, Any]


def trained(seen: str, seed: int, layers: list[int]) -> Path:
    """Train the stack of one choice of positions and seed and return its folder."""
    name = seen.replace(" ", "-").lower()
    folder = OUT / "-".join(map(str, layers)) / name
    out = folder / f"seed-{seed}"
    changes: Row = SEEN[seen] | {"seed": seed, "out_dir": str(out), "harvest.gradients": False}
    changes |= {"harvest.store": str(folder / "activations"), "harvest.hooks": [f"model.layers.{i}:out" for i in layers]}
    changes |= {"grid": {"dictionary.layer": layers}}
    train_all(resolve_recipes(check_grid(read_values(RECIPE, changes), name).recipes))
    return out


def measure(seed: int, options: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the fit on the prompts and the circuits' figures, each row with its choice of positions and seed."""
    directories = {seen: trained(seen, seed, options.layer) for seen in SEEN}
    out = OUT / "-".join(map(str, options.layer)) / f"circuits-{seed}"
    if not (out / "circuits.json").exists():
        tasks = tuple(f"{options.pairs}/{task}.jsonl" for task in TASKS)
        settings = CircuitSettings(tasks=tasks, methods=("attribution",), pairs=options.n)
        circuits([*directories.values()], settings, out)
    found = read_json(out / "circuits.json")
    by_name = {str(path): seen for seen, path in directories.items()}
    prompts = [row | {"checkpoint": by_name[row["checkpoint"]], "seed": seed} for row in found["prompts"]]
    rows = []
    for row in found["rows"]:
        directory, _, family = row["family"].rpartition(": ")
        rows.append(row | {"family": family, "checkpoint": by_name.get(directory), "seed": seed})
    return {"prompts": prompts, "rows": rows}


def shown(rows: list[Row], figure: str) -> str:
    """Return the mean over seeds, with the interval over pairs of a single seed or over several seeds."""
    values = [row[figure] for row in rows if row.get(figure) is not None]
    if not values:
        return "never" if figure.startswith("nodes") else "-"
    text = f"{statistics.mean(values):.3g}"
    if len(values) > 1:
        text += f" +- {float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values)):.2g}"
    elif rows[0].get(f"{figure}_low") is not None:
        text += f" ({rows[0][f'{figure}_low']:.3g} to {rows[0][f'{figure}_high']:.3g})"
    return text if len(values) == len(rows) else f"{text} ({len(values)} of {len(rows)} seeds)"


def print_tables(prompts: list[Row], rows: list[Row]) -> None:
    print(
        "| task | trained on | positions left out | fvu on the prompts, mean over hooks | of positions left out |\n|"
        + "---|" * 5
    )
    for task, seen in dict.fromkeys((row["task"], row["checkpoint"]) for row in prompts):
        own = [row for row in prompts if (row["task"], row["checkpoint"]) == (task, seen)]
        cells = [f"{own[0]['positions_left_out']} of {own[0]['positions']}"]
        for figure in ("fvu", "fvu_left_out"):
            known = [row[figure] for row in own if row[figure] is not None]
            cells.append(f"{statistics.mean(known):.3f}" if known else "-")
        print(f"| {task} | {seen} | {' | '.join(cells)} |")
    figures = ("cpr", "cmd", "nodes_80", "faithfulness_all")
    print("\n| task | trained on | family | CPR | CMD | nodes for 80 % | all units kept |\n|" + "---|" * 7)
    for task in dict.fromkeys(row["task"] for row in rows):
        for seen, family in [(seen, family) for family in FAMILIES for seen in SEEN] + [(None, family) for family in SHARED]:
            own = [row for row in rows if (row["task"], row["checkpoint"], row["family"]) == (task, seen, family)]
            print(f"| {task} | {seen or '-'} | {family} | {' | '.join(shown(own, figure) for figure in figures)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="a directory with ioi.jsonl, pronoun.jsonl and agreement.jsonl")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--n", type=int, default=100, help="pairs of each task, half of which judge")
    parser.add_argument("--layer", type=int, action="append", help="repeatable; by default all six")
    options = parser.parse_args()
    options.layer = options.layer or [0, 1, 2, 3, 4, 5]
    found = [measure(seed, options) for seed in range(options.seeds)]
    prompts, rows = ([row for one in found for row in one[name]] for name in ("prompts", "rows"))
    about = {"layers": options.layer, "seeds": options.seeds, "pairs": options.n}
    write_results(Path("docs/results/prompt-positions.json"), about | {"prompts": prompts, "rows": rows})
    print_tables(prompts, rows)


if __name__ == "__main__":
    main()
