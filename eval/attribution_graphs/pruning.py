"""Influence, pruning and scores of attribution graphs.

An adjacency matrix has a row per target and a column per source; targets without computed edges have zero rows. Influence
propagates weights on the logits backwards, from each target to its sources in proportion to the edges' magnitudes. It ends
after as many steps as the graph has layers.

Source: Ameisen, Lindsey et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models"; thresholds and the
order of pruning follow its published code, circuit-tracer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98
# Keeps rows without edges at zero.
SMALLEST_SUM = 1e-10
CYCLE = "adjacency: expected a graph without cycles, got one in which influence does not come to an end."


@dataclass(frozen=True)
class Pruned:
    """Masks of kept nodes and edges. ``cumulative`` is the share of influence of a node and all more influential ones."""

    nodes: Bool[Tensor, " nodes"]
    edges: Bool[Tensor, "nodes nodes"]
    cumulative: Float[Tensor, " nodes"]


@dataclass(frozen=True)
class GraphScores:
    """Scores of a graph.

    ``replacement`` is the share of influence on tokens rather than errors; ``completeness`` is the influence-weighted share of
    edges that do not come from errors.
    """

    replacement: float
    completeness: float


def normalised_influence(adjacency: Float[Tensor, "rows nodes"]) -> Float[Tensor, "rows nodes"]:
    """Return edge magnitudes, normalized to sum to one in every row."""
    magnitudes = adjacency.abs()
    return magnitudes / magnitudes.sum(1, keepdim=True).clamp_min(SMALLEST_SUM)


def influence(adjacency: Float[Tensor, "nodes nodes"], weights: Float[Tensor, " nodes"]) -> Float[Tensor, " nodes"]:
    """Return the influence of ``weights`` on every node, summed over paths of one or more steps.

    Raises:
        ValueError: If the graph has a cycle.
    """
    return _walked(normalised_influence(adjacency), weights)


def partial_influence(
    rows: Float[Tensor, "rows nodes"], weights: Float[Tensor, " targets"], numbers: Int[Tensor, " known"]
) -> Float[Tensor, " nodes"]:
    """Return the influence when only the rows of the targets, which come first, and of nodes ``numbers`` are known.

    Nodes without a row pass nothing on.
    """
    shares = normalised_influence(rows)
    step = torch.cat([weights, weights.new_zeros(len(numbers))])
    total = shares.new_zeros(shares.shape[1])
    for _ in range(len(rows) + 1):
        reached = step @ shares
        total += reached
        step = torch.cat([torch.zeros_like(weights), reached[numbers]])
        if not step.any():
            return total
    raise ValueError(CYCLE)


def prune(
    adjacency: Float[Tensor, "nodes nodes"],
    weights: Float[Tensor, " nodes"],
    n_latents: int,
    n_kept: int,
    node_threshold: float = NODE_THRESHOLD,
    edge_threshold: float = EDGE_THRESHOLD,
) -> Pruned:
    """Keep the most influential nodes, and among them the most influential edges, up to these shares of all influence.

    The first ``n_latents`` nodes are latents; the last ``n_kept``, tokens and logits, always stay. Latents without incoming or
    outgoing edges, and errors without outgoing edges, are removed repeatedly until none is left.

    Raises:
        ValueError: If a threshold is not between 0 and 1.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"{name}: expected a fraction of all influence, 0 to 1, got {threshold}.")
    reached = influence(adjacency, weights)
    nodes = reached >= _cut(reached, node_threshold)
    optional = len(adjacency) - n_kept
    nodes[optional:] = True
    among = normalised_influence(adjacency * nodes[:, None] * nodes)
    scores = among * (_walked(among, weights) + weights)[:, None]
    edges = (scores >= _cut(scores.flatten(), edge_threshold)) & (scores > 0)
    before = None
    while before is None or not torch.equal(before, nodes):
        before = nodes.clone()
        edges &= nodes[:, None] & nodes
        nodes[:optional] &= edges[:, :optional].any(0)
        nodes[:n_latents] &= edges[:n_latents].any(1)
    order = reached.argsort(descending=True, stable=True)
    cumulative = torch.zeros_like(reached)
    cumulative[order] = reached[order].cumsum(0) / reached.sum()
    return Pruned(nodes, edges, cumulative)


def scores(
    adjacency: Float[Tensor, "nodes nodes"], weights: Float[Tensor, " nodes"], errors: slice, tokens: slice
) -> GraphScores:
    """Return the replacement and completeness scores; both are 1 if no influence comes from errors."""
    shares = normalised_influence(adjacency)
    reached = _walked(shares, weights)
    explained, unexplained = reached[tokens].sum(), reached[errors].sum()
    at = reached + weights
    complete = ((1 - shares[:, errors].sum(1)) * at).sum() / at.sum()
    return GraphScores(float(explained / (explained + unexplained)), float(complete))


def _walked(shares: Float[Tensor, "nodes nodes"], weights: Float[Tensor, " nodes"]) -> Float[Tensor, " nodes"]:
    step = weights @ shares
    total = step.clone()
    for _ in range(len(shares)):
        if not step.any():
            return total
        step = step @ shares
        total += step
    raise ValueError(CYCLE)


def _cut(values: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """Return the smallest value needed for the largest entries to make up this share of the sum."""
    ordered = values.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum()
    # Rounding may keep the cumulative share below 1, even after the last positive entry.
    last = max(int((ordered > 0).sum()) - 1, 0)
    return ordered[min(int(torch.searchsorted(reached, share)), last)]
