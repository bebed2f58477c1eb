"""The page of a contrast steering: edits, controls and samples, with tokens that cannot become markup."""

import copy
import json

import pytest

from sparsary.eval.pages.render import render_file
from sparsary.eval.pages.steer import EDITS, edit_rows, render_steer


def point(strength, share, kl):
    figures = {"strength": strength, "share": share, "share_low": share - 0.04, "share_high": share + 0.03}
    figures |= {"kl": kl, "kl_low": kl * 0.9, "kl_high": kl * 1.1, "ce": 1.5, "ce_clean": 1.25, "towards_kl": 0.0123}
    return figures | {
        "towards_ce": 1.4,
        "target_mass": share * 0.7,
        "contrast_mass": 0.1,
        "choosing_kl": kl,
        "choosing_mass": share,
    }


def row(name, *points, chosen=0):
    return {"name": name, "points": list(points), "chosen": None if chosen is None else points[chosen]}


LATENT = {
    "latent": 17,
    "density": 0.25,
    "max_activation": 9.5,
    "top": [{"tokens": ["theu", "<i>a", "coinu"], "activations": [0.0, 9.5, 0.0], "peak": 1, "document": 3}],
    "top_tokens": [{"token": "<i>a", "share": 0.75}],
    "role": "raised",
    "auroc_choosing": 0.999,
    "auroc": 0.9876,
    "mean": 1.25,
    "difference": 1.2,
    "effect": 2.345,
    "effect_per_unit": 1.876,
    "label": "second language",
}
SET = {"count": 312, "share": 0.71, "most_frequent": ["theu", "tou"]}
FOUND = {
    "steer_version": 1,
    "checkpoint": "runs/steering/embedded",
    "encoder": '{"name": "batch_topk", "k": 16}',
    "n_latents": 1024,
    "hook": "transformer.h.2:out",
    "model": "bilingual",
    "towards": "second.jsonl",
    "from": "first.jsonl",
    "neutral": "numbers.jsonl",
    "tokens_given": None,
    "prompts_given": ["The war"],
    "strengths": [1.0, 2.0],
    "latents_asked": 10,
    "most_kl": 0.05,
    "documents_asked": 400,
    "pooling": "mean",
    "seed": 3,
    "documents": {"towards": 400, "from": 400},
    "target_tokens": SET,
    "contrast_tokens": SET,
    "classifier_accuracy": 0.9987,
    "lengths": {"prompt": 12, "new": 20, "prefix": 24, "piece": 128},
    "selectivity": [0] * 20 + [5] * 20,
    "most_selective": [{"latent": 17, "auroc_choosing": 0.999, "auroc": 0.9876}],
    "directions": {
        "positions": 60,
        "shares": [0.9, 0.1],
        "effective_rank": 1.384,
        "eigengap": 9.0,
        "directions": 1,
        "mean_difference_norm": 4.5,
        "raised_norm": 3.5,
        "cosines": {"raised_mean": 0.91, "first_mean": 0.99, "raised_first": 0.9},
    },
    "clean": {
        "share": 0.02,
        "share_low": 0.0,
        "share_high": 0.06,
        "target_mass": 0.011,
        "contrast_mass": 0.7,
        "towards_share": 1.0,
        "towards_target_mass": 0.72,
    },
    "edits": [
        row("latents", point(1.0, 0.94, 0.021), point(2.0, 0.99, 0.2)),
        row("raised", point(1.0, 0.91, 0.019)),
        row("random_0", point(1.0, 0.02, 0.04)),
        row("random_1", point(1.0, 0.08, 0.04)),
        row("mean", point(1.0, 0.97, 0.061), chosen=None),
        row("directions", point(1.0, 0.96, 0.049)),
        row("prefix", point(1.0, 0.88, 0.03)),
    ],
    "latents": [
        LATENT,
        LATENT | {"latent": 18, "role": "zeroed", "mean": 0.1, "difference": -0.5, "effect_per_unit": None, "label": ""},
    ],
    "samples": [{"prompt": "The <b>war", "texts": {"none": "lasted", "latents": "lastedu", "random_0": "from"}}],
}


@pytest.fixture
def values():
    return copy.deepcopy(FOUND)


def test_the_page_shows_edits_latents_and_samples(values):
    html = render_steer(values, "../features/features.html")
    for words in ("Towards second.jsonl", "0.94", "AUROC 0.988", "to 1.25 at strength 1", "second language", "lastedu", "1.38"):
        assert words in html
    for _, meaning in EDITS.values():
        assert meaning.replace("'", "&#39;") in html
    assert "The &lt;b&gt;war" in html
    assert "&lt;i&gt;a" in html
    assert "<i>a" not in html
    assert 'href="../features/features.html#17"' in html
    assert html.count("<svg") == html.count("</svg>") == 4
    assert "mathdefault" not in html
    assert render_steer(values, "../features/features.html") == html


def test_random_draws_are_one_row_and_an_edit_too_costly_leaves_the_model_as_it_is(values):
    rows = {each.name: each for each in edit_rows(values)}
    assert len(rows) == len(EDITS)
    assert (rows["random latents"].share, rows["random latents"].interval) == ("0.05", "draws 0.02 to 0.08")
    assert rows["random latents"].strength == "1"
    values["edits"].append(row("random_2", point(2.0, 0.1, 0.09), point(4.0, 0.2, 0.3), chosen=1))
    values["edits"].append(row("random_3", point(1.0, 0.1, 0.09), chosen=None))
    assert edit_rows(values)[2].strength == "1\u20134, 1 none"
    assert "no strength within the budget" in render_steer(values)
    assert (rows["difference in means"].strength, rows["difference in means"].share) == ("none", "0.02")
    assert rows["latents"].ce == "0.25"
    assert rows["prompt prefix"].strength == "-"


def test_the_page_s_command_and_place(values, tmp_path):
    path = tmp_path / "steer.json"
    path.write_text(json.dumps(values))
    html = render_file(path).read_text()
    assert "sparsary steer runs/steering/embedded --towards second.jsonl --from first.jsonl --neutral numbers.jsonl" in html
    assert "--strengths 1,2 --latents 10 --most-kl 0.05 --documents 400 --pooling mean --piece 128 --seed 3" in html
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "edits"}))
    with pytest.raises(ValueError, match="expected what sparsary steer writes, got a file without some of it"):
        render_file(path)


def test_without_a_neutral_text_the_page_says_what_the_cost_is_measured_on(values):
    assert "second.jsonl (no neutral text was given)" in render_steer(values | {"neutral": None})
