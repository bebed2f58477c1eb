"""Reconstruction, downstream and dark matter against cases whose answer is known."""

import pytest
import torch

from sparsary.eval.metrics.dark_matter.decomposition import AffineFloor, DarkMatter, LinearFit
from sparsary.eval.metrics.downstream import Downstream, _replaced, ablations
from sparsary.eval.metrics.reconstruction import Reconstruction, density_histogram
from sparsary.sae import ENCODERS, SAE


def dark_matter(x, x_hat, fit_share=0.5):
    cut = int(len(x) * fit_share)
    fit = LinearFit(x.shape[1], x.shape[1])
    for part in (slice(0, cut // 3), slice(cut // 3, cut)):
        fit.update(x[part], x[part] - x_hat[part])
    score = DarkMatter(fit)
    for part in (slice(cut, cut + 100), slice(cut + 100, None)):
        score.update(x[part], x[part], x_hat[part])
    return score.report()


@pytest.fixture
def x():
    return torch.randn(4000, 9) @ torch.randn(9, 9) + torch.randn(9)


def test_shrinkage_is_all_linear_error(x):
    report = dark_matter(x, 0.8 * x)
    assert report["fvu_total"] > 0.03
    assert report["fvu_nonlinear"] == pytest.approx(0, abs=1e-9)
    assert report["linear_error_share"] == pytest.approx(1)
    assert report["fvu_rescaled"] == pytest.approx(0, abs=1e-9)
    assert report["err_vec_r2_mean_dim"] == pytest.approx(1)


def test_independent_noise_is_all_nonlinear_error(x):
    report = dark_matter(x, x + torch.randn_like(x))
    assert report["linear_error_share"] == pytest.approx(0, abs=0.03)
    assert report["fvu_nonlinear"] == pytest.approx(report["fvu_total"], rel=0.03)
    assert abs(report["err_norm_r2"]) < 0.03
    assert report["dark_matter_noise_floor"] == -10 / 2000


def test_a_missing_feature_is_linear_error(x):
    """Leave out one sparse feature of a planted dictionary: its part of the error is readable from x."""
    features = torch.nn.functional.normalize(torch.randn(20, 30), dim=-1)
    codes = torch.rand(6000, 20) * (torch.rand(6000, 20) < 0.2)
    truth = codes @ features
    codes[:, :6] = 0
    assert dark_matter(truth, codes @ features)["linear_error_share"] > 0.9


def test_a_constant_offset_is_linear_error_because_the_fit_has_a_bias(x):
    assert dark_matter(x, x + 5.0)["linear_error_share"] == pytest.approx(1)


def test_the_regression_equals_least_squares(x):
    error = torch.tanh(x)
    fit = LinearFit(9, 9)
    fit.update(x, error)
    ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    targets = torch.cat([error.double(), error.double().pow(2).sum(-1, keepdim=True)], 1)
    # Predictions, not coefficients: the ridge moves those in directions that hardly vary.
    torch.testing.assert_close(ones @ fit.solve(), ones @ torch.linalg.lstsq(ones, targets).solution, rtol=1e-3, atol=1e-3)


def test_a_perfect_dictionary_has_no_share_to_speak_of(x):
    report = dark_matter(x, x.clone())
    assert report["fvu_total"] == 0
    assert report["linear_error_share"] is None
    assert report["err_vec_r2_mean_dim"] is None
    assert report["err_norm_r2"] is None


def affine(x, y):
    fit = LinearFit(x.shape[1], y.shape[1])
    fit.update(x[:2000], y[:2000])
    floor = AffineFloor(fit)
    for part in (slice(2000, 2100), slice(2100, None)):
        floor.update(x[part], y[part])
    return floor.report()["fvu_affine"]


def test_the_affine_floor_is_what_no_affine_map_explains(x):
    linear = x @ torch.randn(9, 5) + torch.randn(5)
    assert affine(x, linear) == pytest.approx(0, abs=1e-6)
    noise = torch.randn_like(linear) * linear.std()
    assert affine(x, linear + noise) == pytest.approx(float(noise.var(0).sum() / (linear + noise).var(0).sum()), rel=0.05)
    assert affine(x, noise) == pytest.approx(1, abs=0.03)


def test_too_few_tokens_are_flagged(x):
    assert dark_matter(x, 0.5 * x)["dark_matter_enough_tokens"] is True
    assert dark_matter(x[:150], 0.5 * x[:150])["dark_matter_enough_tokens"] is False


def test_reconstruction_equals_the_formulas():
    sae = SAE(7, 41, ENCODERS["topk"](k=4))
    x = torch.randn(997, 7)
    found = Reconstruction(7, 41)
    codes = []
    with torch.no_grad():
        for part in x.split(100):
            code = sae.encode(part)
            codes.append(code.to_dense(41))
            found.update(part, sae.decode(code), code)
        x_hat = sae(x)
    z = torch.cat(codes)
    report = found.report()
    assert report["fvu"] == pytest.approx(float((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-5)
    assert report["cosine"] == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-5)
    assert report["l2_ratio"] == pytest.approx(float((x_hat.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-5)
    l0 = (z > 0).sum(-1).double()
    assert report["l0_mean"] == pytest.approx(float(l0.mean()))
    assert report["l0_median"] == float(l0.median())
    assert sum(report["l0_histogram_counts"]) == 997
    rho = (z > 0).double().mean(0)
    assert report["dead_fraction"] == float((rho == 0).double().mean())
    assert report["dense_fraction"] == float((rho > 0.1).double().mean())
    assert sum(report["density_histogram_counts"]) == int((rho > 0).sum())


def test_the_density_histogram_puts_values_into_their_quarter_decade():
    counts, edges = density_histogram(torch.tensor([0.0, 1.0, 0.5, 1e-3 * 1.01, 1e-9]))
    assert sum(counts) == 4
    assert counts[-1] == 1 + 0
    assert counts[-2] == 1
    assert counts[edges.index(-3.0)] == 1
    assert counts[0] == 1


@pytest.fixture
def spliced(embedded_model):
    """Downstream sums with a reconstruction of one's choice, at all positions but the first two."""

    def splice(reconstruct, hook="transformer.h.2:out"):
        ids = embedded_model.tokenizer(
            ["<bos> Then, Mary and Kevin went to the store. Kevin gave a ring to Mary. Mary went home because she"] * 2,
            return_tensors="pt",
        )["input_ids"]
        x = embedded_model.activations(ids, (hook,))[hook]
        kept = torch.ones(ids.shape, dtype=torch.bool)
        kept[:, :2] = False
        found = Downstream(embedded_model)
        variants = ablations(embedded_model, kept, {hook: x[kept].mean(0)})
        variants["spliced"] = _replaced(embedded_model, kept, {hook: reconstruct})
        found.update(ids, kept[:, :-1], embedded_model.logits(ids), variants)
        return found.report()

    return splice


def test_ablations_put_zeros_or_means_in_place_of_all_hooks_at_once(embedded_model):
    ids = torch.randint(3, 900, (2, 9))
    kept = torch.rand(ids.shape) < 0.6
    means = {"transformer.h.1.mlp:out": torch.randn(128), "transformer.h.2.mlp:out": torch.randn(128)}
    found = ablations(embedded_model, kept, means)
    for name, factor in (("zero", 0.0), ("mean", 1.0)):
        with found[name]:
            logits = embedded_model.logits(ids)
        first, second = (
            embedded_model.replacing(hook, lambda x, mean=mean, f=factor: torch.where(kept.unsqueeze(-1), f * mean, x))
            for hook, mean in means.items()
        )
        with first, second:
            assert torch.equal(embedded_model.logits(ids), logits)


def test_a_perfect_reconstruction_recovers_everything(spliced):
    report = spliced(lambda x: x)
    assert report["ce_spliced"] == pytest.approx(report["ce_clean"])
    assert report["kl_spliced"] == pytest.approx(0, abs=1e-6)
    assert report["ce_recovered_zero"] == pytest.approx(1)
    assert report["ce_recovered_mean"] == pytest.approx(1)
    assert report["kl_recovered_zero"] == pytest.approx(1)
    assert report["top1_agreement"] == 1


def test_reconstructing_with_the_ablation_recovers_nothing(spliced):
    assert spliced(torch.zeros_like)["ce_recovered_zero"] == pytest.approx(0, abs=1e-6)
    mean = spliced(lambda x: x[:, 2:].reshape(-1, 128).mean(0).expand_as(x))
    assert mean["ce_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert mean["ce_zero"] > mean["ce_clean"]
    assert mean["kl_mean"] == pytest.approx(mean["kl_spliced"], rel=1e-4)


def test_positions_outside_the_mask_are_left_alone(spliced):
    def garbage_outside(x):
        x = x.clone()
        x[:, :2] = 1e3
        return x

    report = spliced(garbage_outside)
    assert report["ce_spliced"] == pytest.approx(report["ce_clean"])
