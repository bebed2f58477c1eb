"""Reliability as a label (after VRP): when a model is right on a prompt pair, and which parts of it tell.

    python docs/studies/reliability.py toy [--seeds 3]
    python docs/studies/reliability.py embedded [--seeds 3]
    python docs/studies/reliability.py models/stories3M --text TEXT.jsonl --pairs PAIRS.jsonl [--pairs ...]

The label of a pair is whether the model prefers the answer on the clean prompt. Predictors (reliability_predictors.py) are
attention entropy and attention on the tokens that decide the answer, confidence, the prompt's tokens, the answer, a linear
probe after every block, and k latents, MLP neurons or dimensions. They are fitted on one half of the pairs and scored on the
other: AUROC and point-biserial correlation with 95 % bootstrap intervals over pairs. The 5 neurons and the 5 latents of
strongest correlation are then set to their means, beside random ones of the same blocks, to see whether errors hang on them.

The toy (flag_toy.py) has the known answer: one planted flag causes its errors. The embedded model makes no errors on its own
tasks, so that it is asked harder ones (hard_prompts.py). Seeds draw prompts, halves and dictionaries (of a file, all pairs
are taken). Seeds that are finished are in runs/reliability and are not repeated. Writes docs/results/reliability.json, a part
for each model, and prints the tables of docs/reliability.md.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flag_toy import flag_toy
from hard_prompts import HARD
from reliability_predictors import (
    COLUMN_COUNTS,
    LEAST,
    Places,
    halves,
    judge,
    latent_columns,
    predictions,
    record,
    regression,
    strongest,
)
from results import write_results
from scipy.stats import t as student
from torch import Tensor

import sparsary
from sparsary.eval.circuits.compared_units import neurons, open_dictionaries
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.tasks.pairs import BATCH, PromptPairs
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.nodes import Latents, NodeSpace
from sparsary.eval.probing.probes import auroc
from sparsary.sae.files import read_json, write_json
from sparsary.sae.one_site import OneSiteDictionary
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.model import LanguageModel
from sparsary.training.recipe import read_values
from sparsary.training.recipe.grid import check_grid
from sparsary.training.resolve_hooks import resolve_recipes
from sparsary.training.run import train_all

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "reliability.json"
RUNS = Path("runs/reliability")
# Pairs of the toy, and of each task of the embedded model.
TOY_PAIRS, N_PAIRS = 4000, 1000
# Blocks of stories3M whose streams have dictionaries: a middle one and the last.
LAYERS = [3, 5]
# Units that are ablated together, and random draws of as many.
ABLATED, DRAWS = COLUMN_COUNTS[-1], 5
# A latent that fires on fewer of the pairs is not drawn.
LEAST_SHARE = 0.05

Row = dict[str, Any]
Dictionaries = Mapping[str, OneSiteDictionary]


def study(model: LanguageModel, pairs: PromptPairs, dictionaries: Dictionaries, seed: int) -> Row:
    """Return the figures of one model, task and seed.

    Args:
        dictionaries: SAEs of the residual stream after blocks, by hook.
    """
    found = record(model, pairs, seed)
    fit, judged = halves(found.right, seed, f"{model.id}, {pairs.task}")
    known, asked = found.rows(fit), found.rows(judged)
    latents = latent_columns(known, dictionaries), latent_columns(asked, dictionaries)
    rows = [judge(predictor, asked.right) for predictor in predictions(known, asked, latents)]
    spaces = {
        "neurons": (NodeSpace(model, neurons(model, Places.of(model).neurons)), known.neurons),
        "latents": (
            NodeSpace(model, [Latents(hook, sae, hook, hook, "kept") for hook, sae in dictionaries.items()]),
            latents[0],
        ),
    }
    last = list(found.streams)[-1]
    ablations = []
    for name, (space, columns) in spaces.items():
        trial = Trial(space, pairs.take(fit), pairs.take(judged))
        chosen = strongest(columns, known.right, ABLATED)
        sets = {"strongest": [chosen], "random": random_sets(space, columns, chosen, seed)}
        for which, several in sets.items():
            each = []
            for units in several:
                right, stream = trial.run(units)
                probe = regression(known.streams[last], known.right, stream)
                counts = int(right.sum()), int((~right).sum())
                each.append(
                    {
                        "accuracy": float(right.mean()),
                        "mended": float(right[~asked.right].mean()),
                        "broken": float((~right)[asked.right].mean()),
                        "probe_auroc": auroc(probe, right) if min(counts) >= LEAST else None,
                    }
                )
            ablations.append({"units": name, "which": which, "sets": len(each)} | mean_of(each))
    return {
        "task": pairs.task,
        "seed": seed,
        "pairs": len(pairs),
        "accuracy": float(found.right.mean()),
        "accuracy_scored": float(asked.right.mean()),
        "predictors": rows,
        "ablations": ablations,
    }


def mean_of(rows: Sequence[Row]) -> Row:
    """Return the means of several sets' figures, and the range of accuracies; None where no set has one."""
    found: Row = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = statistics.fmean(values) if values else None
    accuracies = [row["accuracy"] for row in rows]
    return found | {"accuracy_least": min(accuracies), "accuracy_most": max(accuracies)}


class Trial:
    """Ablation of units to their means over corrupted prompts of the half that fits, judged on the other half."""

    def __init__(self, space: NodeSpace, fit: PromptPairs, judged: PromptPairs):
        self.space, self.judged = space, judged
        self.fill = ablation_values(space, "mean", fit)
        # Read where the stream ends, because the units may write at the last block's own hook.
        self.hook = Architecture(space.model).final_norm_hook

    @torch.no_grad()
    def run(self, units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return which pairs are right without the units, and the last residual stream at their questions."""
        kept = torch.ones(self.space.size, dtype=torch.bool)
        kept[list(units)] = False
        right, streams = [], []
        for some in self.judged.batches(BATCH):
            at = torch.tensor([question.position for [question] in some.questions])
            seen: list[Tensor] = []
            with self.space.model.hooked({self.hook: lambda x, seen=seen: seen.append(x.clone())}):
                right.append(some.right(self.space.run(some.clean, kept, self.fill(some))))
            streams.append(seen[0][torch.arange(len(some)), at])
        return torch.cat(right).numpy() > 0.5, torch.cat(streams).double().numpy()


def random_sets(space: NodeSpace, columns: np.ndarray, chosen: Sequence[int], seed: int) -> list[list[int]]:
    """Return random sets of units that are active on the pairs: as many as were chosen, at the same hooks, none of them."""
    active = ((columns != 0).mean(0) >= LEAST_SHARE) & (columns.std(0) > 0)
    active[list(chosen)] = False
    generator = np.random.default_rng(seed)
    groups = space.group_of(chosen)
    found = []
    for _ in range(DRAWS):
        one: list[int] = []
        for name in dict.fromkeys(groups):
            group = space.groups[name]
            candidates = np.flatnonzero(active[group]) + group.start
            one += generator.choice(candidates, min(groups.count(name), len(candidates)), replace=False).tolist()
        found.append(one)
    return found


def trained(recipe: Path, folder: Path, seed: int, changes: Row) -> dict[str, OneSiteDictionary]:
    """Train the SAEs of a recipe's grid, on leading positions and BOS tokens too, as prompts begin with them."""
    out = folder / f"seed-{seed}"
    changes = {"harvest.exclude_leading": 0, "harvest.exclude_special": False, "harvest.gradients": False} | changes
    changes |= {"seed": seed, "out_dir": str(out), "harvest.store": str(folder / "activations")}
    train_all(resolve_recipes(check_grid(read_values(str(recipe), changes), folder.name).recipes))
    return dict(open_dictionaries(str(out)).by_hook)


def toy_dictionaries(
    model: LanguageModel, pairs: PromptPairs, seed: int, tokens: int = 400_000
) -> dict[str, OneSiteDictionary]:
    """Train an SAE after each block of the toy, on prompts of the pairs' kind."""
    found = {}
    for hook in Places.of(model).streams[1:]:
        x = model.activations(pairs.clean, (hook,))[hook].flatten(0, 1)
        with tempfile.TemporaryDirectory() as folder:
            values = {
                "dictionary": {"hook": hook, "n_latents": 48, "encoder": {"name": "topk", "k": 8}},
                "tokens": tokens,
                "batch_tokens": 1024,
                "lr": 3e-3,
                "dead_after_tokens": 50_000,
                "seed": seed,
                "out_dir": str(Path(folder) / "sae"),
                "save_every": 10**9,
            }
            sae = sparsary.load(sparsary.train(values, x))
        assert isinstance(sae, OneSiteDictionary)
        found[hook] = sae.requires_grad_(False).eval()
    return found


def toy_study(seed: int, n_pairs: int = TOY_PAIRS, tokens: int = 400_000) -> Row:
    """Return the figures of the toy; its dictionaries are trained on other prompts than those that are judged."""
    known, others = (flag_toy(n_pairs, seed, prompts_seed=2 * seed + part) for part in (0, 1))
    return study(known.model, known.pairs, toy_dictionaries(others.model, others.pairs, seed, tokens), seed)


def shown(values: Sequence[float | None], signed: bool = False) -> str:
    """Return the mean over seeds and half of its 95 % interval (Student's t)."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):{'+' if signed else ''}.3f}"
    if len(known) > 1:
        half = float(student.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / len(known) ** 0.5
        text += f" ± {half:.3f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} seeds)"


def print_tables(rows: Sequence[Row]) -> None:
    """Print the tables of docs/reliability.md: means over seeds, and of the first seed the interval over pairs."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        print(f"\n{task}: {own[0]['pairs']} pairs, accuracy {shown([row['accuracy'] for row in own])}, {len(own)} seeds\n")
        print("| predictor | AUROC | of seed 0, over pairs | point-biserial R |\n|---|---|---|---|")
        for name in [predictor["predictor"] for predictor in own[0]["predictors"]]:
            each = [next(p for p in row["predictors"] if p["predictor"] == name) for row in own]
            first = f"{each[0]['auroc']:.3f} ({each[0]['auroc_low']:.3f} to {each[0]['auroc_high']:.3f})"
            print(f"| {name} | {shown([p['auroc'] for p in each])} | {first} | {shown([p['r'] for p in each], True)} |")
        print(
            "\n| ablated | accuracy | errors mended | right answers broken | AUROC of the last probe |\n|---|---|---|---|---|"
        )
        print(f"| none | {shown([row['accuracy_scored'] for row in own])} | - | - | - |")
        for units, which in [(a["units"], a["which"]) for a in own[0]["ablations"]]:
            each = [next(a for a in row["ablations"] if (a["units"], a["which"]) == (units, which)) for row in own]
            cells = [shown([a[key] for a in each]) for key in ("accuracy", "mended", "broken", "probe_auroc")]
            print(f"| {ABLATED} {units}, {which} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="toy, embedded, or the directory of a model")
    parser.add_argument("--text", help="text of the model's dictionaries: JSON lines")
    parser.add_argument("--pairs", action="append", default=[], help="file of prompt pairs; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="print the tables of the last run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: Row = read_json(RESULTS) if RESULTS.exists() else {}
    name = Path(options.model).name
    if not options.tables:
        rows: list[Row] = []
        for seed in range(options.seeds):
            done = RUNS / name / f"figures-{seed}.json"
            if not done.exists():
                done.parent.mkdir(parents=True, exist_ok=True)
                write_json(done, {"rows": studied(options, name, seed)})
            rows += read_json(done)["rows"]
        write_results(RESULTS, found | {name: rows})
    print_tables(read_json(RESULTS)[name])


def studied(options: argparse.Namespace, name: str, seed: int) -> list[Row]:
    """Return the figures of every task of a model, for one seed."""
    if name == "toy":
        return [toy_study(seed)]
    model = LanguageModel.from_pretrained(options.model, device="cpu")
    if name == "embedded":
        changes = {"harvest.tokens": 200_000, "tokens": 400_000}
        dictionaries = trained(ROOT / "recipes" / "circuits" / "embedded.yaml", RUNS / name, seed, changes)
        tasks = [make(model, N_PAIRS, seed) for make in HARD.values()]
    else:
        changes = {"model.id": options.model, "text.files": [options.text], "harvest.tokens": 60_000, "tokens": 150_000}
        changes |= {"harvest.hooks": [f"model.layers.{layer}:out" for layer in LAYERS], "grid": {"dictionary.layer": LAYERS}}
        dictionaries = trained(ROOT / "recipes" / "circuits" / "stories3M.yaml", RUNS / name, seed, changes)
        tasks = [make_pairs(path, model, None, seed) for path in options.pairs]
    return [study(model, pairs, dictionaries, seed) for pairs in tasks]


if __name__ == "__main__":
    main()
