"""The known answer of a diff, whole: the embedded model against a copy in which one rule differs, from the seed."""

import runpy
from pathlib import Path

import sparsary
from sparsary.training.embedded.tune import tune_embedded

ROOT = Path(__file__).parents[3]


def test_the_exclusive_latents_are_the_rule(tmp_path):
    """Takes minutes: it tunes the model, trains the recipe's crosscoder, and compares its exclusive latents with the rule."""
    tuned = tmp_path / "tuned"
    tune_embedded().save_pretrained(tuned)
    sparsary.LanguageModel.from_pretrained("embedded", device="cpu").tokenizer.save_pretrained(tuned)
    run = sparsary.train(
        ROOT / "recipes" / "model_diffing" / "embedded.yaml",
        models=["embedded", str(tuned)],
        harvest__store=str(tmp_path / "store"),
        out_dir=str(tmp_path / "run"),
    )
    found = sparsary.diff(run, tokens=40_000)
    latents = [row["latent"] for row in found["latents"]]
    assert len(latents) <= 8
    scores = runpy.run_path(str(ROOT / "docs" / "studies" / "model_diff.py"))["rule_f1"](run, latents)
    assert max(scores.values()) > 0.85
    closed = found["patching"]["closed"]
    assert closed["changed"]["share"] > 0.7
    assert closed["random"]["share"] < 0.1
