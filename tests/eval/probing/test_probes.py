"""Probes and detectors against definitions written out, on rows whose answer is known."""

import numpy as np
import pytest
from scipy import sparse

from sparsary.eval.bootstrap import bootstrap_f1, bootstrap_mean
from sparsary.eval.probing.absorption import absorbed
from sparsary.eval.probing.probes import (
    Search,
    auroc,
    best_threshold,
    f1_of,
    group_counts,
    logistic,
    ranking,
    split_latents,
)


def loss_gradient(probe, x, y, l2):
    """Of the penalised loss, in the standardised columns the penalty is on."""
    deviation = x.std(0)
    error = 1 / (1 + np.exp(-probe.scores(x))) - y
    return ((x - x.mean(0)) / deviation).T @ error + l2 * probe.weights * deviation, error.sum()


@pytest.mark.parametrize("width", [5, 600])
def test_probes_are_optima_of_the_penalised_loss(width):
    generator = np.random.default_rng(0)
    x = generator.normal(2, 3, (401, width))
    y = x[:, 0] + generator.normal(0, 1, 401) > 3
    probe = logistic(x, y, l2=2.0)
    weights, offset = loss_gradient(probe, x, y, 2.0)
    assert np.abs(weights).max() < 0.05
    assert abs(offset) < 0.1
    assert ((probe.scores(x) > 0) == y).mean() > 0.85


def test_sparse_columns_and_dense_ones_give_one_probe():
    generator = np.random.default_rng(1)
    x = generator.random((301, 7)) * (generator.random((301, 7)) < 0.4)
    y = x[:, 2] > 0.3
    dense, thin = logistic(x, y), logistic(sparse.csc_array(x), y)
    assert dense.scores(x) == pytest.approx(thin.scores(sparse.csc_array(x)), abs=0.05)
    # A constant column says nothing, and divides nothing by zero.
    assert logistic(np.column_stack([x, np.ones(301)]), y).weights[-1] == 0
    with pytest.raises(ValueError, match="expected two classes, got 0 positive rows of 301"):
        logistic(x, np.zeros(301, dtype=bool))


def test_auroc_and_thresholds_by_counting_pairs():
    generator = np.random.default_rng(2)
    scores, y = generator.integers(0, 6, 97).astype(float), generator.random(97) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[y] for b in scores[~y]]
    assert auroc(scores, y) == pytest.approx(np.mean(pairs))
    by_hand = max(f1_of(scores > threshold, y) for threshold in np.arange(-0.5, 6))
    f1, threshold = best_threshold(ranking(scores), y)
    assert f1 == pytest.approx(by_hand)
    assert f1_of(scores > threshold, y) == pytest.approx(f1)
    assert auroc(np.zeros(97), y) == 0.5
    assert auroc(scores, np.ones(97, dtype=bool)) == 0.5
    assert f1_of(np.zeros(3, dtype=bool), np.zeros(3, dtype=bool)) == 0


def test_the_best_column_is_found_with_its_sign():
    generator = np.random.default_rng(3)
    y = generator.random((2003, 3)) < [0.1, 0.3, 0.5]
    x = generator.normal(0, 1, (2003, 40))
    x[:, 17], x[:, 4] = 8 * y[:, 0] + x[:, 17], x[:, 4] - 9 * y[:, 1]
    search = Search(x, y)
    found = [search.best(label) for label in range(3)]
    assert [(d.column, d.sign) for d in found[:2]] == [(17, 1), (4, -1)]
    assert min(d.fitted_f1 for d in found[:2]) > 0.99
    assert f1_of(found[1].detects(x), y[:, 1]) == pytest.approx(found[1].fitted_f1)
    # Nothing tells of the third label: yes to everything is best, about.
    assert found[2].fitted_f1 == pytest.approx(2 / 3, abs=0.03)
    latents = sparse.csc_array(np.maximum(x, 0) * (x > 1.5))
    assert Search(latents, y).best(0).column == 17


def test_a_label_that_two_latents_share_is_split_in_two():
    generator = np.random.default_rng(4)
    y, which = generator.random(1009) < 0.3, generator.random(1009) < 0.6
    codes = np.zeros((1009, 5))
    codes[y & which, 1] = codes[y & ~which, 3] = 2.0
    codes[generator.random(1009) < 0.1, 0] = 1.0
    assert split_latents(sparse.csc_array(codes), y, [0, 1, 2, 3]) == [1, 3]
    assert split_latents(sparse.csc_array(codes), y, [0, 1, 2, 3], most=1) == [1]
    codes[y, 1] = 2.0
    assert split_latents(sparse.csc_array(codes), y, [0, 1, 2, 3]) == [1]
    assert split_latents(sparse.csc_array((1009, 5)), y, [0, 1]) == []


def test_intervals_hold_the_truth_and_repeat():
    generator = np.random.default_rng(5)
    owners = np.repeat(np.arange(60), 20)
    y = generator.random(1200) < 0.3
    detected = y ^ (generator.random(1200) < 0.1)
    counts = group_counts(detected, y, owners, 60)[:, None]
    resampled = bootstrap_f1(counts, seed=0)
    assert resampled.mean() == pytest.approx(f1_of(detected, y), abs=0.01)
    assert np.array_equal(resampled, bootstrap_f1(counts, seed=0))
    assert bootstrap_f1(np.repeat(counts[:1], 60, 0), 1).std() < 1e-12
    values = generator.normal(3, 1, 500)
    mean = bootstrap_mean(values, 0)
    assert mean.low < values.mean() == mean.mean < mean.high
    assert mean.high - mean.low == pytest.approx(2 * 1.96 / 500**0.5, rel=0.2)


def test_absorption_of_cases_by_hand():
    # Latent 0 is the label's own, 1 and 2 are aligned with it, 3 is orthogonal. The probe looks along the first axis.
    writes = np.array([[1.0, 0], [0.6, 0.8], [0.8, 0.6], [0, 1]])
    direction, main = np.array([2.0, 0]), np.array([0])
    codes = np.array([[1.0, 0, 0, 5], [0, 1, 0, 0], [0.5, 0, 0.625, 0], [0, 0, 0, 2], [2, 0, 1, 0]])
    x = codes @ writes
    x[3] = [1, 2]
    found = absorbed(x, sparse.csr_array(codes), writes, direction, main)
    # All its own; all absorbed; half of it; nothing aligned fires; the main latent's 2 of 2.8, the rest too small a share.
    assert found.fraction.tolist() == pytest.approx([0, 1, 0.5, 0, 0])
    assert found.full.tolist() == [False, True, False, False, False]
    # Rows that point away from the probe absorb nothing.
    assert absorbed(-x, sparse.csr_array(codes), writes, direction, main).fraction.tolist() == [0] * 5
