"""The shipped language model really does its tasks; these are the bars of its model card."""

import json
import re

import pytest

from sparsary.training.embedded import MODEL_DIR
from sparsary.training.embedded.score import score_model

BARS = {
    "indirect_object_accuracy": 0.95,
    "greater_than_mass": 0.90,
    "pronoun_accuracy": 0.95,
    "induction_top1": 0.95,
    "argument_copying_top1": 0.95,
    "agreement_simple_accuracy": 0.95,
    "agreement_across_pp_accuracy": 0.95,
    "agreement_across_rc_accuracy": 0.95,
    "agreement_attractor_accuracy": 0.95,
}


@pytest.fixture(scope="module")
def scores(embedded_model):
    return score_model(embedded_model.module, embedded_model.tokenizer, n=300)


@pytest.mark.parametrize("name", BARS)
def test_heldout_score(scores, name):
    assert scores[name] >= BARS[name]


def test_the_model_card_states_what_is_measured(scores):
    card = (MODEL_DIR / "README.md").read_text()
    stated = {name: float(value) for name, value in re.findall(r"\| `(\w+)` \| [^|]* \| ([\d.]+) \|", card)}
    assert stated.keys() == scores.keys()
    for name, value in stated.items():
        assert scores[name] == pytest.approx(value, abs=0.04), name


def test_the_weights_are_small_safetensors():
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert files["model.safetensors"] <= 8_000_000
    assert set(files) == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert (config["model_type"], config["n_layer"], config["n_embd"]) == ("gpt2", 4, 128)
