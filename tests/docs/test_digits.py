"""The worked example of docs/how_to/vectors.md, from digits to the page."""

import json
import runpy
from pathlib import Path

import sparsary

ROOT = Path(__file__).parents[2]


def test_latents_of_the_digits_network_tell_digits_apart(tmp_path):
    example = runpy.run_path(str(ROOT / "docs" / "scripts" / "digits.py"))
    example["main"](tmp_path)
    directory = sparsary.train(tmp_path / "recipe.yaml", tokens=40_000)
    report = sparsary.evaluate(directory)
    assert report["tokens"] == 270
    assert report["fvu"] < 0.4
    about = sparsary.features(directory)
    records = [json.loads(line) for line in (directory / "features" / "features.jsonl").read_text().splitlines()]
    named = {record["label"]["label"] for record in records if record["label"] and record["label"]["f1"] > 0.5}
    # Chance is 0.18: the share of a digit is 0.1.
    assert len(named) >= 5
    assert about["n_labels"] == 10
    assert len(json.loads((directory / "features" / "features.json").read_text())["pictures"]) > 100
