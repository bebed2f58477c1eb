"""How much of a graph leads to its targets, what may be left out, and how much of it latents explain.

An adjacency matrix has a row per target and a column per source; targets that are not computed have zero rows. Influence
is what reaches a node when weights on the logits walk backwards, at every target in proportion to the magnitude of its
edges. It ends after as many steps as the graph has layers.

Source: Ameisen, Lindsey et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models"; thresholds and the
order of pruning follow its published code, circuit-tracer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98
# Rows whose edges are all zero stay zero.
SMALLEST_SUM = 1e-10
CYCLE = "adjacency: expected a graph without cycles, got one in which influence does not come to an end."


@dataclass(frozen=True)
class Pruned:
    """Which nodes and edges are kept. ``cumulative`` is the share of influence of a node and all more influential ones."""

    nodes: Bool[Tensor, " nodes"]
    edges: Bool[Tensor, "nodes nodes"]
    cumulative: Float[Tensor, " nodes"]


@dataclass(frozen=True)
class GraphScores:
    """Of all influence on tokens and errors together, and of all edges, the share that errors do not have."""

    replacement: float
    completeness: float


def normalised_influence(adjacency: Float[Tensor, "rows nodes"]) -> Float[Tensor, "rows nodes"]:
    """Magnitudes, those of every row adding up to one."""
    magnitudes = adjacency.abs()
    return magnitudes / magnitudes.sum(1, keepdim=True).clamp_min(SMALLEST_SUM)


def influence(adjacency: Float[Tensor, "nodes nodes"], weights: Float[Tensor, " nodes"]) -> Float[Tensor, " nodes"]:
    """What reaches every node from ``weights`` on the targets, after any number of steps but none.

    Raises:
        ValueError: If the graph has a cycle.
    """
    return _walked(normalised_influence(adjacency), weights)


def partial_influence(
    rows: Float[Tensor, "rows nodes"], weights: Float[Tensor, " targets"], numbers: Int[Tensor, " known"]
) -> Float[Tensor, " nodes"]:
    """The same where rows are known of the targets, which come first, and of the nodes ``numbers``; others pass nothing on."""
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
    """The most influential nodes, and among them the most influential edges, up to these shares of all influence.

    The first ``n_latents`` nodes are latents; the last ``n_kept``, tokens and logits, always stay. Latents without edges in
    or out, and errors without edges out, go, until there are none.

    Raises:
        ValueError: If a threshold is not between 0 and 1.
    """
    for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"{name}: expected 0 to 1, a share of all influence, got {threshold}.")
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
    """Replacement and completeness score of a graph: 1 where no influence comes from errors."""
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
    """The value of the least entry that is needed for the largest ones to make up this share of the sum."""
    ordered = values.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum()
    # Beyond the last entry that counts the running share may stay below 1 by rounding.
    last = max(int((ordered > 0).sum()) - 1, 0)
    return ordered[min(int(torch.searchsorted(reached, share)), last)]
