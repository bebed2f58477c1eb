"""Attribution graphs of the embedded model: their scores, and the agreement of edges with interventions.

    sparsary train recipes/transcoders/embedded/stack.yaml
    sparsary train recipes/transcoders/embedded/cross_layer.yaml
    python docs/studies/graph_agreement.py runs/transcoders/embedded/stack runs/transcoders/embedded/cross_layer

Prompts are the first tokens of held-out documents. The most influential latents are ablated one at a time, with nothing
frozen, with attention patterns frozen, and with norms frozen as well, and the changes are compared with those that edges
(direct) and paths (total) predict. Prints medians and quartiles over prompts and writes docs/results/graph-agreement.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_results

from sparsary.eval.attribution_graphs.graph import graph_of
from sparsary.eval.attribution_graphs.interventions import EFFECTS, compare_replacement, intervene, most_influential
from sparsary.eval.attribution_graphs.local_replacement_model import LocalReplacement
from sparsary.eval.attribution_graphs.run import open_graph_target
from sparsary.training.recipe import TextSection
from sparsary.training.text import contexts

PLACES = ("norms", "patterns", "model")


def study(checkpoint: str, prompts: int, length: int, taken_out: int) -> list[dict[str, Any]]:
    """Return one row per prompt."""
    opened = open_graph_target(checkpoint)
    replacement = opened.replacement
    rows = []
    for context in contexts(TextSection(source="embedded", context_length=128), opened.model.tokenizer, heldout=0.05):
        local = LocalReplacement(replacement, torch.from_numpy(context.token_ids[:length]).long(), 1)
        graph = graph_of(local)
        scores, pruned, alone = graph.scores(), graph.prune(), compare_replacement(local)
        kept = pruned.nodes[: len(graph.active)].nonzero()[:, 0]
        found = intervene(local, graph, most_influential(graph, taken_out), kept)
        row = {
            "nodes": graph.n_nodes,
            "nodes kept": int(pruned.nodes.sum()),
            "edges kept": int(pruned.edges.sum()),
            "replacement score": scores.replacement,
            "completeness score": scores.completeness,
            "KL, last position": alone.kl_last,
            "KL, mean": alone.kl_mean,
            "same top token": alone.top1_share,
        }
        row |= {f"share of errors, layer {layer}": share for layer, share in enumerate(graph.error_shares().tolist())}
        row |= {f"Spearman, {e}, {place}": found.agreement(e, place).spearman for e in EFFECTS for place in PLACES}
        rows.append(row)
        if len(rows) == prompts:
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--taken-out", type=int, default=40)
    options = parser.parse_args()
    results = {}
    for checkpoint in options.checkpoints:
        rows = study(checkpoint, options.prompts, options.length, options.taken_out)
        results[checkpoint] = {
            name: [round(float(value), 4) for value in np.quantile([float(row[name]) for row in rows], [0.25, 0.5, 0.75])]
            for name in rows[0]
        }
        print(checkpoint)
        for name, (low, middle, high) in results[checkpoint].items():
            print(f"| {name} | {middle:.3g} [{low:.3g}, {high:.3g}] |")
    write_results(Path("docs/results/graph-agreement.json"), {"prompts": options.prompts, "quartiles": results})


if __name__ == "__main__":
    main()
