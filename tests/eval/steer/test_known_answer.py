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
    contrast = {"towards": texts / "second.jsonl", "away_from": texts / "first.jsonl"}
    return sparsary.steer(run, **contrast, neutral=texts / "numbers.jsonl", documents=1600)


def test_latents_steer_the_language_at_a_small_cost_and_random_ones_do_not(found):
    edits = {row["name"]: row["chosen"] for row in found["edits"]}
    selective = [row["auroc"] for row in found["most_selective"]]
    assert len(selective) == 10
    # Measured with three seeds: 0.997 and more.
    assert min(selective) >= 0.98
    assert sum(auroc >= 0.99 for auroc in selective) >= 8
    assert found["clean"]["share"] < 0.05
    assert found["clean"]["towards_share"] > 0.95
    assert edits["latents"]["choosing_kl"] <= found["most_kl"]
    assert edits["latents"]["kl"] <= 1.2 * found["most_kl"]
    assert edits["latents"]["share"] >= 0.8
    shares = [(point or found["clean"])["share"] for name, point in edits.items() if name.startswith("random")]
    assert max(shares) <= 0.05
    assert edits["latents"]["share"] > (edits["mean"] or found["clean"])["share"]
