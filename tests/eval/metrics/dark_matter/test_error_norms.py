"""What predicts norms, within a dictionary and across dictionaries, and what the error's parts cost, against NumPy."""

import numpy as np
import pytest
import torch

from sparsary.eval.metrics.dark_matter.downstream_cost import Shares
from sparsary.eval.metrics.dark_matter.error_norms import NormRegressions
from sparsary.eval.metrics.dark_matter.scaling import Scaling
from sparsary.eval.metrics.model_outputs import Predictions
from sparsary.eval.undefined import settled

CUT, TOKENS, VOCABULARY = 300, 700, 19


def least_squares(inputs, target):
    """Held-out R2 of a target, with a bias."""
    inputs = np.column_stack([*np.atleast_2d(inputs), np.ones(TOKENS)])
    guess = inputs @ np.linalg.lstsq(inputs[:CUT], target[:CUT], rcond=None)[0]
    left, held = (target - guess)[CUT:], target[CUT:]
    return 1 - (left**2).sum() / ((held - held.mean()) ** 2).sum()


@pytest.fixture
def facts():
    """Activations, tokens of which some are met in scoring only, two targets and two scalars."""
    x = torch.randn(TOKENS, 5, dtype=torch.float64) + 1
    tokens = torch.randint(0, VOCABULARY - 4, (TOKENS,))
    tokens[CUT + 100 :] += torch.randint(0, 5, (TOKENS - CUT - 100,))
    tokens[0] = VOCABULARY - 1
    targets = torch.stack([x.pow(2).sum(-1) + tokens, x[:, 0].abs() + 0.3 * tokens], 1)
    return x, tokens, targets, torch.stack([x.norm(dim=-1), torch.rand(TOKENS, dtype=torch.float64)], 1)


def regressed(facts, sizes=(100,)):
    found = NormRegressions(5, VOCABULARY, ("a", "b"), ("norm", "chance"), ridge=0.0)
    for take, start, stop in ((found.fit, 0, CUT), (found.score, CUT, TOKENS)):
        for rows in torch.arange(start, stop).split(sizes[0]):
            take(*(part[rows] for part in facts))
    return found.report()


def test_every_predictor_of_a_norm_equals_numpy(facts):
    x, tokens, targets, scalars = (part.numpy() for part in facts)
    expected = {}
    for name, target in zip("ab", targets.T, strict=True):
        expected[f"{name}_r2_from_activation"] = least_squares(x.T, target)
        expected[f"{name}_r2_from_norm"] = least_squares(scalars[:, 0], target)
        expected[f"{name}_r2_from_chance"] = least_squares(scalars[:, 1], target)
        held, ids = target[CUT:], tokens[CUT:]
        spread = ((held - held.mean()) ** 2).sum()
        seen = {t: target[:CUT][tokens[:CUT] == t].mean() for t in set(tokens[:CUT].tolist())}
        guess = np.array([seen.get(t, target[:CUT].mean()) for t in ids.tolist()])
        expected[f"{name}_r2_from_token_id"] = 1 - ((held - guess) ** 2).sum() / spread
        own = np.array([held[ids == t].mean() for t in ids])
        expected[f"{name}_r2_from_token_id_in_sample"] = 1 - ((held - own) ** 2).sum() / spread
    unseen = np.mean([t not in set(tokens[:CUT].tolist()) for t in tokens[CUT:].tolist()])
    assert unseen > 0
    expected |= {"norm_fit_tokens": CUT, "norm_score_tokens": TOKENS - CUT, "norm_unseen_token_share": unseen}
    assert regressed(facts) == pytest.approx(expected, rel=1e-8)
    assert regressed(facts, sizes=(7,)) == pytest.approx(expected, rel=1e-8)


def test_tokens_in_sample_explain_noise_and_held_out_do_not(facts):
    x, _, _, scalars = facts
    noise = torch.rand(TOKENS, 2, dtype=torch.float64)
    report = regressed((x, torch.arange(TOKENS) % VOCABULARY, noise, scalars))
    assert report["a_r2_from_token_id"] < 0 < report["a_r2_from_token_id_in_sample"]


def test_norms_of_too_few_tokens_or_that_do_not_vary_are_undefined(facts):
    x, tokens, targets, scalars = facts
    short = regressed(tuple(part[CUT - 4 :].repeat(3, *[1] * (part.ndim - 1))[:TOKENS] for part in facts))
    assert short["a_r2_from_activation"] is not None
    found = NormRegressions(5, VOCABULARY, ("a", "b"), ("norm", "chance"))
    found.fit(x[:6], tokens[:6], targets[:6], scalars[:6])
    found.score(x[6:], tokens[6:], torch.ones(TOKENS - 6, 2), scalars[6:])
    assert {v for k, v in found.report().items() if "_r2_" in k} == {None}
    assert found.report()["norm_fit_tokens"] == 6


@pytest.fixture
def norms():
    """Error norms of three dictionaries and of their nonlinear parts: the second follows the first, the third neither."""
    base, fresh = torch.rand(TOKENS, dtype=torch.float64) + 0.5, torch.rand(TOKENS, 3, dtype=torch.float64)
    errors = torch.stack([base + 0.2 * fresh[:, 0], 0.5 * base + 0.02 * fresh[:, 1], 1 + fresh[:, 2]], 1)
    return errors, torch.stack([0.4 * base, 0.3 * errors[:, 1], fresh[:, 0] + 1], 1)


def scaled(norms, size=100):
    found = Scaling(("small", "middle", "large"))
    for take, start, stop in ((found.fit, 0, CUT), (found.score, CUT, TOKENS)):
        for rows in torch.arange(start, stop).split(size):
            take(*(part[rows] for part in norms))
    return found.report()


def test_scaling_across_sizes_equals_numpy(norms):
    report, other = scaled(norms), scaled(norms, 13)
    assert report["scaling_tokens"] == TOKENS - CUT
    for name, power in (("norm", 1), ("squared_norm", 2)):
        errors, nonlinear = (part.numpy() ** power for part in norms)
        for i in range(3):
            for j in range(3):
                one = least_squares(errors[:, i], errors[:, j])
                both = least_squares(np.stack([errors[:, i], nonlinear[:, i]]), errors[:, j])
                assert report[f"scaling_{name}_r2"][i][j] == pytest.approx(one, abs=1e-8)
                assert report[f"scaling_{name}_r2_both"][i][j] == pytest.approx(both, abs=1e-8)
                assert other[f"scaling_{name}_r2_both"][i][j] == pytest.approx(both, abs=1e-8)
                gain = report[f"scaling_{name}_gain"][i][j]
                assert gain is None if i == j else gain == pytest.approx((both - one) / (1 - one), rel=1e-6)
    assert report["scaling_norm_r2"][0][1] > 0.8
    assert abs(report["scaling_norm_r2"][0][2]) < 0.05


def test_scaling_of_nothing_and_of_constants_is_undefined(norms):
    assert Scaling(("a",)).report()["scaling_norm_r2"] == [[None]]
    found = Scaling(("a", "b"))
    for take in (found.fit, found.score):
        take(torch.stack([norms[0][:, 0], torch.full((TOKENS,), 3.0)], 1), norms[1][:, :2])
    matrix = found.report()["scaling_norm_r2"]
    assert matrix[0][1] is None
    assert matrix[1][0] == pytest.approx(0, abs=1e-12)


def shares(linear, nonlinear, losses, documents):
    found = Shares()
    found.update_errors(linear, nonlinear, documents)
    tokens = len(losses["clean"])
    predictions = {
        name: Predictions(loss, (loss - losses["clean"]).abs(), torch.ones(tokens, dtype=torch.bool))
        for name, loss in losses.items()
        if name != "clean"
    }
    found.update_losses(losses["clean"], predictions, documents[:tokens])
    return settled(found.report())[0]


def test_shares_of_loss_variance_and_norm_are_their_formulas():
    linear, nonlinear = torch.randn(90, 4, dtype=torch.float64), 0.5 * torch.randn(90, 4, dtype=torch.float64)
    clean = torch.rand(80)
    losses = {"clean": clean, "spliced": clean + 0.4, "linear": clean + 0.1, "nonlinear": clean + 0.3}
    report = shares(linear, nonlinear, losses, np.arange(90) // 9)
    error = linear + nonlinear
    assert report["ce_recovered_by_linear_error"] == pytest.approx(0.75, rel=1e-5)
    assert report["ce_recovered_by_nonlinear_error"] == pytest.approx(0.25, rel=1e-5)
    assert report["kl_recovered_by_linear_error"] == pytest.approx(0.75, rel=1e-5)
    assert report["ce_spliced_with_linear_error"] == pytest.approx(float(clean.double().mean()) + 0.1, rel=1e-5)
    squares = [float(part.pow(2).sum()) for part in (error, linear, nonlinear)]
    assert report["variance_recovered_by_linear_error"] == pytest.approx(1 - squares[2] / squares[0])
    assert report["variance_recovered_by_nonlinear_error"] == pytest.approx(1 - squares[1] / squares[0])
    norms = [float(part.norm(dim=-1).sum()) for part in (error, linear, nonlinear)]
    assert report["error_norm_share_of_linear"] == pytest.approx(norms[1] / norms[0])
    assert report["error_norm_share_of_nonlinear"] == pytest.approx(norms[2] / norms[0])
    assert report["error_norm_share_of_linear_low"] < norms[1] / norms[0] < report["error_norm_share_of_linear_high"]


def test_one_document_has_no_interval_and_no_increase_no_share():
    clean = torch.rand(80)
    losses = dict.fromkeys(("clean", "spliced", "linear", "nonlinear"), clean)
    report = shares(torch.zeros(90, 4), torch.zeros(90, 4), losses, np.full(90, 3))
    assert report["ce_spliced_with_linear_error"] == pytest.approx(float(clean.double().mean()))
    assert report["ce_spliced_with_linear_error_low"] is None
    assert report["ce_recovered_by_linear_error"] is None
    assert report["error_norm_share_of_linear"] is None
    assert report["share_documents"] == 1
    assert {value for key, value in settled(Shares().report())[0].items() if key != "share_documents"} == {None}
