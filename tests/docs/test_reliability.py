"""The study of reliability finds the planted cause of a toy's errors, and its figures are what they are called."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture(scope="module")
def studies():
    """Return a function that imports a study by name, as scripts beside each other do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        yield importlib.import_module


def planted(known):
    """Return the toy's directions, both signs of each, as a dictionary of the stream after its first block."""
    directions = torch.stack(list(known.directions.values())).float()
    sae = SAE(directions.shape[1], 2 * len(directions), build_encoder({"name": "relu"}))
    with torch.no_grad():
        for matrix in (sae.W_enc, sae.W_dec):
            matrix.copy_(torch.cat([directions, -directions]))
    return {"h.0:out": sae.requires_grad_(False).eval()}


@pytest.fixture(scope="module")
def toy(studies):
    """The toy, and the figures of its planted directions."""
    known = studies("flag_toy").flag_toy(600, seed=3)
    return known, studies("reliability").study(known.model, known.pairs, planted(known), seed=0)


def test_the_flag_alone_causes_the_errors_of_the_toy(toy, studies):
    known, row = toy
    flag = known.pairs.clean[:, 1] != known.pairs.clean[:, 2]
    right = known.pairs.right(known.model.logits(known.pairs.clean)) > 0.5
    assert torch.equal(right, ~flag)
    assert row["accuracy"] == pytest.approx(float(right.double().mean()))


def test_probes_and_latents_find_the_flag_and_attention_does_not(toy):
    auroc = {predictor["predictor"]: predictor for predictor in toy[1]["predictors"]}
    for name in ("probe after block 1", "probe after block 2", "1 latent", "5 latents", "5 neurons"):
        assert auroc[name]["auroc"] >= 0.99, name
    assert auroc["1 latent"]["r_low"] > 0.95
    # Neither attention, confidence nor single tokens know of it: within four standard errors of 300 pairs.
    blind = [p for p in auroc.values() if p["kind"] in ("attention", "confidence", "text")]
    assert len(blind) == 10
    assert all(abs(p["auroc"] - 0.5) < 0.14 for p in blind), blind
    assert auroc["probe before the blocks"]["auroc"] == 0.5


def test_without_the_strongest_units_the_toy_makes_no_errors(toy):
    found = {(row["units"], row["which"]): row for row in toy[1]["ablations"]}
    for units in ("neurons", "latents"):
        assert found[units, "strongest"]["mended"] >= 0.99
        assert found[units, "strongest"]["broken"] <= 0.01
        assert found[units, "random"]["mended"] <= 0.2
        assert found[units, "random"]["probe_auroc"] >= 0.99


def test_resampled_figures_are_those_of_repeated_pairs(studies):
    predictors = studies("reliability_predictors")
    draw = np.random.default_rng(0)
    # Rounded, so that there are ties.
    scores, right = draw.normal(size=60).round(1), draw.random(60) < 0.4
    weights = draw.multinomial(60, np.full(60, 1 / 60), size=5).astype(float)
    for index, counts in enumerate(weights):
        rows = np.repeat(np.arange(60), counts.astype(int))
        expected = roc_auc_score(right[rows], scores[rows])
        assert predictors.resampled_auroc(scores, right, weights)[index] == pytest.approx(expected)
        expected = np.corrcoef(scores[rows], right[rows])[0, 1]
        assert predictors.resampled_correlation(scores, right, weights)[index] == pytest.approx(expected)


def test_a_task_without_errors_is_refused(studies):
    right = np.ones(100, dtype=bool)
    right[:30] = False
    with pytest.raises(ValueError, match=r"pronoun: expected at least 20 right and 20 wrong answers in each half"):
        studies("reliability_predictors").halves(right, 0, "pronoun")


def test_trained_latents_find_the_flag(studies):
    row = studies("reliability").toy_study(1, 1000)
    auroc = {predictor["predictor"]: predictor["auroc"] for predictor in row["predictors"]}
    # Ablating them is another matter: copies of the flag behind its effect correlate as well.
    assert auroc["1 latent"] >= 0.99
    assert auroc["5 latents"] >= 0.99
