"""Influence, pruning and scores against loops over paths written out in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from sparsary.eval.attribution_graphs.pruning import influence, normalised_influence, partial_influence, prune, scores

# Two latents of a lower layer, one of an upper; one error; two tokens; two logits.
A = np.zeros((8, 8))
A[0, 4], A[0, 3] = 3.0, -1.0
A[1, 5] = 2.0
A[2, [0, 1, 3, 4]] = 4.0, -2.0, 1.0, 1.0
A[6, [2, 0, 3]] = 5.0, 2.0, -3.0
A[7, [2, 1, 5]] = -1.0, 1.0, 2.0
WEIGHTS = np.array([0, 0, 0, 0, 0, 0, 0.7, 0.2])


def by_paths(adjacency, weights):
    """The sum over all paths from a logit down to a node of the product of shares."""
    totals = np.abs(adjacency).sum(1)
    reached = np.zeros(len(adjacency))
    paths = [((target,), weights[target]) for target in range(len(adjacency)) if weights[target]]
    while paths:
        path, amount = paths.pop()
        for source in np.flatnonzero(adjacency[path[-1]]):
            share = amount * abs(adjacency[path[-1], source]) / totals[path[-1]]
            reached[source] += share
            paths.append(((*path, source), share))
    return reached


def tensors():
    return torch.tensor(A), torch.tensor(WEIGHTS)


def test_influence_is_the_sum_over_all_paths():
    adjacency, weights = tensors()
    found = influence(adjacency, weights).numpy()
    assert np.allclose(found, by_paths(A, WEIGHTS))
    # By hand: the upper latent gets half of the first logit's weight and a quarter of the second's.
    assert found[2] == pytest.approx(0.7 * 0.5 + 0.2 * 0.25)
    # All weight ends in what has no inputs.
    assert found[[3, 4, 5]].sum() == pytest.approx(0.9)
    assert np.allclose(normalised_influence(adjacency).sum(1), [1, 1, 1, 0, 0, 0, 1, 1])


def test_partial_influence_is_influence_where_only_some_rows_are_known():
    adjacency, weights = tensors()
    numbers = torch.tensor([2, 0, 1])
    rows = torch.cat([adjacency[6:, :6], adjacency[numbers, :6]])
    assert np.allclose(partial_influence(rows, weights[6:], numbers), influence(adjacency, weights)[:6])
    unknown = A.copy()
    unknown[[0, 1]] = 0
    found = partial_influence(rows[:3], weights[6:], numbers[:1])
    assert np.allclose(found, by_paths(unknown, WEIGHTS)[:6])


def test_cycles_are_refused():
    adjacency, weights = tensors()
    adjacency[0, 2] = 1.0
    with pytest.raises(ValueError, match="without cycles"):
        influence(adjacency, weights)
    with pytest.raises(ValueError, match="without cycles"):
        partial_influence(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0]), torch.tensor([0]))


def test_scores_by_hand():
    adjacency, weights = tensors()
    found = scores(adjacency, weights, slice(3, 4), slice(4, 6))
    reached = by_paths(A, WEIGHTS)
    assert found.replacement == pytest.approx((reached[4] + reached[5]) / 0.9)
    error_share = np.array([1 / 4, 0, 1 / 8, 0, 0, 0, 3 / 10, 0])
    at = reached + WEIGHTS
    assert found.completeness == pytest.approx(((1 - error_share) * at).sum() / at.sum())


def kept_by_hand(adjacency, weights, n_latents, n_kept, node_threshold, edge_threshold):
    """Section by section as circuit-tracer's prune_graph does it, with loops."""

    def cut(values, share):
        ordered, reached = np.sort(values)[::-1], 0.0
        for value in ordered[ordered > 0]:
            reached += value
            if reached / ordered.sum() >= share - 1e-12:
                return value
        return ordered[ordered > 0][-1]

    n = len(adjacency)
    reached = by_paths(adjacency, weights)
    nodes = {i for i in range(n) if i >= n - n_kept or reached[i] >= cut(reached, node_threshold)}
    smaller = adjacency.copy()
    for i, j in itertools.product(range(n), repeat=2):
        if i not in nodes or j not in nodes:
            smaller[i, j] = 0
    at, totals = by_paths(smaller, weights) + weights, np.abs(smaller).sum(1)
    score = np.zeros_like(smaller)
    for i, j in zip(*np.nonzero(smaller), strict=True):
        score[i, j] = abs(smaller[i, j]) / totals[i] * at[i]
    least = cut(score.flatten(), edge_threshold)
    edges = {(i, j) for i, j in zip(*np.nonzero(smaller), strict=True) if score[i, j] >= least}
    while True:
        edges = {(i, j) for i, j in edges if i in nodes and j in nodes}
        gone = {i for i in nodes if i < n - n_kept and not any(j == i for _, j in edges)}
        gone |= {i for i in nodes if i < n_latents and not any(k == i for k, _ in edges)}
        if not gone:
            return nodes, edges
        nodes -= gone


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.6, 0.7), (0.3, 0.5), (1.0, 1.0)])
def test_pruning_keeps_what_a_loop_keeps(thresholds):
    generator = np.random.default_rng(4)
    cases = [(A, WEIGHTS, 3, 4)]
    for _ in range(5):
        random = np.tril(generator.normal(size=(17, 17)) * (generator.random((17, 17)) < 0.4), -1)
        order = np.array([9, 10, 11, 12, 13, 14, 5, 6, 7, 8, 0, 1, 2, 3, 4, 15, 16])
        # Latents, errors and tokens, then logits: errors and tokens have no inputs.
        random = random[np.ix_(order, order)]
        random[6:15] = 0
        weights = np.zeros(17)
        weights[15:] = 0.6, 0.3
        cases.append((random, weights, 6, 7))
    for adjacency, weights, n_latents, n_kept in cases:
        found = prune(torch.from_numpy(adjacency), torch.from_numpy(weights), n_latents, n_kept, *thresholds)
        nodes, edges = kept_by_hand(adjacency, weights, n_latents, n_kept, *thresholds)
        assert set(np.flatnonzero(found.nodes)) == nodes
        assert set(zip(*(index.tolist() for index in np.nonzero(found.edges.numpy())), strict=True)) == edges


def test_cumulative_shares_run_from_the_most_influential_node_to_all():
    adjacency, weights = tensors()
    pruned = prune(adjacency, weights, 3, 4)
    reached = by_paths(A, WEIGHTS)
    order = np.argsort(-reached)
    assert np.allclose(pruned.cumulative.numpy()[order], np.cumsum(reached[order]) / reached.sum())


def test_thresholds_beyond_their_range_are_refused():
    adjacency, weights = tensors()
    with pytest.raises(ValueError, match=r"node_threshold: expected a fraction of all influence, 0 to 1, got 1.5"):
        prune(adjacency, weights, 3, 4, node_threshold=1.5)
    with pytest.raises(ValueError, match=r"edge_threshold: expected a fraction of all influence, 0 to 1"):
        prune(adjacency, weights, 3, 4, edge_threshold=-0.1)
