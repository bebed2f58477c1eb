"""Judging with other codes than the encoder's: by the loss's gradient, and by pursuit of the atoms."""

import json

import pytest
import torch

from sparsary.eval.report.evaluate import InferenceMode, evaluate
from sparsary.eval.report.summary import report_summary
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.pursuit import PURSUITS
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe


@pytest.fixture(scope="module")
def gradient_run(tmp_path_factory):
    """A small gradient SAE of the embedded model, from a store with gradients."""
    folder = tmp_path_factory.mktemp("selection")
    hook = "transformer.h.2:out"
    values = {
        "text": {"context_length": 32},
        "harvest": {"hooks": [hook], "tokens": 3000, "gradients": True, "store": str(folder / "store")},
        "dictionary": {"hook": hook, "n_latents": 131, "encoder": {"name": "gradient_topk", "k": 8, "beta": 30.0}},
        "tokens": 12_000,
        "batch_tokens": 400,
        "lr": 3e-3,
        "out_dir": str(folder / "run"),
        "eval_tokens": 600,
    }
    return train_recipe(resolve_recipe(check_recipe(values, "recipe")))


def test_a_report_says_how_latents_were_chosen(gradient_run, tmp_path):
    # One page is looked at.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsary.eval.report.candidate.render_file", lambda path: path.with_suffix(".html"))
        usual = evaluate(str(gradient_run))
    oracle = evaluate(str(gradient_run), str(tmp_path / "oracle"), selection=InferenceMode(oracle=True))
    assert usual["selection"] == "per token"
    assert oracle["selection"].startswith("oracle")
    assert usual["fvu"] != oracle["fvu"]
    assert usual["tokens"] == oracle["tokens"]
    assert dict(report_summary(oracle))["selection"].startswith("oracle")
    assert "oracle: latents chosen" in (tmp_path / "oracle" / "report.html").read_text()
    assert json.loads((gradient_run / "report.json").read_text())["selection"] == "per token"


def test_pursuit_takes_the_place_of_the_encoder(gradient_run, tmp_path, no_page):
    usual = evaluate(str(gradient_run), str(tmp_path / "usual"), tokens=300)
    for name in PURSUITS:
        found = evaluate(str(gradient_run), str(tmp_path / name), tokens=300, selection=InferenceMode(pursuit=name, k=8))
        assert name in found["selection"]
        assert found["l0_mean"] <= 8
        assert found["fvu"] < usual["fvu"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (InferenceMode(pursuit="greedy", k=3), "--pursuit: expected one of matching_pursuit"),
        (InferenceMode(pursuit="gradient_pursuit"), "--k: expected a number"),
        (InferenceMode(k=3), "--k: expected a number"),
        (InferenceMode(pursuit="gradient_pursuit", k=0), "--k: expected a number"),
        (InferenceMode(oracle=True, pursuit="gradient_pursuit", k=3), "expected --oracle or --pursuit"),
    ],
)
def test_selections_that_make_no_sense_are_refused(gradient_run, tmp_path, selection, message):
    with pytest.raises(ValueError, match=message):
        evaluate(str(gradient_run), str(tmp_path), selection=selection)


def test_an_unusual_report_does_not_replace_the_usual_one(gradient_run):
    with pytest.raises(ValueError, match="--out: required with --oracle or --pursuit"):
        evaluate(str(gradient_run), selection=InferenceMode(oracle=True))


def test_an_oracle_needs_an_encoder_that_reads_gradients(tmp_path):
    SAE(5, 13, ENCODERS["topk"](k=2)).save(tmp_path)
    with pytest.raises(ValueError, match="--oracle: expected a gradient_topk dictionary"):
        evaluate(str(tmp_path), str(tmp_path / "o"), torch.randn(9, 5), selection=InferenceMode(oracle=True))


def test_a_dictionary_pursues_raw_targets_whatever_its_atoms_norms():
    sae = SAE(7, 23, ENCODERS["topk"](k=3))
    with torch.no_grad():
        sae.out_scale.fill_(3.0)
        sae.b_dec.copy_(torch.randn(7))
        sae.W_dec.mul_(torch.rand(23, 1) + 0.5)
    y = 3 * torch.randn(11, 7) + 5
    errors = []
    for k in (1, 3, 7):
        code = sae.pursue(y, k, "orthogonal_matching_pursuit")
        assert code.l0().max() <= k
        errors.append(float((sae.decode(code) - y).pow(2).sum().detach()))
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match="method: expected one of"):
        sae.pursue(y, 3, "omp")
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        sae.pursue(y, 0, "gradient_pursuit")
