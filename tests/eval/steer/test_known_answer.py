"""Known answer of `sparsary steer`: the language of the bilingual embedded model, made and trained here."""

from pathlib import Path

import pytest

import sparsary
from sparsary.training.embedded.bilingual import make_bilingual

RECIPE = Path(__file__).parents[3] / "recipes/steering/embedded.yaml"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("bilingual")
    texts = make_bilingual(root / "model")
    places = {"model__id": str(texts), "text__files": [str(texts / "corpus.jsonl")], "model__device": "cpu"}
    run = sparsary.train(RECIPE, **places, harvest__store=str(root / "store"), out_dir=str(root / "run"))
    return sparsary.steer(run, texts / "second.jsonl", texts / "first.jsonl", neutral=texts / "numbers.jsonl")


def test_latents_steer_the_language_at_a_small_cost_and_random_ones_do_not(found):
    edits = {row["name"]: row["chosen"] for row in found["edits"]}
    assert found["most_selective"][0]["auroc"] > 0.99
    assert found["clean"]["share"] < 0.05
    assert found["clean"]["towards_share"] > 0.95
    assert edits["latents"]["choosing_kl"] <= found["most_kl"]
    assert edits["latents"]["share"] > 0.5
    shares = [(point or found["clean"])["share"] for name, point in edits.items() if name.startswith("random")]
    assert max(shares) <= 0.05
    assert edits["latents"]["share"] > (edits["mean"] or found["clean"])["share"]
