"""Feature circuits with ground truth: recovery of circuits by SAE latents when the residual stream is rotated.

    python docs/studies/known_features.py [--seeds 3]
    python docs/studies/known_features.py --tables

Models with hand-written weights compute with named directions. As built, these are neurons; after a random rotation, no
neuron is one of them. On both, circuits are discovered by attribution patching of neurons of the residual stream after every
block, the planted directions themselves (both signs, as a dictionary), latents of an SAE trained on the stream (errors
ablated), and random features. Half of the pairs choose the circuits, the other half judge them; of these, every other pair
sizes the circuit of 80 % faithfulness, and the rest measure its faithfulness. Compared are also CMD and, for latents, the ROC
AUC of their scores, where positives are latents that write mostly into planted directions with an exact effect. Writes
docs/results/known-features.json and prints the tables of docs/circuit_latents.md; --tables prints them from that file.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import write_results
from scipy.stats import t

from sparsary.eval.circuits.compared_units import neurons
from sparsary.eval.circuits.known import KNOWN, Known, rotated
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.faithfulness import MEASURED_ON, SIZED_ON, Trials, curve, ranked, smallest_size
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.nodes import Latents, NodeSpace
from sparsary.eval.circuits.units.random_latents import random_like
from sparsary.sae import SAE, load_dictionary
from sparsary.sae.encoders import build_encoder
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe

MODELS = ("induction", "reverse", "fraction", "clock")
# A latent belongs to the circuit if relevant directions hold this share of its decoder direction's squared norm.
MOSTLY = 0.5
EFFECT = 1e-3
LEVEL = 0.8
PAIRS = 96


class Prompts:
    """Training stream of activations at a hook, on prompts of random tokens."""

    def __init__(self, known: Known, hook: str, seed: int, prompts: int = 4096):
        generator = torch.Generator().manual_seed(seed)
        length = known.pairs.clean.shape[1]
        # Prompts resemble the pairs: the token at each position is drawn from those that the pairs have there.
        seen = torch.cat([known.pairs.clean, known.pairs.corrupted])
        rows = torch.stack([seen[torch.randint(len(seen), (prompts,), generator=generator), at] for at in range(length)], 1)
        self.x = known.model.activations(rows, (hook,))[hook].flatten(0, 1)
        self.generator = generator

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(self.x), generator=self.generator)
        for rows in order.split(2048):
            yield self.x[rows]


def planted(known: Known) -> SAE:
    """Return the named directions, both signs of each, as a dictionary that reconstructs exactly."""
    directions = torch.stack(list(known.directions.values())).float()
    sae = SAE(directions.shape[1], 2 * len(directions), build_encoder({"name": "relu"}))
    with torch.no_grad():
        for matrix in (sae.W_enc, sae.W_dec):
            assert matrix is not None
            matrix.copy_(torch.cat([directions, -directions]))
    return sae.requires_grad_(False).eval()


def learned(known: Known, hook: str, seed: int, tokens: int) -> SAE:
    """Train an SAE with as many latents as directions; with more, each of the few prompts would get its own latent."""
    out = Path("runs/circuits/known-features") / known.name / hook.replace(":", "-") / f"seed-{seed}"
    stream = Prompts(known, hook, seed)
    directions = torch.stack(list(known.directions.values())).float()
    k = max(2, round(float(((stream.x @ directions.T).abs() > EFFECT).float().sum(-1).mean())))
    values = {
        "harvest": {"hooks": [hook], "tokens": 1},
        "dictionary": {"hook": hook, "n_latents": len(directions), "encoder": {"name": "topk", "k": k}},
        "tokens": tokens,
        "batch_tokens": 2048,
        "lr": 3e-3,
        "dead_after_tokens": 50_000,
        "seed": seed,
        "out_dir": str(out),
    }
    found = load_dictionary(train_recipe(resolve_recipe(check_recipe(values, "known-features")), stream))
    assert isinstance(found, SAE)
    return found.requires_grad_(False)


def measured(space: NodeSpace, known: Known) -> dict[str, Any]:
    """Return the nodes for 80 % faithfulness and CMD, by attribution patching under resampling."""
    half = len(known.pairs) // 2
    chosen_on, judged_on = known.pairs.take(slice(0, half)), known.pairs.take(slice(half, len(known.pairs)))
    order = ranked(METHODS["attribution"]().discover(space, chosen_on), "absolute")
    trials = Trials(space, judged_on, ablation_values(space, "resample", chosen_on))
    along = curve(trials, order, range(space.size + 1), complements=())
    size = smallest_size(trials, order, LEVEL, along, SIZED_ON)
    held = None if size is None else float(along.of_pairs(MEASURED_ON).at([size]).faithfulness()[0])
    return {"units": space.size, "nodes_80": size, "faithfulness_80": held, "cmd": along.cmd()}


def matched_auc(space: NodeSpace, truth: NodeSpace, known: Known) -> float:
    """Return the ROC AUC of scores for latents that write mostly into relevant directions."""
    scores = METHODS["attribution"]().discover(space, known.pairs).values.abs()
    exact = METHODS["exact"]().discover(truth, known.pairs).values.abs()
    labels = []
    for part, true_part in zip(space.parts, truth.parts, strict=True):
        assert isinstance(part, Latents)
        assert isinstance(true_part, Latents)
        matter = true_part.atoms[exact[truth.groups[true_part.name]] > EFFECT]
        # Directions are orthonormal; one that is relevant with both signs must count once.
        basis = (
            torch.linalg.svd(matter, full_matrices=False).Vh[: int(torch.linalg.matrix_rank(matter))].T
            if len(matter)
            else matter.T
        )
        atoms = torch.nn.functional.normalize(part.atoms, dim=-1)
        labels.append((atoms @ basis).pow(2).sum(-1) > MOSTLY)
    truths = torch.cat(labels)
    return float("nan") if bool(truths.all()) or not bool(truths.any()) else roc_auc(scores, truths)


def study(name: str, seed: int, tokens: int) -> list[dict[str, Any]]:
    """Return the rows of one model and seed, as built and rotated."""
    rows = []
    built = KNOWN[name](n_pairs=PAIRS, seed=seed)
    for known, basis in ((built, "as built"), (rotated(built, seed), "rotated")):
        hooks = [f"h.{layer}:out" for layer in range(known.config.n_layers)]
        saes = {hook: learned(known, hook, seed, tokens) for hook in hooks}
        truth = NodeSpace(known.model, [Latents(hook, planted(known), hook, hook, "ablated") for hook in hooks])
        latents = NodeSpace(known.model, [Latents(hook, saes[hook], hook, hook, "ablated") for hook in hooks])
        seen = known.model.activations(known.pairs.clean, tuple(hooks))
        chance = [
            Latents(hook, random_like(sae, seen[hook].flatten(0, 1), seed), hook, hook, "ablated") for hook, sae in saes.items()
        ]
        spaces = {
            "neurons": NodeSpace(known.model, neurons(known.model, hooks)),
            "planted directions": truth,
            "SAE latents": latents,
            "random features": NodeSpace(known.model, chance),
        }
        for family, space in spaces.items():
            row = {"model": name, "basis": basis, "seed": seed, "family": family} | measured(space, known)
            if family == "SAE latents":
                row["auc"] = matched_auc(space, truth, known)
            rows.append(row)
    return rows


def shown(values: list[float | None], none: str = "-", signed: bool = False) -> str:
    """Return the mean and half of the 95 % interval (Student's t) of the known values, and how many these are."""
    reached = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not reached:
        return none
    mean = statistics.mean(reached)
    text = f"{mean:{'+' if signed else ''}.3g}"
    if len(reached) > 1:
        text += f" +- {float(t.ppf(0.975, len(reached) - 1)) * statistics.stdev(reached) / math.sqrt(len(reached)):.2g}"
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)})"


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print the means over seeds, and the differences of latents to neurons, which share seed and pairs."""
    print("| model | basis | family | units | nodes for 80 % | faithfulness on other pairs | CMD | AUC of latents |")
    for key in dict.fromkeys((row["model"], row["basis"], row["family"]) for row in rows):
        own = [row for row in rows if (row["model"], row["basis"], row["family"]) == key]
        cells = [shown([row["nodes_80"] for row in own], "never")]
        cells += [shown([row.get(name) for row in own]) for name in ("faithfulness_80", "cmd", "auc")]
        print(f"| {' | '.join(key)} | {own[0]['units']} | {' | '.join(cells)} |")
    print("\n| model | basis | nodes for 80 %, latents less neurons | CMD, latents less neurons |")
    for key in dict.fromkeys((row["model"], row["basis"]) for row in rows):
        latents, coordinates = (
            {row["seed"]: row for row in rows if (row["model"], row["basis"], row["family"]) == (*key, family)}
            for family in ("SAE latents", "neurons")
        )
        cells = []
        for name in ("nodes_80", "cmd"):
            both = [(row[name], coordinates[seed][name]) for seed, row in latents.items()]
            cells.append(shown([None if None in pair else pair[0] - pair[1] for pair in both], signed=True))
        print(f"| {' | '.join(key)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--tables", action="store_true", help="print the tables of the last run")
    options = parser.parse_args()
    path = Path("docs/results/known-features.json")
    if not options.tables:
        models, seeds = options.model or MODELS, range(options.seeds)
        rows = [row for name in models for seed in seeds for row in study(name, seed, options.tokens)]
        write_results(path, {"rows": [{key: None if value != value else value for key, value in row.items()} for row in rows]})
    print_tables(json.loads(path.read_text(encoding="utf-8"))["rows"])


if __name__ == "__main__":
    main()
