"""Feature circuits: nodes needed for a task with latents, neurons, heads or random features, for all encoders at equal l0.

    python docs/studies/feature_circuits.py embedded [--seeds 3]
    python docs/studies/feature_circuits.py stories3M --pairs PAIRS_DIRECTORY

Trains, for every encoder and seed, an SAE after every block (recipes/circuits/NAME.yaml), with one width and one budget, and
discovers circuits of its latents: scores by attribution patching on half of a task's pairs, faithfulness under resampling on
the other half. Errors are nodes, kept, or ablated. Baselines are the coordinates of the same residual streams (neurons), the
inputs of the MLPs' last projections (MLP neurons), heads and MLPs, and random features with the same l0. Finished runs are
reused. Writes docs/results/feature-circuits-NAME.json and docs/feature_circuits_NAME.png, and prints the tables of
docs/circuit_latents.md; intervals are Student's t over seeds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from results import write_results
from scipy.stats import t

from sparsary.eval.circuits.compared_units import open_dictionaries, open_model, spaces
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.faithfulness import (
    LEVELS,
    SIZED_ON,
    Trials,
    curve,
    growing_sizes,
    ranked,
    share_sizes,
    smallest_size,
)
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.tasks.pairs import PromptPairs
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.nodes import Latents, NodeSpace
from sparsary.sae.files import write_json
from sparsary.training.recipe import read_values
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipes
from sparsary.training.run import train_all

K = {"embedded": 16, "stories3M": 32}
TASKS = {"embedded": ("ioi", "agreement_simple", "greater_than"), "stories3M": ("ioi", "pronoun", "agreement")}
# Baselines that do not depend on the dictionary.
SHARED = ("neurons", "MLP neurons", "heads and MLPs")
ERRORS = ("errors as nodes", "errors kept", "errors ablated")
RANDOM = ("random, errors kept", "random, errors ablated")

Row = dict[str, Any]


def families(k: int) -> dict[str, Row]:
    """Return the changes to the recipe by encoder."""
    mutual = {"dictionary.encoder": {"name": "mutual_choice", "k": k}, "aux_zipf_tau": 0.1}
    return {
        "topk": {},
        "mutual_choice": mutual,
        "feature_choice": mutual | {"phases": [{"start": 0.8, "blend": 0.05, "encoder": {"name": "feature_choice", "k": k}}]},
        "gradient_topk": {
            "dictionary.encoder": {"name": "gradient_topk", "k": k, "beta": 11.0},
            "schedules": {"beta": [[0.0, 0.0], [0.1, 11.0], [0.8, 11.0], [0.95, 0.0]]},
        },
        "matching_pursuit": {"dictionary.encoder": {"name": "matching_pursuit", "k": k}},
    }


def trained(name: str, family: str, seed: int) -> Path:
    """Train the stack of one encoder and seed and return its folder."""
    out = Path("runs/circuits") / f"{name}-study" / family / f"seed-{seed}"
    changes = families(K[name])[family] | {"seed": seed, "out_dir": str(out)}
    train_all(resolve_recipes(check_grid(read_values(f"recipes/circuits/{name}.yaml", changes), family).recipes))
    return out


def judged(space: NodeSpace, chosen_on: PromptPairs, judged_on: PromptPairs, method: str, ablation: str) -> Row:
    """Return the faithfulness curve of one set of nodes on one task, and the circuit sizes that reach each level."""
    order = ranked(METHODS[method]().discover(space, chosen_on), "absolute")
    trials = Trials(space, judged_on, ablation_values(space, ablation, chosen_on))
    shares = share_sizes(space.size)
    along = curve(trials, order, sorted({*growing_sizes(space.size, 4), *shares}), complements=())
    return {
        "units": space.size,
        "sizes": list(along.sizes),
        "faithfulness": [round(float(value), 5) for value in along.faithfulness()],
        "cmd": along.at(shares).cmd(),
        **{f"nodes_{round(100 * level)}": smallest_size(trials, order, level, along, SIZED_ON) for level in LEVELS},
    }


def l0_of(space: NodeSpace, pairs: PromptPairs) -> float:
    """Return the active latents per token on the task's clean prompts, averaged over hooks."""
    _, seen = space.passes.see(pairs.clean, space.hooks)
    found = [part.dictionary.encode(seen[part.hook_in].flatten(0, 1)) for part in space.parts if isinstance(part, Latents)]
    return statistics.mean(float(code.l0().float().mean()) for code in found)


def measure(directory: Path, tasks: dict[str, str], shared: bool, options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every variant of one stack and task; with ``shared``, also for the baselines."""
    several = [open_dictionaries(str(directory))]
    model = open_model(several)
    for task, where in tasks.items():
        pairs = make_pairs(where, model, options.n)
        half = len(pairs) // 2
        chosen_on, judged_on = pairs.take(slice(0, half)), pairs.take(slice(half, len(pairs)))
        for label, space in spaces(model, several, chosen_on.clean).items():
            variant = label.removeprefix(f"{directory}: ")
            if variant in SHARED and not shared:
                continue
            row = judged(space, chosen_on, judged_on, options.method, options.ablation)
            row |= {"task": task, "variant": variant, "pairs": len(judged_on)}
            row["l0"] = None if variant in SHARED else l0_of(space, judged_on)
            yield row


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of the 95 % interval (Student's t)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: list[int | None]) -> str:
    reached = [float(value) for value in values if value is not None]
    if not reached:
        return "never"
    mean, half = interval(reached)
    text = f"{mean:.0f}" if math.isnan(half) else f"{mean:.0f} +- {half:.0f}"
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)} seeds)"


def table(rows: list[Row], task: str) -> None:
    """Print the nodes for 80 % faithfulness by encoder and variant."""
    print(f"\n{task}: nodes for 80 % faithfulness, of {max(row['units'] for row in rows)} latents and errors")
    for variant in SHARED:
        [row] = [row for row in rows if row["task"] == task and row["variant"] == variant]
        print(f"| {variant} | {row['nodes_80']} of {row['units']} |")
    for family in dict.fromkeys(row["family"] for row in rows if row["family"]):
        cells = []
        for variant in (*ERRORS, *RANDOM):
            own = [row for row in rows if (row["task"], row["family"], row["variant"]) == (task, family, variant)]
            cells.append(shown([row["nodes_80"] for row in own]))
        l0 = statistics.mean(row["l0"] for row in rows if row["task"] == task and row["family"] == family)
        print(f"| {family} | {l0:.1f} | {' | '.join(cells)} |")


def plot(rows: list[Row], tasks: list[str], path: Path) -> None:
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.6 * len(tasks), 7.4), layout="constrained", sharey=True)
    names = list(dict.fromkeys(row["family"] for row in rows if row["family"]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for column, task in enumerate(tasks):
        for axis, errors in zip(axes[:, column], ("errors kept", "errors ablated"), strict=True):
            for variant, style in zip(SHARED, ("-", "--", ":"), strict=True):
                [row] = [r for r in rows if r["task"] == task and r["variant"] == variant]
                axis.plot(row["sizes"], row["faithfulness"], style, color="0.35", label=variant, linewidth=1.3)
            for family in names:
                own = [r for r in rows if (r["task"], r["family"], r["variant"]) == (task, family, errors)]
                values = np.array([r["faithfulness"] for r in own])
                axis.plot(own[0]["sizes"], values.mean(0), color=colours[family], label=family, linewidth=1.6)
                axis.fill_between(own[0]["sizes"], values.min(0), values.max(0), color=colours[family], alpha=0.2, linewidth=0)
            chance = [r for r in rows if r["task"] == task and r["variant"] == f"random, {errors}" and r["family"] == names[0]]
            values = np.array([r["faithfulness"] for r in chance])
            axis.plot(
                chance[0]["sizes"], values.mean(0), color="#c2413b", linestyle="-.", label="random features", linewidth=1.3
            )
            axis.axhline(0.8, color="0.8", linewidth=0.8, zorder=0)
            axis.set_xscale("symlog", linthresh=1, linscale=0.4)
            axis.set(xlim=(0, None), xlabel="nodes kept", title=f"{task}, {errors}", ylim=(-0.4, 1.3))
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("faithfulness")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=K)
    parser.add_argument("--pairs", help="a directory with ioi.jsonl, pronoun.jsonl and agreement.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=100, help="pairs of each task, half of which judge")
    parser.add_argument("--method", default="attribution", choices=METHODS)
    parser.add_argument("--ablation", default="resample")
    parser.add_argument("--family", action="append", help="only these; repeatable")
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args()
    tasks = {task: task if options.pairs is None else f"{options.pairs}/{task}.jsonl" for task in TASKS[options.name]}
    rows: list[Row] = []
    for seed in range(options.seeds):
        for family in options.family or families(K[options.name]):
            directory = trained(options.name, family, seed)
            kept = directory / f"circuits-{options.method}-{options.ablation}.json"
            if options.train_only:
                continue
            if not kept.exists():
                write_json(kept, {"rows": list(measure(directory, tasks, not rows, options))})
            found = json.loads(kept.read_text())["rows"]
            rows += [
                row | ({"family": None} if row["variant"] in SHARED else {"family": family, "seed": seed}) for row in found
            ]
            print(directory, flush=True)
    if options.train_only:
        return
    about = {"pairs": options.n, "method": options.method, "ablation": options.ablation, "seeds": options.seeds}
    write_results(Path(f"docs/results/feature-circuits-{options.name}.json"), about | {"rows": rows})
    for task in tasks:
        table(rows, task)
    plot(rows, list(tasks), Path(f"docs/feature_circuits_{options.name}.png"))


if __name__ == "__main__":
    main()
