"""Evaluation of circuit discovery methods on models with ground-truth circuits: recovery of edges and nodes.

    python docs/studies/known_circuits.py                       # hand-written and locally trained models
    python docs/studies/known_circuits.py --compiled MODELS     # also MODELS/tracr_reverse and other compiled programs

Units are all edges of the model, labeled by its circuit under resampling from the corrupted prompt. AUC is the probability
that an edge of the circuit scores above one outside it, ties counting half; a node scores as its best edge. Signed scores
count by magnitude, except those of masks. Every model is also evaluated under a random rotation of its residual stream, in
which no axis is meaningful (``_rotated0``). For Edge Pruning, the size of its own circuit and the number of correct edges in
it are reported too. Writes docs/results/known-circuits.json and prints its table.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import write_results

from sparsary.eval.circuits.known import COMPILED, KNOWN, Known, rotated
from sparsary.eval.circuits.methods import METHODS, Method, UnitScores
from sparsary.eval.circuits.methods.edge_pruning import EdgePruning, kept_units
from sparsary.eval.circuits.methods.exact import ExactPatching
from sparsary.eval.circuits.scoring.edge_circuits import node_scores
from sparsary.eval.circuits.scoring.roc import average_precision, roc_auc
from sparsary.eval.circuits.units.edges import EdgeSpace

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "known-circuits.json"
COMPARED = ("attribution", "integrated_inputs", "exact", "exact denoising", "exact both", "edge_pruning", "flow", "random")
# Methods whose scores are high for kept units and low for others, so that the sign counts.
SIGNED = ("edge_pruning", "flow", "random")


def models(compiled: Path | None) -> Iterator[Known]:
    """Yield every model with a ground-truth circuit, as built and rotated."""
    makers = [*KNOWN.values(), *(partial(make, compiled / name) for name, make in COMPILED.items() if compiled)]
    for make in makers:
        known = make()
        yield known
        yield rotated(known, seed=0)


def method(name: str, known: Known) -> Method:
    """Return a method by name. Edge Pruning uses the metric as its loss if the model has one output, so no KL."""
    if name == "edge_pruning" and known.config.d_vocab_out == 1:
        return EdgePruning(loss="metric")
    if name.startswith("exact "):
        return ExactPatching(direction=name.removeprefix("exact "))
    return METHODS[name]()


def judge(known: Known, name: str, space: EdgeSpace) -> dict[str, Any]:
    """Return one row of the table."""
    scores: UnitScores = method(name, known).discover(space, known.pairs)
    values = scores.values if name in SIGNED else scores.values.abs()
    edges = known.edge_labels("resample", space.names())
    nodes = known.node_labels("resample", space.edges.senders)
    row: dict[str, Any] = {
        "model": known.name,
        "method": name,
        "n_edges": len(edges),
        "in_circuit": int(edges.sum()),
        "edge_auc": roc_auc(values, edges),
        "edge_average_precision": average_precision(values, edges),
        "node_auc": roc_auc(node_scores(space.edges, values), nodes) if not nodes.all() else None,
        "forwards": scores.cost.forwards,
        "backwards": scores.cost.backwards,
        "seconds": round(scores.cost.seconds, 2),
    }
    if name == "edge_pruning":
        kept = kept_units(scores.values)
        row |= {"kept": int(kept.sum()), "kept_in_circuit": int((kept & edges).sum())}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Format a table of edge and node AUC by model and method; the last column counts correct edges of Edge Pruning."""
    lines = [f"{'edge AUC / node AUC':31}{'edges':>10}" + "".join(f"{name:>18}" for name in (*COMPARED, "kept rightly"))]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = {row["method"]: row for row in rows if row["model"] == model}
        cells = []
        for name in COMPARED:
            node = mine[name]["node_auc"]
            cells.append(f"{mine[name]['edge_auc']:.3f} / " + ("-" if node is None else f"{node:.3f}"))
        pruned = mine["edge_pruning"]
        cells.append(f"{pruned['kept_in_circuit']} of {pruned['kept']}")
        edges = f"{pruned['in_circuit']} of {pruned['n_edges']}"
        lines.append(f"{model:31}{edges:>10}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", type=Path, help="the directory of the compiled programs' directories")
    torch.set_num_threads(1)
    rows = []
    for known in models(parser.parse_args().compiled):
        space = EdgeSpace(known.model)
        rows += [judge(known, name, space) for name in COMPARED]
        print(table(rows[-len(COMPARED) :]), flush=True)
    write_results(RESULTS, {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
