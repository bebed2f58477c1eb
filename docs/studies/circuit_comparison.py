"""Compare circuits where the answer is known or can be expected: tasks of the embedded model, a fine-tuned copy, a repair.

    python docs/studies/circuit_comparison.py --out runs/compared
    python docs/studies/circuit_comparison.py --out runs/compared --seeds 3

The first takes about 10 minutes on one CPU core, and writes docs/results/circuit-comparison.json and pages below --out. The
second repeats its main claims with other pairs and another fine-tuned copy for every seed, a few minutes each, and writes
docs/results/circuit-comparison-seeds.json.
"""

import argparse
import copy
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from results import write_results
from scipy.stats import t as student
from torch import Tensor, nn

import sparsary
from sparsary.eval.circuits.compared_units import components, mlp_neurons
from sparsary.eval.circuits.comparison.checkpoints import changed_units
from sparsary.eval.circuits.comparison.overlaps import EQUAL, difference_rows, overlap_rows
from sparsary.eval.circuits.comparison.repair import repair
from sparsary.eval.circuits.comparison.scored_task import ScoredTask, score_task
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.tasks.pairs import PromptPairs
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.training.activations.model import LanguageModel
from sparsary.training.embedded import lexicon

Row = dict[str, Any]

RESULTS = Path(__file__).parents[1] / "results" / "circuit-comparison.json"
RESULTS_OF_SEEDS = RESULTS.with_name("circuit-comparison-seeds.json")
TASKS = ("agreement_pp", "agreement_across_rc", "greater_than", "induction", "docstring")
# The parts that are free in fine-tuning: a head of layer 2 (of four heads), and the MLP of layer 3.
LAYER, HEAD, MLP = 2, 1, 3
STEPS, BATCH, LR = 150, 64, 3e-3
GIFTS = lexicon.OBJECTS[:2]


def gift_lines(n: int, seed: int) -> list[Row]:
    """Return pairs of a task that the embedded language lacks: men find one object, women another."""
    random, found = Random(seed), {}
    while len(found) < n:
        gender = random.randrange(2)
        names = (lexicon.MALE_NAMES, lexicon.FEMALE_NAMES)
        name, other = random.choice(names[gender]), random.choice(names[1 - gender])
        job, verb = random.choice(lexicon.ROLES_OF_PEOPLE), random.choice(("lost", "wanted", "found"))
        answers = {"answers": [f" {GIFTS[gender]}"], "foils": [f" {GIFTS[1 - gender]}"]}
        prompts = {key: f"The {job} {one} {verb} the" for key, one in (("clean", name), ("corrupted", other))}
        found[prompts["clean"]] = prompts | answers | {"task": "gifts"}
    return list(found.values())


def joined_lines(n: int, seed: int) -> list[Row]:
    """Return pairs that the embedded language lacks: two nouns joined by "and" are plural, one beside the other is not."""
    random, found = Random(seed), {}
    while len(found) < n:
        number = random.randrange(2)
        (one, _), (other, _) = random.sample(lexicon.NOUNS, 2)
        texts = [f"The {one} {random.choice(lexicon.LOCATIVES)} the {other}", f"The {one} and the {other}"]
        verbs = [[f" {verb[i]}" for verb in lexicon.VERBS] for i in (number, 1 - number)]
        line = {
            "clean": texts[number],
            "corrupted": texts[1 - number],
            "answers": verbs[0],
            "foils": verbs[1],
            "task": "joined",
        }
        found[texts[number]] = line
    return list(found.values())


def write_lines(path: Path, lines: Iterable[Row]) -> str:
    """Write pairs as JSON lines and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def free_parts(module: Any, layer: int, head: int, mlp: int) -> dict[nn.Parameter, Tensor]:
    """Return the parameters of one head and one MLP of a GPT-2, each with a mask of the entries that are theirs."""
    blocks, width = module.transformer.h, module.config.n_embd
    attention = blocks[layer].attn
    size = width // attention.num_heads
    columns = torch.zeros(3 * width)
    for side in range(3):
        columns[side * width + head * size : side * width + (head + 1) * size] = 1
    rows = torch.zeros(width, 1)
    rows[head * size : (head + 1) * size] = 1
    free = {attention.c_attn.weight: columns, attention.c_attn.bias: columns, attention.c_proj.weight: rows}
    return free | {parameter: torch.ones_like(parameter) for parameter in blocks[mlp].mlp.parameters()}


def fine_tuned(base: LanguageModel, pairs: PromptPairs, steps: int = STEPS, seed: int = 0) -> LanguageModel:
    """Return a copy of a model trained on the clean prompts of a task, with one head and one MLP free."""
    module = copy.deepcopy(base.module)
    free = free_parts(module, LAYER, HEAD, MLP)
    for parameter, mask in free.items():
        parameter.requires_grad_(True)
        parameter.register_hook(partial(torch.mul, mask))
    optimizer, draw = torch.optim.Adam(list(free), lr=LR), torch.Generator().manual_seed(seed)
    ends = torch.tensor([questions[-1].position for questions in pairs.questions])
    answers = torch.tensor([questions[-1].answers[0] for questions in pairs.questions])
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(pairs), (BATCH,), generator=draw)
            logits = module(pairs.clean[rows]).logits[torch.arange(BATCH), ends[rows]]
            optimizer.zero_grad()
            F.cross_entropy(logits, answers[rows]).backward()
            optimizer.step()
    # The copy is frozen like any model; hooks on gradients go with the parameters.
    return LanguageModel(module.requires_grad_(False), base.tokenizer, "fine-tuned", None)


def aucs(units: Sequence[Row], changed: set[str]) -> Row:
    """Return how well gains in score, and exchanged weights, rank the parts that were free above the others."""
    truth = torch.tensor([unit["unit"] in changed for unit in units])
    keys = ("gain", "exchanged")
    return {key: roc_auc(torch.tensor([abs(unit[key]) for unit in units], dtype=torch.float64), truth) for key in keys}


def scored(model: LanguageModel, pairs: PromptPairs, name: str, space: NodeSpace | None = None, number: int = 0) -> ScoredTask:
    """Return a task's scores of heads and MLPs, or of the units of another space, by attribution."""
    half, space = len(pairs) // 2, space or NodeSpace(model, components(model))
    halves = pairs.take(slice(0, half)), pairs.take(slice(half, len(pairs)))
    return score_task(name, model.id, space, *halves, METHODS["attribution"](), pairs_number=number)


def compared_tasks(base: LanguageModel, n_pairs: int, out: Path) -> Row:
    """Compare circuits of neurons, heads and MLPs of the model's own tasks."""
    settings = sparsary.CircuitSettings(tasks=TASKS, methods=("attribution",), pairs=n_pairs)
    found = sparsary.compare_circuits(settings=settings, models=[base], out=out / "tasks")
    return {key: found[key] for key in ("tasks_scored", "overlaps", "cross", "differences")}


def compared_checkpoints(base: LanguageModel, out: Path, seed: int = 0) -> Row:
    """Compare heads and MLPs of the model with those of a copy in which a head and an MLP were trained."""
    lines = gift_lines(400, seed)
    taught, gifts = (
        make_pairs(write_lines(out / f"{name}.jsonl", some), base, None)
        for name, some in (("taught", lines[100:]), ("gifts", lines[:100]))
    )
    row = changed_units(
        *(scored(model, gifts, name) for model, name in ((base, "base"), (fine_tuned(base, taught, seed=seed), "tuned"))),
        n_random=10,
        seed=seed,
    )
    return row | {"auc": aucs(row["units"], {f"a{LAYER}/{HEAD}", f"m{MLP}"})}


def repaired(base: LanguageModel, n_pairs: int, out: Path, seed: int = 0) -> list[Row]:
    """Repair a task that the model lacks by heads and MLPs of tasks that it has."""
    pairs = make_pairs(write_lines(out / "joined.jsonl", joined_lines(n_pairs, seed)), base, None)
    joined, rows = scored(base, pairs, "joined"), []
    for name in ("agreement_simple", "agreement_pp"):
        helper = scored(base, make_pairs(name, base, n_pairs, seed), name)
        rows.append(repair(helper, joined, helper.size or 1, 10, seed))
    return rows


def claims(base: LanguageModel, n_pairs: int, out: Path, seed: int) -> Row:
    """Return the figures of the main claims for one seed: overlaps of agreement, the trained parts' ranks, repair."""
    space, tasks = NodeSpace(base, mlp_neurons(base)), []
    for number, name in enumerate(TASKS[:3]):
        tasks.append(scored(base, make_pairs(name, base, n_pairs, seed), name, space, number))
    overlaps = {(row["a"], row["b"]): row for row in overlap_rows(tasks, seed) if row["at"] == EQUAL}
    alike, apart = overlaps[TASKS[:2]], overlaps[TASKS[0], TASKS[2]]
    difference = next(row for row in difference_rows(tasks) if (row["a"], row["b"], row["c"]) == TASKS[:3])
    found: Row = {"seed": seed, "alike": alike["jaccard"], "apart": apart["jaccard"], "difference": difference["difference"]}
    found |= {"ceiling": alike["ceiling"], "halves": alike["jaccard_halves"], "floor": alike["floor"]}
    found |= {"p_alike": alike["p_holm"], "p_difference": difference["p_holm"]}
    changed = compared_checkpoints(base, out, seed)
    trained = {f"a{LAYER}/{HEAD}", f"m{MLP}"}
    found |= {f"auc_{key}": value for key, value in changed["auc"].items()}
    found["exchanged_trained"] = min(abs(unit["exchanged"]) for unit in changed["units"] if unit["unit"] in trained)
    found["exchanged_others"] = max(abs(unit["exchanged"]) for unit in changed["units"] if unit["unit"] not in trained)
    found["ceiling_exchanged"] = changed["ceiling_exchanged"]
    found |= {key: changed.get(effect, {}).get(key) for effect, key in (("ablated", "lost"), ("put", "closed"))}
    for row in repaired(base, n_pairs, out, seed):
        found |= {f"{key} by {row['a']}": row.get(key) for key in ("accuracy_before", "accuracy_after", "accuracy_opposite")}
    return found


def over_seeds(seeds: int, n_pairs: int, out: Path) -> None:
    """Write the claims of every seed, and their means with 95 % intervals."""
    base = LanguageModel.from_pretrained("embedded", device="cpu")
    runs = [claims(base, n_pairs, out / str(seed), seed) for seed in range(seeds)]
    table = {}
    for name in (key for key in runs[0] if key != "seed"):
        known = [run[name] for run in runs if run.get(name) is not None]
        if len(known) > 1:
            half = float(student.ppf(0.975, len(known) - 1) * np.std(known, ddof=1)) / len(known) ** 0.5
            table[name] = {"mean": round(float(np.mean(known)), 4), "half": round(half, 4), "runs": len(known)}
            print(f"| {name} | {table[name]['mean']:.3f} +- {half:.3f} | {', '.join(f'{value:.3g}' for value in known)} |")
    write_results(RESULTS_OF_SEEDS, {"pairs": n_pairs, "over_seeds": table, "runs": runs})
    print(f"results: {RESULTS_OF_SEEDS}")


def main(out: Path, n_pairs: int) -> None:
    base = LanguageModel.from_pretrained("embedded", device="cpu")
    found = {"checkpoints": compared_checkpoints(base, out), "repairs": repaired(base, n_pairs, out)}
    write_results(RESULTS, found | {"tasks": compared_tasks(base, n_pairs, out)})
    print(f"results: {RESULTS}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compared"))
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seeds", type=int, help="repeat the main claims with so many seeds")
    arguments = parser.parse_args()
    if arguments.seeds:
        over_seeds(arguments.seeds, arguments.pairs, arguments.out)
    else:
        main(arguments.out, arguments.pairs)
