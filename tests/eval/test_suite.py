"""From a checkpoint to its report."""

import json
import math

import pytest
import torch

from eval.suite import evaluate, summary
from sae import ENCODERS, SAE
from training.recipe import check_recipe
from training.run import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    values = {
        "text": {"context_length": 32},
        "harvest": {"hooks": ["transformer.h.2:out"], "tokens": 8000, "store": str(folder / "store")},
        "dictionary": {"hook": "transformer.h.2:out", "n_latents": 131, "encoder": {"name": "topk", "k": 8}},
        "tokens": 16_000,
        "batch_tokens": 400,
        "lr": 3e-3,
        "lr_warmup_steps": 5,
        "out_dir": str(folder / "run"),
        "eval_tokens": 4000,
    }
    return train(check_recipe(values, "recipe"))


@pytest.fixture(scope="module")
def report(checkpoint):
    return evaluate(str(checkpoint))


def test_the_report_is_flat_finite_json(checkpoint, report):
    saved = json.loads((checkpoint / "report.json").read_text())
    assert saved == {key: value for key, value in report.items() if key != "report_path"}
    for key, value in saved.items():
        assert key == "reasons" or isinstance(value, str | int | float | bool | None | list), key
        if isinstance(value, float):
            assert math.isfinite(value), key
    assert (checkpoint / "report.html").read_text().lower().startswith("<!doctype html>")


def test_the_figures_hang_together(report):
    assert report["fvu"] == pytest.approx(report["fvu_total"], rel=1e-9)
    assert 0 < report["fvu_nonlinear"] <= report["fvu_total"] < 0.6
    assert report["l0_mean"] <= 8
    assert report["ce_clean"] < report["ce_spliced"] < report["ce_zero"]
    assert 0.5 < report["ce_recovered_zero"] < 1
    assert report["tokens"] >= 2000
    assert report["dark_matter_fit_tokens"] >= 2000
    assert report["documents"] > 20
    assert report["text"] == "embedded"
    assert "fvu" in dict(summary(report))


@pytest.mark.slow
def test_evaluating_twice_gives_the_same(checkpoint, report, tmp_path):
    again = evaluate(str(checkpoint), str(tmp_path / "elsewhere"))
    assert {k: v for k, v in again.items() if k != "report_path"} == {k: v for k, v in report.items() if k != "report_path"}
    assert (tmp_path / "elsewhere" / "report.json").exists()


def test_the_mean_ablation_and_the_regression_use_other_documents_than_the_score(checkpoint, monkeypatch):
    import eval.heldout as heldout

    seen = []
    pieces = heldout.pieces

    def spy(*arguments):
        owners = set()
        seen.append(owners)
        for piece in pieces(*arguments):
            owners |= piece.documents
            yield piece

    monkeypatch.setattr(heldout, "pieces", spy)
    evaluate(str(checkpoint), str(checkpoint / "x"), cache=False)
    fitted, scored = seen
    assert fitted
    assert scored
    assert not fitted & scored


def test_tensors_are_judged_without_a_model(tmp_path):
    torch.manual_seed(0)
    SAE(6, 23, ENCODERS["topk"](k=4)).save(tmp_path / "d")
    with pytest.raises(ValueError, match=r"activations=x"):
        evaluate(str(tmp_path / "d"))
    report = evaluate(str(tmp_path / "d"), activations=torch.randn(500, 6))
    assert report["tokens"] == 250
    assert "ce_clean" not in report
    assert summary(report)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evaluate(str(tmp_path / "d"), activations=torch.randn(1, 6))


def test_a_dictionary_of_another_width_is_refused(checkpoint, tmp_path):
    config = json.loads((checkpoint / "dictionary.json").read_text())
    SAE(6, 23, ENCODERS["topk"](k=4)).save(tmp_path / "d", config["provenance"])
    with pytest.raises(ValueError, match=r"transformer\.h\.2:out: expected width 6, the dictionary's d_in, got 128"):
        evaluate(str(tmp_path / "d"))


def test_without_heldout_documents_there_is_nothing_to_judge_on(checkpoint, tmp_path):
    config = json.loads((checkpoint / "dictionary.json").read_text())
    (tmp_path / "t.txt").write_text("The war lasted from the year 1732 to the year 1741.")
    config["provenance"]["text"] |= {"source": "files", "files": [str(tmp_path / "t.txt")]}
    from sae import load_dictionary

    load_dictionary(checkpoint).save(tmp_path / "d", config["provenance"])
    with pytest.raises(ValueError, match=r"no held-out document was found\. Raise harvest\.heldout"):
        evaluate(str(tmp_path / "d"))
