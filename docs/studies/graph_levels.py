"""Circuits in attribution graphs by levels: faithfulness by size, and passes, beside exact ablation and attribution.

    sparsary train recipes/transcoders/embedded/stack.yaml
    python docs/studies/graph_levels.py runs/transcoders/embedded/stack

For prompts of a task, latents of the graph are put in order four ways: by exact ablation of each (one pass a latent); by the
levels 8, 32, 128 (the effect of the smallest cluster that was measured, per latent, then influence); by the total effect that
the edges predict; by influence. Circuits of growing size are then judged by ablating all other latents. Prints means and
95 % intervals over prompts and writes docs/results/graph-levels.json.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from results import write_results

from sparsary.eval.attribution_graphs.graph import AttributionGraph, graph_of
from sparsary.eval.attribution_graphs.interventions import predict
from sparsary.eval.attribution_graphs.levels import Judge, LevelSearch, search_levels
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.run import open_graph_target
from sparsary.eval.circuits.tasks import make_pairs

LEVELS = (8, 32, 128)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
ORDERS = ("exact", "levels", "predicted effect", "influence", "random")


def by_levels(graph: AttributionGraph, found: LevelSearch) -> torch.Tensor:
    """Return each latent's score: the effect per latent of its smallest measured cluster, and influence to break ties."""
    influence = graph.influence[graph.latents]
    score = torch.zeros_like(influence)
    for level in found.levels:
        sizes = torch.bincount(level.labels)
        own = (level.effects / sizes)[level.labels]
        score = torch.where(own.isnan(), score, own)
    return score + 1e-9 * influence / influence.max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--prompts", type=int, default=24)
    options = parser.parse_args()
    opened = open_graph_target(options.checkpoint)
    pairs = make_pairs(options.task, opened.model, options.prompts)
    curves: dict[str, list[list[float]]] = {order: [] for order in ORDERS}
    passes: dict[str, list[float]] = {order: [] for order in ORDERS}
    for clean, questions in zip(pairs.clean, pairs.questions, strict=True):
        [question] = questions
        local = LocalReplacement(opened.replacement, clean[: question.position + 1], 1)
        graph = graph_of(local, answer=question.answers[0], foil=question.foils[0])
        n = len(graph.active)
        judge = Judge(local, graph)
        found = search_levels(local, graph, LEVELS, singles=False)
        every = torch.arange(n)
        scores = {
            "exact": judge.effects(torch.eye(n, dtype=torch.bool)),
            "levels": by_levels(graph, found),
            "predicted effect": -predict(graph, every)["total"][:, -1],
            "influence": graph.influence[graph.latents],
            "random": torch.rand(n, generator=torch.Generator().manual_seed(len(passes["exact"]))),
        }
        spent = {"exact": n, "levels": found.passes}
        for order in ORDERS:
            ranks = scores[order].argsort(descending=True).argsort()
            masks = torch.stack([ranks < max(1, round(share * n)) for share in SHARES])
            curves[order].append(judge.faithfulness(masks).tolist())
            passes[order].append(spent.get(order, 0) / n)
    rows = {}
    for order in ORDERS:
        values = np.array(curves[order])
        half = 1.96 * values.std(0, ddof=1) / len(values) ** 0.5
        share = float(np.mean(passes[order]))
        rows[order] = {"mean": values.mean(0).round(4).tolist(), "half": half.round(4).tolist(), "passes": round(share, 4)}
        cells = " | ".join(f"{mean:.2f} ± {h:.2f}" for mean, h in zip(values.mean(0), half, strict=True))
        print(f"| {order} | {share:.0%} | {cells} |")
    entries = {"task": options.task, "prompts": options.prompts, "shares": SHARES, "levels": LEVELS, "orders": rows}
    write_results(Path("docs/results/graph-levels.json"), entries)


if __name__ == "__main__":
    main()
