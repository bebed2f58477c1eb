"""The split of the error, its options and its confounds, against NumPy and errors whose split is known."""

import numpy as np
import pytest
import torch

from sparsary.eval.metrics.dark_matter.decomposition import AuthorsSplit, DarkMatter, FitOptions, LinearFit
from sparsary.eval.metrics.dark_matter.regression import FoldedRegression, Regression
from sparsary.sae import ENCODERS, SAE

DOCUMENT = 50


def judged(x, y, y_hat, options=None, on_target=False, sizes=(700, 1300), regressor=None):
    """The report of documents of 50 tokens, the first half of which fit; batches are of these sizes."""
    regressor = x if regressor is None else regressor
    fit = LinearFit(regressor.shape[1], y.shape[1], options=options or FitOptions())
    cut = len(x) // 2
    documents = torch.arange(len(x)) // DOCUMENT
    for rows in batches(0, cut, sizes):
        fit.update(regressor[rows], (y - y_hat)[rows], documents[rows])
    found = DarkMatter(fit, on_target)
    for rows in batches(cut, len(x), sizes):
        found.update(regressor[rows], y[rows], y_hat[rows])
    return found.report()


def batches(start, stop, sizes):
    while start < stop:
        for size in sizes:
            yield slice(start, min(start + size, stop))
            start = min(start + size, stop)


@pytest.fixture
def data():
    """A nonlinear function of correlated activations with a mean, and a reconstruction of it."""
    x = torch.randn(4000, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 2
    y = torch.cat([x[:, :5].tanh() + 0.3 * x[:, 1:6], x[:, :1] * x[:, 1:2]], 1)
    return x, y, 0.7 * y + 0.1 * y.pow(2)


def by_numpy(x, y, y_hat, bias=True, ridge=0.0):
    """The figures of the report from whole matrices."""
    x, y, y_hat = (part.numpy() for part in (x, y, y_hat))
    cut = len(x) // 2
    n_inputs = x.shape[1]
    z = np.hstack([x, np.ones((len(x), 1))]) if bias else x
    e = y - y_hat
    t = np.hstack([e, (e**2).sum(1, keepdims=True)])
    penalty = np.zeros(z.shape[1])
    penalty[:n_inputs] = ridge * (x[:cut] ** 2).mean() * cut
    root = np.diag(np.sqrt(penalty))
    # Least squares of stacked rows, not normal equations.
    coefficients = np.linalg.lstsq(
        np.vstack([z[:cut], root]), np.vstack([t[:cut], np.zeros((len(root), t.shape[1]))]), rcond=None
    )[0]
    t, y, y_hat, z, e = t[cut:], y[cut:], y_hat[cut:], z[cut:], e[cut:]
    left = t - z @ coefficients
    spread = ((y - y.mean(0)) ** 2).sum()
    factor = (y * y_hat).sum() / (y_hat**2).sum()
    per_dimension = 1 - (left**2).sum(0) / ((t - t.mean(0)) ** 2).sum(0)
    return {
        "fvu_total": (e**2).sum() / spread,
        "fvu_nonlinear": (left[:, :-1] ** 2).sum() / spread,
        "linear_error_share": 1 - (left[:, :-1] ** 2).sum() / (e**2).sum(),
        "fvu_rescaled": ((y - factor * y_hat) ** 2).sum() / spread,
        "best_factor": factor,
        "reconstruction_variance": ((y_hat - y_hat.mean(0)) ** 2).sum() / spread,
        "err_vec_r2": 1 - (left[:, :-1] ** 2).sum() / ((e - e.mean(0)) ** 2).sum(),
        "err_vec_r2_mean_dim": per_dimension[:-1].mean(),
        "err_norm_r2": per_dimension[-1],
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
def test_every_figure_equals_numpy_on_whole_matrices(data, bias, ridge):
    found = judged(*data, FitOptions(bias, ridge))
    expected = by_numpy(*data, bias, ridge)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-8)
    assert found["dark_matter_notes"] == []


def test_any_split_into_batches_gives_the_same(data):
    usual = judged(*data)
    for sizes in ((1,) * 3 + (1000,), (4000,), (37, 0, 211)):
        other = judged(*data, sizes=sizes)
        assert {k: v for k, v in other.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in usual.items() if isinstance(v, float)}, rel=1e-9
        )


def test_both_questions_of_a_transcoder_differ(data):
    x, y, _ = data
    e = torch.randn(4000, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    y = y + e
    on_x, on_y = judged(x, y, y - e), judged(x, y, y - e, regressor=y, on_target=True)
    # The error was put into the target and is unrelated to what is read.
    assert on_x["linear_error_share"] < 0.02
    assert on_y["linear_error_share"] > 0.2
    assert on_y["fvu_nonlinear"] == pytest.approx(by_numpy(y, y, y - e)["fvu_nonlinear"], rel=1e-4)


def test_a_known_split_is_recovered():
    """A linear part and an independent part, whose energies are known."""
    x = torch.randn(60_000, 5, dtype=torch.float64)
    linear, noise = x @ (0.2 * torch.randn(5, 5, dtype=torch.float64)) + 0.3, 0.25 * torch.randn_like(x)
    found = judged(x, x, x - linear - noise, on_target=True)
    energy = linear[30_000:].pow(2).sum() + noise[30_000:].pow(2).sum()
    assert found["linear_error_share"] == pytest.approx(float(linear[30_000:].pow(2).sum() / energy), abs=0.005)
    spread = (x[30_000:] - x[30_000:].mean(0)).pow(2).sum()
    assert found["fvu_nonlinear"] == pytest.approx(float(noise[30_000:].pow(2).sum() / spread), rel=0.005)


def test_features_left_out_are_linear_error_and_noise_is_not():
    """The authors' synthetic check: what a dictionary writes is the truth; features are then ablated, or noise added."""
    truth = torch.nn.functional.normalize(torch.randn(30, 20, dtype=torch.float64), dim=-1)
    codes = torch.rand(20_000, 30, dtype=torch.float64) * (torch.rand(20_000, 30) < 0.15)
    x = codes @ truth
    ablated = codes.clone()
    ablated[:, ::3] = 0
    noise = x.std() * torch.randn_like(x)
    removed, noisy, both = (judged(x, x, found) for found in (ablated @ truth, x + noise, ablated @ truth + noise))
    assert removed["err_vec_r2"] > 0.7
    assert abs(noisy["err_vec_r2"]) < 0.01
    assert both["fvu_nonlinear"] == pytest.approx(removed["fvu_nonlinear"] + noisy["fvu_nonlinear"], rel=0.05)
    assert noisy["dark_matter_noise_floor"] == pytest.approx(-21 / 10_000)


def test_shrinkage_is_told_apart_from_the_rest_of_the_linear_error():
    x = torch.randn(8000, 6, dtype=torch.float64)
    shrunk = judged(x, x, 0.6 * x, on_target=True)
    assert shrunk["linear_error_share"] == pytest.approx(1)
    assert shrunk["best_factor"] == pytest.approx(1 / 0.6)
    assert shrunk["linear_error_share_rescaled"] is None or shrunk["fvu_rescaled"] < 1e-12
    noise = 0.3 * torch.randn_like(x)
    mixed = judged(x, x, 0.6 * (x + noise), on_target=True)
    again = judged(x, x, mixed["best_factor"] * 0.6 * (x + noise), on_target=True)
    assert mixed["linear_error_share_rescaled"] == pytest.approx(again["linear_error_share"], rel=1e-5)
    assert again["best_factor"] == pytest.approx(1)


def test_a_dead_dictionary_has_all_linear_error_and_says_so(data):
    x, *_ = data
    sae = SAE(7, 11, ENCODERS["relu"](sparsity=0.1))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        x_hat = sae(x.float()).double()
    found = judged(x, x, x_hat, on_target=True)
    assert found["fvu_nonlinear"] == pytest.approx(0, abs=1e-9)
    assert found["linear_error_share"] == pytest.approx(1)
    assert found["reconstruction_variance"] == pytest.approx(0, abs=1e-12)
    assert "dead dictionary" in " ".join(found["dark_matter_notes"])
    assert_no_nan(found)


def assert_no_nan(report):
    assert not [key for key, value in report.items() if isinstance(value, float) and not np.isfinite(value)]


def test_too_few_tokens_say_how_many_are_needed(data):
    x, y, y_hat = (part[:14] for part in data)
    found = judged(x, y, y_hat)
    assert found["fvu_total"] > 0
    assert [found[key] for key in ("fvu_nonlinear", "linear_error_share", "err_vec_r2_mean_dim", "err_norm_r2")] == [None] * 4
    assert "fitted on 7 tokens, so that nothing can be said of it. Give at least 80" in found["dark_matter_notes"][0]
    more = judged(*(part[:60] for part in data))
    assert more["fvu_nonlinear"] is not None
    assert more["dark_matter_enough_tokens"] is False
    assert "understated" in more["dark_matter_notes"][0]
    none = judged(*(part[:0] for part in data))
    assert none["fvu_total"] is None
    assert "No token was left to score" in none["dark_matter_notes"][1]
    for report in (found, more, none):
        assert_no_nan(report)


def test_targets_that_do_not_vary_are_undefined_not_nan(data):
    x = data[0]
    constant = judged(x, torch.ones(4000, 3), torch.zeros(4000, 3))
    assert constant["fvu_total"] is None
    assert "does not vary" in constant["dark_matter_notes"][0]
    silent = data[1].clone()
    silent[:, 2] = 0
    found = judged(x, silent, 0.5 * silent)
    assert found["err_vec_r2_mean_dim"] is None
    assert "some dimension" in found["dark_matter_notes"][0]
    for report in (constant, found):
        assert_no_nan(report)


def test_documents_choose_the_ridge_that_serves_new_documents_best():
    """Fewer tokens than ten per coefficient, and an error that depends on one of them: without a ridge the map fits noise."""
    x = torch.randn(400, 60, dtype=torch.float64)
    e = 0.3 * x[:, :1] + torch.randn(400, 4, dtype=torch.float64)
    y = torch.randn(400, 4, dtype=torch.float64)
    plain = judged(x, y, y - e, FitOptions(ridge=0.0))
    chosen = judged(x, y, y - e, FitOptions(ridge=(1e-6, 1e-2, 1.0, 10.0)))
    assert chosen["dark_matter_ridge"] > 0.1
    assert chosen["linear_error_share"] > plain["linear_error_share"] + 0.05


def test_the_chosen_ridge_is_the_one_of_an_explicit_search():
    x, t = torch.randn(90, 8, dtype=torch.float64), torch.randn(90, 3, dtype=torch.float64)
    t[:, :2] += 0.4 * x[:, :2]
    documents = torch.arange(90) // 6
    folds = FoldedRegression(8, 3, folds=5)
    folds.update(x, t, documents)
    left = {}
    for ridge in (1e-3, 0.1, 1.0, 30.0):
        left[ridge] = 0.0
        for fold in range(5):
            inside = documents % 5 == fold
            fit = Regression(8, 3)
            fit.update(x[~inside], t[~inside])
            guess = fit.rows(x[inside]) @ fit.solve(ridge)
            left[ridge] += float((t[inside] - guess)[:, :2].pow(2).sum())
    assert folds.best_ridge(list(left), slice(0, 2)) == min(left, key=lambda ridge: left[ridge])


def test_one_document_cannot_choose_among_ridges():
    fit = LinearFit(3, 2, options=FitOptions(ridge=(0.1, 1.0)))
    with pytest.raises(ValueError, match="expected documents for cross-validation among several ridges, got none"):
        fit.update(torch.randn(5, 3), torch.randn(5, 2))
    fit.update(torch.randn(5, 3), torch.randn(5, 2), torch.full((5,), 17))
    with pytest.raises(ValueError, match=r"several documents for cross-validation.*Give one ridge, or more documents"):
        fit.solve()
    for ridge in (-1.0, (), (0.1, float("nan"))):
        with pytest.raises(ValueError, match="ridge: expected a number of at least 0"):
            FitOptions(ridge=ridge)


def test_without_ridge_equal_columns_share_their_coefficient():
    x = torch.randn(200, 2, dtype=torch.float64)
    fit = Regression(3, 1, bias=False)
    fit.update(torch.cat([x, x[:, :1]], 1), 4 * x[:, :1])
    torch.testing.assert_close(fit.solve(0.0), torch.tensor([[2.0], [0.0], [2.0]], dtype=torch.float64))


def test_residuals_from_moments_are_those_of_the_rows(data):
    x, y, _ = data
    fit, other = Regression(7, 6), Regression(7, 6)
    fit.update(x[:100], y[:100])
    other.update(x[100:], y[100:])
    coefficients = fit.solve()
    expected = (y[100:] - other.rows(x[100:]) @ coefficients).pow(2).sum(0)
    torch.testing.assert_close(other.squared_residual(coefficients), expected)
    torch.testing.assert_close(other.deviation(), (y[100:] - y[100:].mean(0)).pow(2).sum(0))
    assert Regression(7, 6).noise_floor() is None


def test_the_authors_split_is_theirs(data):
    x, y, y_hat = data
    found = AuthorsSplit(7, 6, seed=3)
    for rows in batches(0, 4000, (1, 210, 33)):
        found.update(x[rows], y[rows], y_hat[rows])
    fits = np.random.default_rng(3).random(4000) < 150_000 / 246_900
    x, y, e = (part.numpy() for part in (x, y, y - y_hat))
    t = np.hstack([e, (e**2).sum(1, keepdims=True)])
    coefficients = np.linalg.lstsq(x[fits], t[fits], rcond=None)[0]
    left = t - x @ coefficients
    held = t[~fits]
    per_dimension = 1 - (left[~fits] ** 2).sum(0) / ((held - held.mean(0)) ** 2).sum(0)
    spread = ((y - y.mean(0)) ** 2).sum()
    assert found.report() == pytest.approx(
        {
            "authors_fvu_total": (e**2).sum() / spread,
            "authors_fvu_nonlinear": (left[:, :-1] ** 2).sum() / spread,
            "authors_err_vec_r2_mean_dim": per_dimension[:-1].mean(),
            "authors_err_norm_r2": per_dimension[-1],
        },
        rel=1e-8,
    )


def test_the_authors_split_of_nothing_is_undefined():
    found = AuthorsSplit(7, 6)
    found.update(torch.randn(5, 7), torch.randn(5, 6), torch.randn(5, 6))
    assert set(found.report().values()) == {None}
