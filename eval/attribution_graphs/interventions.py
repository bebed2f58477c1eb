"""Validation of attribution graphs: effects predicted from edges against effects measured by intervening on latents.

Predictions use the adjacency matrix alone: the direct effect of a source on a target is one edge, the total effect the sum over
all paths. Measurements are

- direct: all MLP outputs keep their values, except for what the changed latent writes;
- total: what the changed latent writes is added, and everything downstream, MLPs included, responds;

each in the ``local`` replacement model, where it equals the prediction up to rounding; in the model with attention patterns and
norm denominators frozen (``norms``); with patterns frozen only (``patterns``); and in the unmodified ``model``. Deviations of
total effects in ``norms`` are due to MLPs: latents that start or stop firing, and errors that change. Further deviations in
``patterns`` are due to norms, which rescale a stream from which something was removed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from ...training.activations.splice import model_spliced
from .edges import MAX_NUMBERS
from .graph import AttributionGraph, target_vectors
from .local_replacement_model import LocalReplacement
from .perturbed_runs import Measured, kept_positions

BATCH_RUNS = 32
EFFECTS = ("direct", "total")
PLACES = ("local", "norms", "patterns", "model")


@dataclass(frozen=True)
class Agreement:
    """Rank and linear correlation of predictions with measurements, over source-target pairs joined by an edge or path."""

    spearman: float
    pearson: float
    pairs: int


@dataclass(frozen=True)
class Interventions:
    """Effects of changing sources one at a time: ``(sources, targets)`` by kind of effect, measured ones by place and kind.

    ``sources`` and ``targets`` are node numbers. Targets are latents' pre-activations, followed by ``n_logits`` logits.
    """

    sources: Int[Tensor, " sources"]
    targets: Int[Tensor, " targets"]
    n_logits: int
    predicted: dict[str, Float[Tensor, "sources targets"]]
    measured: dict[str, dict[str, Float[Tensor, "sources targets"]]]

    def agreement(self, kind: str, place: str = "model", logits_only: bool = False) -> Agreement:
        """Return the agreement between predictions of a kind and measurements at one of the places.

        Raises:
            ValueError: If there are fewer than three pairs.
        """
        columns = slice(-self.n_logits if logits_only else None, None)
        predicted, found = self.predicted[kind][:, columns], self.measured[place][kind][:, columns]
        joined = predicted != 0
        x, y = predicted[joined].double().numpy(force=True), found[joined].double().numpy(force=True)
        if len(x) < 3:
            raise ValueError(f"interventions: expected at least 3 pairs that an edge joins, got {len(x)}. Give more sources.")
        ranked = np.corrcoef(stats.rankdata(x), stats.rankdata(y))
        return Agreement(float(ranked[0, 1]), float(np.corrcoef(x, y)[0, 1]), len(x))


@torch.no_grad()
def intervene(
    local: LocalReplacement,
    graph: AttributionGraph,
    sources: Int[Tensor, " sources"],
    targets: Int[Tensor, " targets"] | None = None,
    factor: float = 0.0,
    max_numbers: int = MAX_NUMBERS,
) -> Interventions:
    """Multiply latents by ``factor``, one at a time, and return predicted and measured effects; 0 ablates them.

    ``targets`` are the latents to measure, by default all; logits are always measured. Runs are batched as far as
    ``max_numbers`` entries per tensor allow.

    Raises:
        ValueError: If a source or target is not a latent of the graph.
    """
    every = torch.arange(len(graph.active), device=graph.adjacency.device)
    targets = every if targets is None else targets
    for name, chosen in (("sources", sources), ("targets", targets)):
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(every):
            raise ValueError(f"{name}: expected latents of the graph, 0 to {len(every) - 1}, got {chosen.tolist()}.")
    columns = torch.cat([targets, torch.arange(graph.logits.start, graph.n_nodes, device=targets.device)])
    predicted = predict(graph, sources, factor)
    runs = runs_within(local, max_numbers)
    return Interventions(
        sources,
        columns,
        len(graph.targets),
        {kind: changes[:, columns] for kind, changes in predicted.items()},
        {
            place: {kind: _measured(local, graph, sources, factor, kind, place, runs)[:, columns] for kind in EFFECTS}
            for place in PLACES
        },
    )


def runs_within(local: LocalReplacement, max_numbers: int, at_most: int = BATCH_RUNS) -> int:
    """Return the number of runs in a batch, so that neither logits nor all layers' changes exceed ``max_numbers`` entries."""
    anatomy = local.anatomy
    per_run = len(local.token_ids) * max(len(anatomy.W_U), anatomy.n_layers * anatomy.d_model)
    return max(1, min(at_most, max_numbers // per_run))


def most_influential(graph: AttributionGraph, count: int) -> Int[Tensor, " sources"]:
    """Return the ``count`` latents with the most influence on the logits."""
    return graph.influence[graph.latents].topk(min(count, len(graph.active))).indices.sort().values


@torch.no_grad()
def predict(
    graph: AttributionGraph, sources: Int[Tensor, " sources"], factor: float = 0.0
) -> dict[str, Float[Tensor, "sources nodes"]]:
    """Return the changes of every node that the edges predict, direct and total, if latents are multiplied by ``factor``."""
    n, values = len(graph.active), graph.active.values
    keep = torch.cat([torch.arange(n), torch.arange(graph.logits.start, graph.n_nodes)]).to(values.device)
    per_unit = graph.adjacency[keep][:, :n] / values
    deltas = torch.zeros(len(keep), len(sources)).to(values)
    deltas[sources, torch.arange(len(sources), device=sources.device)] = (factor - 1) * values[sources]
    # Latents are ordered by layer, so the matrix is triangular: one substitution sums over all paths.
    inner = torch.eye(n).to(values) - per_unit[:n]
    moved = torch.linalg.solve_triangular(inner, deltas[:n], upper=False, unitriangular=True)
    total = torch.cat([moved - deltas[:n], per_unit[n:] @ moved])

    def spread(changes: Tensor) -> Tensor:
        return changes.new_zeros(len(sources), graph.n_nodes).index_copy_(1, keep, changes.T.contiguous())

    return {"direct": spread(per_unit @ deltas[:n]), "total": spread(total)}


@dataclass(frozen=True)
class Replaced:
    """Comparison of the replacement model, without error nodes, with the original model on one prompt; KL is in nats.

    ``kl_last`` and ``top1_last`` concern the prediction after the prompt; ``kl_mean`` and ``top1_share`` run over all positions
    whose MLPs are replaced.
    """

    kl_last: float
    kl_mean: float
    top1_last: bool
    top1_share: float


@torch.no_grad()
def compare_replacement(local: LocalReplacement) -> Replaced:
    """Compare the replacement model, without errors, with the original model; MLPs without a transcoder stay."""
    model, first = local.anatomy.model, local.exclude_leading
    with model_spliced(model, local.replacement.insertions(), kept=kept_positions(local, 1)):
        logits = model.logits(local.token_ids[None])[0, first:]
    own = local.trace.logits[0, first:].float().log_softmax(-1)
    other = logits.float().log_softmax(-1)
    kl = (own.exp() * (own - other)).sum(-1)
    same = own.argmax(-1) == other.argmax(-1)
    return Replaced(float(kl[-1]), float(kl.mean()), bool(same[-1]), float(same.float().mean()))


def _measured(
    local: LocalReplacement, graph: AttributionGraph, sources: Tensor, factor: float, kind: str, place: str, runs: int
) -> Float[Tensor, "sources nodes"]:
    hold, parts = kind == "direct", sources.split(runs)
    if place == "local":
        return torch.cat([_replayed(local, graph, some, factor, hold) for some in parts])
    measured = Measured(local, graph, hold, hold_patterns=place != "model", hold_norms=place == "norms")
    return torch.cat([measured.changes(some, factor) for some in parts])


def _replayed(
    local: LocalReplacement, graph: AttributionGraph, some: Tensor, factor: float, hold: bool
) -> Float[Tensor, "sources nodes"]:
    active, runs = graph.active, torch.arange(len(some), device=some.device)
    values = active.values.repeat(len(some), 1)
    given = torch.zeros_like(values, dtype=torch.bool)
    values[runs, some] *= factor
    given[runs, some] = True
    replayed = local.replay(active, values, given, hold)
    return graph.changes(replayed.pre_acts, replayed.last @ target_vectors(local, graph.targets).T)
