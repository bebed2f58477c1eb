"""Reconstruction, sparsity and redundancy against NumPy in float64, and the same however the tokens are cut."""

import math

import numpy as np
import pytest
import torch

from sparsary.eval.metrics import redundancy
from sparsary.eval.metrics.base import DictionaryOutputs, Setting
from sparsary.eval.metrics.glossary import INTRODUCTION
from sparsary.eval.metrics.histograms import Counts, Quantiles
from sparsary.eval.metrics.reconstruction import Errors, Reconstructed, Reconstruction, effective_latents
from sparsary.eval.metrics.redundancy import Redundancy, max_cosines
from sparsary.eval.undefined import Undefined, settled
from sparsary.sae import ENCODERS, SAE, SparseCode
from sparsary.transcoders.transcoder import Transcoder

CPU = torch.device("cpu")


def code_of(dense):
    return SparseCode.from_rows(torch.arange(dense.shape[1]).expand(dense.shape), dense)


def biased_and_scaled():
    """Targets whose dimensions vary by very different amounts about a mean, and a reconstruction 20 % too small and off."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=(1013, 7)) * np.array([5, 3, 2, 1, 0.5, 0.1, 0.02]) + np.array([3.0, 1, 0, 2, 0, 1, 0])
    y_hat = 0.8 * y + 0.3 + 0.1 * rng.normal(size=y.shape)
    return y.astype(np.float32), y_hat.astype(np.float32)


def in_numpy(y, y_hat):
    y, y_hat = y.astype(np.float64), y_hat.astype(np.float64)
    error = y - y_hat
    total = ((y - y.mean(0)) ** 2).sum()
    return {
        "fvu": (error**2).sum() / total,
        "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(y, y_hat, strict=True)]),
        "l2_ratio": np.mean(np.linalg.norm(y_hat, axis=1) / np.linalg.norm(y, axis=1)),
        "relative_reconstruction_bias": (y_hat**2).sum() / (y * y_hat).sum(),
        "mse": (error**2).sum(1).mean(),
        "mse_per_dimension": (error**2).mean(),
        "ev_global": 1 - (error**2).sum() / total,
        "ev_mean_dim": np.mean([1 - (error[:, d] ** 2).mean() / y[:, d].var() for d in range(y.shape[1])]),
        "ev_residual_variance": 1 - error.var(0).sum() / y.var(0).sum(),
        "ev_scalar_mean": 1 - (error**2).sum() / ((y - y.mean()) ** 2).sum(),
        "ev_uncentred": 1 - (error**2).sum() / (y**2).sum(),
        "ev_mean_token": 1 - np.mean((error**2).sum(1) / (y**2).sum(1)),
    }


def test_every_definition_equals_numpy_and_no_two_are_equal():
    y, y_hat = biased_and_scaled()
    errors = Errors(7)
    errors.update(torch.tensor(y), torch.tensor(y_hat))
    found = errors.means() | {"relative_reconstruction_bias": errors.bias()} | errors.explained_variance()
    expected = in_numpy(y, y_hat)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-10), key
    named = [value for key, value in found.items() if key.startswith("ev_")]
    assert len({round(value, 3) for value in named}) == 6
    # The documentation quotes them.
    assert "| " + " | ".join(f"{value:.3f}" for value in named) + " |" in INTRODUCTION
    # Dimensions that hardly vary ruin the one; to the other the offset is invisible.
    assert found["ev_mean_dim"] < -5
    assert found["ev_residual_variance"] > found["ev_global"]


def rows_of(report):
    return {key: value for key, value in report.items() if not isinstance(value, Undefined)}


@pytest.mark.parametrize("size", [5, 97, 500])
def test_reports_do_not_depend_on_how_tokens_are_cut(size):
    y, y_hat = map(torch.tensor, biased_and_scaled())
    dense = (torch.randn(1013, 41) - 1).relu()
    setting = Setting(SAE(7, 41, ENCODERS["topk"](k=3)), CPU)

    def judged(cut):
        group = Reconstructed(setting)
        for rows in torch.arange(1013).split(cut):
            piece = DictionaryOutputs(setting, None, (y[rows], y[rows]))
            # An encoder's own product would round differently for other shapes.
            vars(piece).update(y_hat=y_hat[rows], code=code_of(dense[rows]))
            group.fit(piece)
        for rows in torch.arange(1013).split(cut):
            piece = DictionaryOutputs(setting, None, (y[rows], y[rows]))
            vars(piece).update(y_hat=y_hat[rows], code=code_of(dense[rows]))
            group.score(piece)
        return rows_of(group.report())

    whole, parts = judged(1013), judged(size)
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert parts[key] == pytest.approx(value, rel=1e-12), key


def test_l0_and_densities_equal_numpy():
    rng = np.random.default_rng(5)
    dense = np.maximum(rng.normal(size=(509, 23)) - np.linspace(-1, 2.5, 23), 0)
    dense[:, 4] = 0
    found = Reconstruction(3, 23)
    for part in np.array_split(dense, 4):
        y = torch.randn(len(part), 3)
        found.update(y, y + 1, code_of(torch.tensor(part, dtype=torch.float32)))
    report = found.report()
    l0, rho = (dense > 0).sum(1), (dense > 0).mean(0)
    assert report["l0_mean"] == l0.mean()
    assert [report[f"l0_{name}"] for name in ("p10", "median", "p90")] == np.quantile(l0, [0.1, 0.5, 0.9]).tolist()
    assert report["l0_histogram_counts"] == np.bincount(l0).tolist()
    assert report["dead_fraction"] == (rho == 0).mean()
    assert report["dense_fraction"] == (rho > 0.1).mean()
    assert report["frequent_fraction"] == (rho > 0.01).mean()
    shares = rho[rho > 0] / rho.sum()
    assert report["effective_latents"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-12)


def test_as_many_latents_are_effective_as_fire_equally_often():
    assert effective_latents(torch.tensor([0.2, 0.0, 0.2, 0.2]).double()) == pytest.approx(3)
    assert isinstance(effective_latents(torch.zeros(4)), Undefined)


def test_counts_have_the_quantiles_of_all_numbers_and_stay_small():
    numbers = torch.randint(0, 37, (10_007,))
    counts = Counts()
    for part in numbers.split(701):
        counts.update(part)
    shares = [0.0, 0.1, 0.2513, 0.5, 0.9, 1.0]
    assert counts.quantiles(shares) == torch.quantile(numbers.double(), torch.tensor(shares, dtype=torch.float64)).tolist()
    assert counts.mean() == float(numbers.double().mean())
    assert len(counts.counts) == 37
    between = Counts()
    between.update(torch.tensor([0, 10, 30]))
    assert between.quantiles([0.25, 0.8]) == [5.0, 22.0]


def test_quantiles_of_reals_are_within_a_hundredth():
    numbers = torch.randn(20_001).double() ** 3
    quantiles = Quantiles(floor=1e-3)
    for part in numbers.split(999):
        quantiles.update(part)
    shares = [0.01, 0.05, 0.5, 0.95, 0.99]
    exact = torch.quantile(numbers, torch.tensor(shares, dtype=torch.float64)).tolist()
    for found, expected in zip(quantiles.quantiles(shares), exact, strict=True):
        assert found == pytest.approx(expected, rel=0.01, abs=1e-5)


def test_quantiles_without_a_number_are_none_and_infinity_is_far_out():
    quantiles = Quantiles(floor=1e-3)
    quantiles.update(torch.tensor([math.nan, math.nan]))
    assert all(map(math.isnan, quantiles.quantiles([0.5])))
    quantiles.update(torch.tensor([1.0, math.inf, -math.inf, math.nan]))
    low, middle, high = quantiles.quantiles([0.0, 0.5, 1.0])
    assert middle == pytest.approx(1, rel=0.01)
    assert -low == high >= 1e6


def test_tokens_of_high_norm_are_told_apart():
    torch.manual_seed(1)
    y = torch.randn(1000, 11)
    y[[600, 700, 999]] *= 1000
    sae = SAE(11, 29, ENCODERS["topk"](k=3))
    setting = Setting(sae, CPU)
    group = Reconstructed(setting)
    with torch.no_grad():
        group.fit(DictionaryOutputs(setting, None, (y[:500], y[:500])))
        group.score(DictionaryOutputs(setting, None, (y[500:], y[500:])))
        usual = torch.cat([y[500:600], y[601:700], y[701:999]])
        alone = in_numpy(usual.numpy(), sae(usual).numpy())
        l0 = sae.encode(usual).l0().double().mean()
    report = group.report()
    assert report["high_norm_tokens"] == 3
    assert report["high_norm_threshold"] == pytest.approx(10 * float(y[:500].norm(dim=-1).median()), rel=0.01)
    assert report["high_norm_energy_share"] > 0.99
    for key in ("fvu", "cosine", "l2_ratio"):
        assert report[f"{key}_without_high_norm"] == pytest.approx(alone[key], rel=1e-6)
    assert report["l0_mean_without_high_norm"] == float(l0)
    assert report["fvu"] != pytest.approx(report["fvu_without_high_norm"], rel=0.01)


def test_what_the_data_do_not_define_is_null_with_a_reason():
    found = Reconstruction(3, 5)
    silent = code_of(torch.zeros(4, 5))
    found.update(torch.ones(4, 3), torch.zeros(4, 3), silent)
    values, reasons = settled(found.report())
    for key in ("fvu", "ev_global", "ev_mean_dim", "effective_latents", "relative_reconstruction_bias"):
        assert values[key] is None
        assert len(reasons[key]) > 10
    assert values["dead_fraction"] == 1
    assert values["l0_histogram_counts"] == [4]
    for value in values.values():
        assert not isinstance(value, float) or math.isfinite(value)
    assert settled({"a": math.nan, "b": [1.0, math.inf], "c": None})[0] == {"a": None, "b": [1.0, None], "c": None}


def test_redundancy_equals_numpy(monkeypatch):
    sae = SAE(7, 53, ENCODERS["topk"](k=3))
    with torch.no_grad():
        sae.W_dec[9] = -3 * sae.W_dec[4] + 0.001
        sae.W_dec[13] = 0
    W = sae.W_dec.detach().double().numpy()
    unit = W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-12)
    cosines = np.abs(unit @ unit.T)
    np.fill_diagonal(cosines, 0)
    monkeypatch.setattr(redundancy, "BLOCK", 10)
    assert max_cosines(sae.W_dec.detach()).numpy() == pytest.approx(cosines.max(1), abs=1e-6)
    report = Redundancy(Setting(sae, CPU)).report()
    assert report["decoder_near_copies_fraction"] >= 2 / 53
    assert report["decoder_max_cosine_mean"] == pytest.approx(cosines.max(1).mean(), abs=1e-6)
    assert sae.W_enc is not None
    E = sae.W_enc.detach().double().numpy()
    E /= np.linalg.norm(E, axis=1, keepdims=True)
    assert report["encoder_decoder_cosine_mean"] == pytest.approx((E * unit).sum(1).mean(), abs=1e-6)
    # Very wide: every so-manieth latent, still against all.
    monkeypatch.setattr(redundancy, "LATENTS_COMPARED", 20)
    assert max_cosines(sae.W_dec.detach()).numpy() == pytest.approx(cosines.max(1)[::3], abs=1e-6)


def test_cosines_between_two_spaces_or_with_itself_are_null():
    for dictionary in (Transcoder(5, 5, 13, ENCODERS["topk"](k=2)), SAE(5, 13, ENCODERS["matching_pursuit"](k=2))):
        report = Redundancy(Setting(dictionary, CPU)).report()
        assert isinstance(report["encoder_decoder_cosine_mean"], Undefined)
    report = Redundancy(Setting(SAE(5, 1, ENCODERS["topk"](k=1)), CPU)).report()
    assert isinstance(report["decoder_max_cosine_mean"], Undefined)
