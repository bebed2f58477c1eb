"""Areas under curves equal their definitions, also where scores tie."""

import pytest
import torch
from scipy.stats import mannwhitneyu

from sparsary.eval.circuits.scoring.roc import at_true_size, average_precision, roc_auc


@pytest.fixture(params=["apart", "tied"])
def scored(request):
    draw = torch.Generator().manual_seed(3)
    scores, truth = torch.randn(61, generator=draw), torch.rand(61, generator=draw) < 0.3
    return (scores if request.param == "apart" else scores.round()), truth


def test_the_area_is_the_share_of_pairs_in_order(scored):
    scores, truth = scored
    inside, outside = scores[truth][:, None], scores[~truth][None]
    wins = (inside > outside).double() + 0.5 * (inside == outside).double()
    assert roc_auc(scores, truth) == pytest.approx(float(wins.mean()), abs=1e-12)
    peer = mannwhitneyu(scores[truth].double().numpy(), scores[~truth].double().numpy()).statistic / wins.numel()
    assert roc_auc(scores, truth) == pytest.approx(float(peer), abs=1e-12)


def test_average_precision_is_the_mean_over_thresholds(scored):
    scores, truth = scored
    expected, recall = 0.0, 0.0
    for threshold in scores.unique().flip(0):
        chosen = scores >= threshold
        gained = float(truth[chosen].sum() / truth.sum()) - recall
        recall += gained
        expected += gained * float(truth[chosen].double().mean())
    assert average_precision(scores, truth) == pytest.approx(expected, abs=1e-6)


def test_at_the_true_size_ties_count_by_chance():
    truth = torch.tensor([True, True, False, False, False])
    assert at_true_size(torch.tensor([3.0, 2.0, 1.0, 0.0, -9.0]), truth).precision == 1.0
    # One place is left and three units tie for it, one of them right.
    assert at_true_size(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), truth).precision == pytest.approx((1 + 1 / 3) / 2)
    nothing = at_true_size(torch.zeros(5), truth)
    assert nothing.precision == pytest.approx(nothing.floor)
    assert nothing.floor == 0.4


def test_extremes():
    truth = torch.tensor([True, False, True, False])
    assert roc_auc(truth.float(), truth) == 1.0
    assert roc_auc(-truth.float(), truth) == 0.0
    assert roc_auc(torch.zeros(4), truth) == 0.5
    assert average_precision(truth.float(), truth) == 1.0
    assert average_precision(torch.zeros(4), truth) == 0.5
    assert roc_auc(torch.tensor([float("inf"), 1.0, 2.0, 0.0]), truth) == 1.0
    assert roc_auc(torch.tensor([0.0, float("-inf"), float("inf"), float("-inf")]), truth) == 1.0


def test_what_has_no_area_is_refused():
    with pytest.raises(ValueError, match="truth: expected units in the circuit and others, got 0 in it of 3"):
        roc_auc(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN in 1 of 3"):
        average_precision(torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([True, False, True]))
