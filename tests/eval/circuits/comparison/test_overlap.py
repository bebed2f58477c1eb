"""Overlap of circuits: what chance shares, tests, and scores of resampled pairs."""

import numpy as np
import pytest
import torch

from sparsary.eval.circuits.comparison.scored_task import half_distance, half_weights, mean_ratio, members
from sparsary.eval.circuits.scoring.faithfulness import jaccard
from sparsary.eval.circuits.scoring.overlap import (
    chance_p,
    jaccard_of_counts,
    rank_correlation,
    share_of_smaller,
    shared_by_chance,
    swap_p,
)
from sparsary.eval.circuits.scoring.random_circuits import random_circuit, random_circuits

GROUPS = {"a": slice(0, 40), "b": slice(40, 41), "c": slice(41, 101)}


def mask(*units, size=101):
    found = torch.zeros(size, dtype=torch.bool)
    found[list(units)] = True
    return found


def test_chance_shares_what_drawing_within_groups_shares():
    a, b = mask(*range(10), 40, *range(41, 61)), mask(*range(5, 20), 40, *range(50, 60))
    possible_a, possible_b = mask(*range(30), 40, *range(41, 101)), mask(*range(3, 40), 40, *range(45, 90))
    drawn = shared_by_chance(GROUPS, a, b, possible_a, possible_b, seed=3)
    generator = torch.Generator().manual_seed(0)
    by_hand = [
        int((random_circuit(a, GROUPS, generator, possible_a) & random_circuit(b, GROUPS, generator, possible_b)).sum())
        for _ in range(2000)
    ]
    assert drawn.mean() == pytest.approx(np.mean(by_hand), abs=0.12)
    assert drawn.std() == pytest.approx(np.std(by_hand), abs=0.12)
    # The only unit of its group is always shared.
    assert drawn.min() >= 1
    assert np.array_equal(drawn, shared_by_chance(GROUPS, a, b, possible_a, possible_b, seed=3))


def test_circuits_drawn_at_random_are_rarely_more_alike_than_chance():
    every = torch.ones(101, dtype=torch.bool)
    first = mask(*range(10), *range(41, 61))
    values = [
        chance_p(int((first & other).sum()), shared_by_chance(GROUPS, first, other, every, every))
        for other in random_circuits(first, GROUPS, 60, seed=1)
    ]
    # As p-values of discrete counts are: none too small.
    assert np.mean(np.array(values) <= 0.05) <= 0.1
    assert chance_p(int(first.sum()), shared_by_chance(GROUPS, first, first, every, every)) == pytest.approx(1e-4)


def test_a_random_circuit_has_the_counts_of_the_given_one():
    kept, among = mask(0, 1, 2, 40, 41, 99), mask(*range(6), 40, *range(41, 45), 99)
    for found in random_circuits(kept, GROUPS, 20, seed=2, among=among):
        assert [int(found[group].sum()) for group in GROUPS.values()] == [3, 1, 2]
        assert not (found & ~among).any()
    drawn = torch.stack(random_circuits(kept, GROUPS, 200, seed=2, among=among)).float().mean(0)
    assert drawn[:6] == pytest.approx(0.5, abs=0.12)


def test_shares_of_circuits():
    a, b = mask(1, 2, 3, 4), mask(3, 4)
    assert jaccard(a, b) == 0.5
    assert share_of_smaller(a, b) == 1.0
    assert share_of_smaller(a, mask()) == 1.0
    counts = [np.array([n, 0]) for n in (2, 4, 2)]
    assert jaccard_of_counts(*counts).tolist() == [0.5, 1.0]


def test_a_difference_of_overlaps_is_a_sign_test_on_the_units_of_one():
    a = mask(*range(20))
    assert swap_p(a, mask(*range(10)), mask(*range(50, 60))) == pytest.approx(2 / 2**10)
    assert swap_p(a, mask(*range(10)), mask(*range(10, 20))) == 1.0
    # Units of neither or both say nothing.
    assert swap_p(a, mask(*range(10), 60), mask(*range(10), 70)) == 1.0


def test_rank_correlation_has_middle_ranks_for_ties_and_is_not_defined_for_constants():
    a = np.array([[1.0, 2, 3, 4], [1, 1, 1, 1]])
    b = np.array([[10.0, 20, 30, 40], [1, 2, 3, 4]])
    found = rank_correlation(a, b)
    assert found[0] == pytest.approx(1.0)
    assert np.isnan(found[1])
    assert rank_correlation(np.array([0.0, 0, 1]), np.array([0.0, 1, 2])) == pytest.approx(np.sqrt(3) / 2)


def test_units_without_a_score_are_in_no_circuit():
    values = np.array([[0.0, -3, 0, 1], [0, 0, 0, 0], [4, 3, 2, 1]])
    assert members(values, 3).tolist() == [
        [False, True, False, True],
        [False, False, False, False],
        [True, True, True, False],
    ]


def test_halves_divide_the_pairs_and_their_distance_is_the_noise():
    weights = half_weights(9, seed=4)
    assert np.allclose(weights.sum(1), 1)
    assert ((weights > 0).sum(1) == 4).all()
    rng = np.random.default_rng(0)
    steady, noisy = np.full((64, 5), 2.0), 2 + rng.normal(size=(64, 5))
    assert half_distance(steady, 0) == pytest.approx(0.0, abs=1e-12)
    # The largest of five differences of means of 32 pairs each.
    assert 0.2 < half_distance(noisy, 0) < 0.5


def test_a_ratio_of_means_has_an_interval_or_none():
    rng = np.random.default_rng(1)
    below = 2 + rng.normal(size=80)
    found = mean_ratio(below / 2 + rng.normal(size=80) / 10, below)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(0.5, abs=0.05)
    nothing = mean_ratio(np.ones(4), np.zeros(4))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
