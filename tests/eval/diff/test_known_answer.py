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
    assert found["counts"]["base_only"] == 0
    latents = [row["latent"] for row in found["latents"] if row["kind"] == "tuned_only"]
    scores = runpy.run_path(str(ROOT / "docs" / "studies" / "model_diff.py"))["rule_f1"](run, latents)
    assert max(scores.values()) >= 0.9
    assert found["patching"]["closed"]["exclusive"]["share"] > 0.8
