import numpy as np
import pytest
import torch

from sparsary.sae.metrics import Moments, RunningFvu, dead_fraction, density, fvu


def test_fvu_is_0_for_perfect_and_1_for_the_mean():
    y = torch.randn(31, 5) + 100
    assert fvu(y, y) == 0
    torch.testing.assert_close(fvu(y, y.mean(0).expand_as(y)), torch.tensor(1.0, dtype=torch.float64), atol=1e-6, rtol=0)


def test_fvu_sums_before_it_divides():
    y = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    y_hat = torch.tensor([[1.0, 0.0], [10.0, 0.0]])
    assert float(fvu(y, y_hat)) == pytest.approx(1 / 50)


def test_running_equals_whole_also_far_from_the_origin():
    y = torch.randn(1000, 3) + 1e4
    y_hat = y + 0.1 * torch.randn(1000, 3)
    running = RunningFvu(3)
    for part, part_hat in zip(y.split(37), y_hat.split(37), strict=True):
        running.update(part, part_hat)
    a, b = y.double().numpy(), y_hat.double().numpy()
    assert float(running.value()) == pytest.approx(((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(), rel=1e-9)


def test_no_variance_is_an_error():
    with pytest.raises(ValueError, match="zero variance"):
        fvu(torch.ones(4, 2), torch.zeros(4, 2))


def test_moments_merge_as_if_seen_at_once():
    rows = torch.randn(101, 4, dtype=torch.float64) * 3 + 7
    moments = Moments(4)
    for part in rows.split(10):
        moments.update(part)
    moments.update(rows[:0])
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean, rows.mean(0))
    np.testing.assert_allclose(moments.deviation, (rows - rows.mean(0)).pow(2).sum(0))
    assert moments.variance() == pytest.approx(float((rows - rows.mean(0)).pow(2).sum(-1).mean()))


def test_density_and_dead():
    firings = torch.tensor([0, 5, 10, 0])
    assert density(firings, 10).tolist() == [0, 0.5, 1, 0]
    assert dead_fraction(firings) == 0.5
