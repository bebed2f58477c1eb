"""Accuracy of attribution methods: estimated effects of units, compared with exact patching, by site.

    python docs/studies/attribution_rules.py embedded [--dictionaries CHECKPOINT]
    python docs/studies/attribution_rules.py stories3M --model MODEL_DIRECTORY --pairs PAIRS_DIRECTORY

Sites: the residual stream after each block and the output of each MLP, per position; MLPs, and heads, over all positions;
MLP neurons; and, if given, latents of a dictionary or a stack of dictionaries. Scores are averaged over pairs and correlated,
over units, with the effects measured on the same pairs. Units are those that differ between clean and corrupted prompts, or
a random subset of them. Intervals are bootstrapped over pairs, resampled jointly for scores and effects; for random scores,
over seeds. Tasks are those of the embedded language, or for other models the files in the directory. Writes
docs/results/attribution-rules.json and keeps results of other models there.

Published figures for GPT-2 small on IOI (Jafari et al. 2025, arXiv:2508.21258), attribution patching and RelP: residual
stream 0.753 and 0.968, heads 0.979 and 0.962, MLP outputs 0.195 and 0.992.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_results
from scipy import stats

from sparsary.eval.circuits.compared_units import components, mlp_neurons, open_dictionaries
from sparsary.eval.circuits.methods import Method, UnitScores
from sparsary.eval.circuits.methods.attribution import AttributionPatching
from sparsary.eval.circuits.methods.baselines import ActivationMagnitude
from sparsary.eval.circuits.methods.exact import ExactPatching
from sparsary.eval.circuits.methods.integrated import IntegratedActivations, IntegratedInputs
from sparsary.eval.circuits.methods.relevance import RelevancePatching
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.tasks.pairs import PromptPairs
from sparsary.eval.circuits.units.nodes import Coordinates, NodeSpace, Part
from sparsary.training.activations.model import LanguageModel, load_model
from sparsary.training.activations.sites import n_layers, site_hooks
from sparsary.training.recipe import ModelSection

RESULT = Path("docs/results/attribution-rules.json")
TASKS = {
    "embedded": ("ioi", "greater_than", "agreement_pp"),
    "stories3M": ("ioi.jsonl", "pronoun.jsonl", "agreement.jsonl"),
}
# Methods by their names in the table.
COMPARED: dict[str, Method] = {
    "attribution": AttributionPatching(),
    "RelP": RelevancePatching(),
    "RelP, attention": RelevancePatching(attention=True),
    "RelP, corrupted": RelevancePatching(at="corrupted"),
    "norm rule alone": RelevancePatching(activation=False, gate=False),
    "MLP rules alone": RelevancePatching(normalisation=False),
    "IG inputs": IntegratedInputs(),
    "IG activations": IntegratedActivations(),
    "magnitude": ActivationMagnitude(),
}
SEEDS = 20
# Smallest standard deviation of the effects, relative to the largest effect, that is worth correlating: in prompts of a few
# tokens every residual stream carries the whole effect.
SPREAD = 0.05
DRAWS = 500


def sites(model: LanguageModel, length: int, dictionaries: str | None) -> Iterator[tuple[str, NodeSpace]]:
    """Yield the sites with their units; units per position require prompts of one length."""
    for site in ("resid_post", "mlp_out"):
        hooks = [site_hooks(model.module, layer, site)[1] for layer in range(n_layers(model.module))]
        widths = model.widths(tuple(hooks))
        parts: list[Part] = [Coordinates(hook, hook, widths[hook], widths[hook]) for hook in hooks]
        yield f"{site}, each position", NodeSpace(model, parts, "each", length)
    yield "mlp_out", NodeSpace(model, parts)
    yield "heads", NodeSpace(model, [part for part in components(model) if part.name.startswith("a")])
    yield "MLP neurons", NodeSpace(model, mlp_neurons(model))
    if dictionaries is not None:
        yield "latents and errors", NodeSpace(model, open_dictionaries(dictionaries).parts("node"))


def some_units(space: NodeSpace, pairs: PromptPairs, most: int) -> list[int]:
    """Return up to ``most`` random units whose activations differ on corrupted prompts."""
    differing = ActivationMagnitude().discover(space, pairs).values.nonzero().flatten()
    order = torch.randperm(len(differing), generator=torch.Generator().manual_seed(0))
    return differing[order[:most]].sort().values.tolist()


def compare(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return correlations of scores ``(pairs, units)`` with effects, over units, with 95 % intervals over pairs.

    ``pooled`` is the Pearson correlation over units and pairs together, without averaging first.
    """
    rng, n = np.random.default_rng(0), len(found)
    # Row 0 weights every pair equally; the others are bootstrap samples.
    counts = np.stack([np.ones(n), *(np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(DRAWS))]) / n
    a, b = counts @ found, counts @ exact
    pooled = {"pooled": round(float(pearson(found.reshape(1, -1), exact.reshape(1, -1))[0]), 4)}
    return with_intervals({"pearson": pearson(a, b), "spearman": spearman(a, b)}) | pooled


def compare_random(exact: np.ndarray) -> dict[str, float]:
    """Return the correlations of random scores: means and intervals over seeds."""
    several = np.stack([np.random.default_rng(seed).random(exact.shape[1]) for seed in range(SEEDS)])
    means = np.repeat(exact.mean(0)[None], SEEDS, axis=0)
    found = {"pearson": pearson(several, means), "spearman": spearman(several, means)}
    return with_intervals({key: np.concatenate([values.mean(keepdims=True), values]) for key, values in found.items()})


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each pair of rows."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Spearman correlation of each pair of rows."""
    return pearson(*(stats.rankdata(x, axis=1) for x in (a, b)))


def with_intervals(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the first of each, and the interval that contains 95 % of the others."""
    row = {}
    for key, (value, *draws) in values.items():
        low, high = np.quantile(draws, [0.025, 0.975])
        row |= {name: round(float(x), 4) for name, x in ((key, value), (f"{key}_low", low), (f"{key}_high", high))}
    return row


def of_units(scores: UnitScores, units: list[int]) -> np.ndarray:
    """Return the scores of some units for every pair."""
    assert scores.per_pair is not None
    return scores.per_pair[:, units].double().numpy()


def judge(model: LanguageModel, task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every site and method of one task."""
    name = task if options.pairs is None else f"{options.pairs}/{task}"
    pairs = make_pairs(name, model, options.n, one_length=True)
    rows = []
    for site, space in sites(model, pairs.clean.shape[1], options.dictionaries):
        units = some_units(space, pairs, options.units)
        truth = ExactPatching(units=units).discover(space, pairs)
        exact = of_units(truth, units)
        if exact.mean(0).std() < SPREAD * np.abs(exact.mean(0)).max():
            print(f"{task}: {site}: all effects are alike, left out", flush=True)
            continue
        about = {"model": options.name, "task": Path(task).stem, "corruption": pairs.corruption, "metric": pairs.metric}
        about |= {"site": site, "units": len(units), "of": space.size, "pairs": len(pairs)}
        for method, discovered in COMPARED.items():
            scores = discovered.discover(space, pairs)
            cost = {"forwards": scores.cost.forwards, "backwards": scores.cost.backwards}
            rows.append(about | {"method": method} | compare(of_units(scores, units), exact) | cost)
        rows.append(about | {"method": "random"} | compare_random(exact))
    return rows


def table(rows: list[dict[str, Any]], key: str) -> str:
    """Format a table with one line per task and site, and one column per method."""
    methods = [*COMPARED, "random"]
    lines = [" | ".join(["task", "site", "units", *methods])]
    for about in dict.fromkeys((row["task"], row["site"], row["units"]) for row in rows):
        by = {row["method"]: row for row in rows if (row["task"], row["site"], row["units"]) == about}
        cells = [f"{by[m][key]:.2f} ({by[m][f'{key}_low']:.2f} to {by[m][f'{key}_high']:.2f})" for m in methods]
        lines.append(" | ".join([about[0], about[1], str(about[2]), *cells]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TASKS)
    parser.add_argument("--model", default=None, help="a model directory; the embedded model needs none")
    parser.add_argument("--pairs", default=None, help="the directory of pair files")
    parser.add_argument("--dictionaries", default=None, help="a checkpoint, or a directory of one for each layer")
    parser.add_argument("--n", type=int, default=100, help="pairs of each task")
    parser.add_argument("--units", type=int, default=150, help="units of each site that are patched, at most")
    options = parser.parse_args()
    model = load_model(ModelSection(id=options.model or "embedded", device="cpu"))
    start, rows = time.perf_counter(), []
    for task in TASKS[options.name]:
        rows += judge(model, task, options)
        print(f"{task}: {time.perf_counter() - start:.0f} s", flush=True)
    for key in ("pearson", "spearman"):
        print(f"\n{key}\n{table(rows, key)}")
    others = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    kept = [row for row in others if row["model"] != options.name]
    write_results(RESULT, {"intervals": "95 %, of pairs drawn anew; of random scores, over seeds", "rows": kept + rows})


if __name__ == "__main__":
    main()
