"""Levels of an attribution graph: its latents in nested clusters, and a coarse-to-fine search for a circuit among them.

Clusters are spectral: latents are joined by the influence along the edges between them, in both directions, and the clusters of
each level are grouped into those of the next coarser one in the same way. The search opens clusters from the coarsest level
down to single latents. Clusters are units: each is scored by exact ablation, the drop of the targets in the model without it,
and the best are opened, as few as keep the targets near their value when all else is ablated. Cost is counted in passes, one
per run.

No network is learned to say which clusters to open, as in the source: influence is known exactly here, so it clusters the
latents, and ablation, which is exact too, decides. Source: hierarchical attribution graph decomposition (HAGD), of which only
the abstract and a review were read; clustering and search are of our own design.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.cluster import SpectralClustering
from torch import Tensor

from .ablated_runs import AblatedRuns
from .edges import MAX_NUMBERS
from .graph import AttributionGraph
from .local_replacement_model import LocalReplacement
from .pruning import normalised_influence

FAITHFULNESS = 0.9
# Clusters are opened until this share of what is missing from 1 remains, so that latents at the margin are among them.
MARGIN = 0.1
# Joins parts of a graph that no edge joins, as a fraction of the largest weight.
JOINED = 1e-6
SMALLEST_DROP = 1e-9


@dataclass(frozen=True)
class GraphLevel:
    """One level: the cluster of every latent; and of every cluster its influence, its effect, and whether it was opened.

    An effect is the drop of the targets when the cluster alone is ablated, as a share of the drop when all latents are; NaN if
    it was not measured, because the cluster is within one that was not opened.
    """

    labels: Int[Tensor, " latents"]
    influence: Float[Tensor, " clusters"]
    effects: Float[Tensor, " clusters"]
    opened: Bool[Tensor, " clusters"]


@dataclass(frozen=True)
class LevelSearch:
    """Levels, coarse to fine, and the circuit: a mask of latents, whose ``faithfulness`` is measured.

    ``passes`` counts all runs; ``flat_passes`` is the most that it takes to score every latent alone and find the circuit in
    that order.
    """

    levels: tuple[GraphLevel, ...]
    circuit: Bool[Tensor, " latents"]
    faithfulness: float
    passes: int
    flat_passes: int


def cluster_latents(graph: AttributionGraph, counts: Sequence[int], seed: int = 0) -> list[Int[Tensor, " latents"]]:
    """Return the cluster of every latent at each level, coarse to fine; clusters are numbered by influence, largest first.

    Raises:
        ValueError: If the counts do not increase, or exceed the number of latents.
    """
    n = len(graph.active)
    if not counts or list(counts) != sorted(set(counts)) or counts[0] < 1:
        raise ValueError(
            f"levels: expected increasing numbers of clusters, coarse to fine, got {', '.join(map(str, counts)) or 'none'}. "
            "Give 8,32,128, for example."
        )
    if counts[-1] > n:
        raise ValueError(
            f"levels: expected at most {n} clusters, the number of the graph's latents, got {counts[-1]}. Give smaller "
            "levels or a longer prompt."
        )
    strength = normalised_influence(graph.adjacency)[:n, :n] * graph.influence[:n, None]
    weights = (strength + strength.T).double().numpy(force=True)
    influence = graph.influence[:n].double().numpy(force=True)
    members, found = np.arange(n), []
    for count in reversed(counts):
        labels = _numbered(_spectral(weights, count, seed), influence)
        members = labels[members]
        found.append(torch.from_numpy(members.copy()).to(graph.active.layers.device))
        onto = np.eye(labels.max() + 1)[labels]
        weights, influence = onto.T @ weights @ onto, onto.T @ influence
    return found[::-1]


@torch.no_grad()
def search_levels(
    local: LocalReplacement,
    graph: AttributionGraph,
    counts: Sequence[int],
    faithfulness: float = FAITHFULNESS,
    seed: int = 0,
    max_numbers: int = MAX_NUMBERS,
    singles: bool = True,
) -> LevelSearch:
    """Return the levels of a graph and the circuit found along them.

    Args:
        counts: Number of clusters of each level, coarse to fine.
        faithfulness: Share of the drop when all latents are ablated that the circuit alone makes up for.
        singles: Score the latents of the opened clusters one by one; without it, all of them are the circuit.

    Raises:
        ValueError: If the counts or the faithfulness are out of range, or the latents have no effect on the targets together.
    """
    if not 0.0 < faithfulness <= 1.0:
        raise ValueError(f"faithfulness: expected a share above 0, up to 1, got {faithfulness}.")
    labels = cluster_latents(graph, counts, seed)
    judge = Judge(local, graph, max_numbers)
    within = torch.ones(len(graph.active), dtype=torch.bool, device=labels[0].device)
    levels = []
    for clusters in labels:
        masks = clusters == torch.arange(int(clusters.max()) + 1, device=clusters.device)[:, None]
        scored = (masks & within).any(1).nonzero()[:, 0]
        effects = graph.influence.new_full((len(masks),), math.nan)
        effects[scored] = judge.effects(masks[scored])
        chosen = scored[effects[scored].argsort(descending=True, stable=True)]
        size = judge.enough(masks[chosen], 1 - MARGIN * (1 - faithfulness))
        opened = torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
        opened[chosen[:size]] = True
        within = masks[opened].any(0)
        influence = torch.zeros_like(effects).index_add_(0, clusters, graph.influence[graph.latents])
        levels.append(GraphLevel(clusters, influence, effects, opened))
    if singles:
        circuit, reached = judge.circuit(within.nonzero()[:, 0], faithfulness)
    else:
        circuit, reached = within, float(judge.faithfulness(within[None]))
    n = len(graph.active)
    return LevelSearch(tuple(levels), circuit, reached, judge.passes, 2 + n + bisections(n))


def search_flat(
    local: LocalReplacement, graph: AttributionGraph, faithfulness: float = FAITHFULNESS, max_numbers: int = MAX_NUMBERS
) -> LevelSearch:
    """Return the circuit of latents in the order of their own effects, each measured by an ablation of its own."""
    judge = Judge(local, graph, max_numbers)
    every = torch.arange(len(graph.active), device=graph.adjacency.device)
    circuit, reached = judge.circuit(every, faithfulness)
    return LevelSearch((), circuit, reached, judge.passes, judge.passes)


class Judge:
    """Measures of sets of latents in the model, as shares of the drop of the targets when all latents are ablated.

    Raises:
        ValueError: If that drop is not above zero.
    """

    def __init__(self, local: LocalReplacement, graph: AttributionGraph, max_numbers: int = MAX_NUMBERS):
        self.runs, self.n = AblatedRuns(local, graph, max_numbers), len(graph.active)
        both = torch.zeros(2, self.n, dtype=torch.bool, device=graph.adjacency.device)
        both[1] = True
        self.whole, self.none = self.runs.metric(both).tolist()
        if self.whole - self.none < SMALLEST_DROP:
            raise ValueError(
                f"levels: expected latents that raise the targets together, got {self.whole:.4g} with them and {self.none:.4g} "
                "without. Give an answer, or an answer and a foil that the model tells apart."
            )

    @property
    def passes(self) -> int:
        return self.runs.passes

    def effects(self, masks: Bool[Tensor, "sets latents"]) -> Float[Tensor, " sets"]:
        """Return the drop when each set alone is ablated."""
        return (self.whole - self.runs.metric(masks)) / (self.whole - self.none)

    def faithfulness(self, masks: Bool[Tensor, "sets latents"]) -> Float[Tensor, " sets"]:
        """Return the share of the drop that each set makes up for when all other latents are ablated."""
        return (self.runs.metric(~masks) - self.none) / (self.whole - self.none)

    def enough(self, masks: Bool[Tensor, "sets latents"], share: float) -> int:
        """Return how many of the sets, from the first, are enough for a faithfulness, found by bisection; all if none is."""
        low, high = 0, len(masks)
        while low + 1 < high:
            middle = (low + high) // 2
            reached = float(self.faithfulness(masks[:middle].any(0)[None]))
            low, high = (low, middle) if reached >= share else (middle, high)
        return high

    def circuit(self, candidates: Int[Tensor, " some"], share: float) -> tuple[Bool[Tensor, " latents"], float]:
        """Return the candidates of largest effects that are enough together, and their faithfulness."""
        masks = torch.zeros(len(candidates), self.n, dtype=torch.bool, device=candidates.device)
        masks[torch.arange(len(candidates)), candidates] = True
        order = self.effects(masks).argsort(descending=True, stable=True)
        size = self.enough(masks[order], share)
        found = masks[order[:size]].any(0)
        return found, float(self.faithfulness(found[None]))


def bisections(n: int) -> int:
    """Return the most passes in which ``Judge.circuit`` finds a size among ``n`` and measures it."""
    return max(n - 1, 0).bit_length() + 1


def _spectral(weights: Float[np.ndarray, "n n"], count: int, seed: int) -> Int[np.ndarray, " n"]:
    n = len(weights)
    if count >= n:
        return np.arange(n)
    if count == 1:
        return np.zeros(n, dtype=int)
    joined = weights + JOINED * max(weights.max(), 1e-300)
    # Where the solver for few eigenvectors does not apply, the other one computes all of them.
    solver = "lobpcg" if n < 5 * count + 1 else "arpack"
    model = SpectralClustering(
        count, affinity="precomputed", eigen_solver=solver, assign_labels="cluster_qr", random_state=seed
    )
    return model.fit_predict(joined / joined.max())


def _numbered(labels: Int[np.ndarray, " n"], influence: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return labels without gaps, in descending order of the clusters' influence."""
    present, places = np.unique(labels, return_inverse=True)
    totals = np.bincount(places, influence, len(present))
    ranks = np.empty(len(present), dtype=int)
    ranks[np.argsort(-totals, kind="stable")] = np.arange(len(present))
    return ranks[places]
