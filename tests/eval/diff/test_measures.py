"""Measures of a diff on planted answers: kinds of latents, latent scaling, KL closed by patching."""

import copy

import numpy as np
import pytest
import torch

from sparsary import ENCODERS, Crosscoder
from sparsary.eval.diff.differences import Differences, promoted_tokens
from sparsary.eval.diff.kinds import decoder_cosines, histogram, kinds_of, of_kinds
from sparsary.eval.diff.patching import (
    activation_change,
    constant_change,
    kl_closed,
    latent_change,
    projected_change,
)
from sparsary.eval.diff.scaling import LatentScaling
from sparsary.eval.heldout import TextBatch
from sparsary.training.activations.model import LanguageModel
from sparsary.training.text import Cursor

HOOK = "transformer.h.2:out"


def test_kinds_at_their_bounds():
    relative = torch.tensor([0.0, 0.1, 0.11, 0.4, 0.6, 0.61, 0.9, 1.0], dtype=torch.float64)
    kinds = kinds_of(relative, torch.ones(8, dtype=torch.long))
    assert kinds == ["base_only", "base_only", "uneven", "shared", "shared", "uneven", "tuned_only", "tuned_only"]
    cosines = torch.tensor([0.0, 0.5, 0.79, 0.81, -1.0, 0.9, 0.0, 0.0])
    turned = kinds_of(relative, torch.ones(8, dtype=torch.long), cosines)
    assert turned == ["base_only", "base_only", "rotated", "shared", "rotated", "uneven", "tuned_only", "tuned_only"]
    assert of_kinds(kinds, "shared").tolist() == [False, False, False, True, True, False, False, False]
    assert decoder_cosines(torch.eye(2), -torch.eye(2)).tolist() == [-1.0, -1.0]
    assert histogram(torch.tensor([0.0, 1.0]))[:: len(histogram(relative)) - 1] == [1, 1]


def planted_scaling(case):
    """Return the ratios of latent 0, which only the tuned model's decoder has, when the base holds its concept as ``case``."""
    torch.manual_seed(0)
    tokens, d = 4000, 7
    values = torch.rand(tokens, 2) * (torch.rand(tokens, 2) < 0.3)
    direction, other = torch.eye(d)[0] * 2, torch.eye(d)[1]
    base_d = torch.stack([torch.zeros(d), other])
    tuned_d = torch.stack([direction, other])
    if case == "decoupled":
        # A latent of the base alone that fires at the same tokens.
        values = torch.cat([values, values[:, :1]], dim=1)
        base_d, tuned_d = torch.cat([base_d, direction[None]]), torch.cat([tuned_d, torch.zeros(1, d)])
    noise = 0.1 * torch.randn(2, tokens, d)
    bias = torch.full((d,), 0.5)
    x_hat = values @ base_d + bias, values @ tuned_d - bias
    x = (x_hat[0] + noise[0] + (values[:, :1] * direction if case == "shrunk" else 0), x_hat[1] + noise[1])
    scaling = LatentScaling((base_d, tuned_d), (bias, -bias))
    for part in torch.arange(tokens).split(1000):
        scaling.update(values[part], (x[0][part], x[1][part]), (x_hat[0][part], x_hat[1][part]))
    return scaling.ratios()


def test_latent_scaling_confirms_a_latent_of_one_model():
    found = planted_scaling("true")
    assert abs(float(found.nu_error[0])) < 0.05
    assert abs(float(found.nu_reconstruction[0])) < 0.05
    assert found.true.tolist() == [True, False]
    # The shared latent is as much in one model as in the other.
    assert float(found.nu_error[1]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("case", "ratio"), [("shrunk", "nu_error"), ("decoupled", "nu_reconstruction")])
def test_latent_scaling_finds_false_exclusives(case, ratio):
    found = planted_scaling(case)
    assert float(getattr(found, ratio)[0]) == pytest.approx(1, abs=0.1)
    assert not found.true[0]


def test_latent_scaling_equals_least_squares():
    torch.manual_seed(1)
    values, decoder = torch.rand(300, 3), (torch.randn(3, 5), 2 * torch.randn(3, 5))
    x, x_hat, biases = torch.randn(2, 300, 5), torch.randn(2, 300, 5), torch.randn(2, 5)
    scaling = LatentScaling(decoder, (biases[0], biases[1]))
    scaling.update(values, (x[0], x[1]), (x_hat[0], x_hat[1]))
    found = scaling.ratios()
    norms = [each.norm(dim=-1) for each in decoder]
    for latent in range(3):
        own = int(norms[1][latent] > norms[0][latent])
        betas = []
        for site in (0, 1):
            written = values[:, latent, None] * decoder[own][latent]
            target = x[site] - x_hat[site] + values[:, latent, None] * decoder[site][latent]
            betas.append(float(torch.linalg.lstsq(written.reshape(-1, 1), target.reshape(-1, 1)).solution))
        assert float(found.nu_error[latent]) == pytest.approx(betas[1 - own] / betas[own], rel=1e-3)


def test_models_of_two_widths_have_no_latent_scaling():
    with pytest.raises(ValueError, match="expected models of one width at their hooks, got 5 and 6"):
        LatentScaling((torch.zeros(3, 5), torch.zeros(3, 6)), (torch.zeros(5), torch.zeros(6)))


def test_differences_have_the_moments_of_all_rows():
    torch.manual_seed(2)
    base, tuned = torch.randn(2, 500, 6)
    tuned = tuned * torch.tensor([9.0, 1, 1, 1, 1, 1]) + 2
    found = Differences(6)
    for part in torch.arange(500).split(120):
        found.update(base[part], tuned[part])
    torch.testing.assert_close(found.mean, (tuned - base).mean(0))
    variances, directions = found.principal()
    assert abs(float(directions[0, 0])) > 0.99
    torch.testing.assert_close(variances.sum(), (tuned - base).var(0, correction=0).sum())


@pytest.fixture(scope="module")
def shifted(embedded_model):
    """A tuned model that adds one vector to the residual stream behind block 2, and a crosscoder of one latent that says so."""
    torch.manual_seed(0)
    module = copy.deepcopy(embedded_model.module)
    vector = 6 * torch.nn.functional.normalize(torch.randn(128), dim=0)
    module.transformer.h[2].mlp.c_proj.bias.data += vector
    crosscoder = Crosscoder([128, 128], 3, ENCODERS["topk"](k=1), names=["base", "tuned"]).eval()
    with torch.no_grad():
        crosscoder.W_enc.zero_()
        crosscoder.b_enc.copy_(torch.tensor([6.0, 0.0, 0.0]))
        crosscoder.W_dec.zero_()
        crosscoder.W_dec[0, 128:] = vector / 6
        crosscoder.b_dec.zero_()
    return LanguageModel(module, embedded_model.tokenizer, "shifted", None), crosscoder, vector


@pytest.fixture(scope="module")
def text_batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 900, (3, 12))
    kept = torch.ones(3, 12, dtype=torch.bool)
    kept[:, :2] = False
    documents = np.repeat(np.arange(3), 12).reshape(3, 12)
    return TextBatch(ids, kept, kept, Cursor(3, 0), {0, 1, 2}, documents)


def closed_by(embedded_model, shifted, text_batch, **changes):
    tuned, crosscoder, _ = shifted
    return kl_closed(crosscoder, (embedded_model, tuned), (HOOK, HOOK), [text_batch], changes)


def test_the_latent_that_was_added_closes_the_divergence(embedded_model, shifted, text_batch):
    _, crosscoder, vector = shifted
    found = closed_by(
        embedded_model,
        shifted,
        text_batch,
        activation=activation_change,
        exclusive=latent_change(crosscoder, torch.tensor([True, False, False])),
        shared=latent_change(crosscoder, torch.tensor([False, True, True])),
        mean=constant_change(vector),
        away=constant_change(-vector),
        pca=projected_change(torch.eye(128)[:1], vector),
    )
    closed = {name: each["share"] for name, each in found["closed"].items()}
    assert found["kl_base"] > 0.1
    # Leading tokens are not changed, and later ones attend to them.
    assert closed["activation"] > 0.9
    for name in ("exclusive", "mean", "pca"):
        assert closed[name] == pytest.approx(closed["activation"], abs=1e-3)
    assert closed["shared"] == pytest.approx(0, abs=1e-6)
    assert closed["away"] < 0
    assert found["closed"]["exclusive"]["low"] <= closed["exclusive"] <= found["closed"]["exclusive"]["high"]
    assert found["closed"]["exclusive"]["kl"] == pytest.approx(found["kl_base"] * (1 - closed["exclusive"]), rel=1e-3)


def test_equal_models_leave_nothing_to_close(embedded_model, shifted, text_batch):
    _, crosscoder, _ = shifted
    found = kl_closed(crosscoder, (embedded_model, embedded_model), (HOOK, HOOK), [text_batch], {"all": activation_change})
    assert found["kl_base"] == 0
    assert found["closed"] == {"all": None}


def test_the_logit_lens_of_a_token_s_own_row_names_the_token(embedded_model):
    words = [embedded_model.tokenizer.decode([token]) for token in range(len(embedded_model.tokenizer))]
    rows = embedded_model.module.transformer.wte.weight[[words.index("coin"), words.index("ring")]]
    found = promoted_tokens(embedded_model, rows / embedded_model.module.transformer.ln_f.weight, words)
    assert [each["promoted"][0]["token"] for each in found] == ["coin", "ring"]
    assert "wide" in promoted_tokens(embedded_model, torch.zeros(1, 5), words)
