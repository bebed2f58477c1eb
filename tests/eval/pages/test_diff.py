"""The page of a diff: what it shows, what is missing and why, and that tokens cannot become markup."""

import copy
import json
import shutil
import subprocess

import pytest
from markupsafe import escape

from sparsary.eval.pages.diff import CHANGES, render_diff
from sparsary.eval.pages.render import render_file

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOGITS = {
    "promoted": [{"token": token, "effect": 2.5} for token in ("coin", "<b>ring")],
    "suppressed": [{"token": "map", "effect": -1.5}],
}
LATENT = {
    "latent": 17,
    "density": 0.0011,
    "max_activation": 9.5,
    "mean_activation": 7.25,
    "top": [{"tokens": ["gave", "<i>a", "coin"], "activations": [0.0, 9.5, 0.0], "peak": 1, "document": 3}],
    "top_tokens": [{"token": "<i>a", "share": 0.75}],
    "scores": {"predicate_f1": 0.5},
    "details": {},
    "kind": "tuned_only",
    "relative_norm": 0.9832,
    "cosine": 0.25,
    "logits": LOGITS,
    "nu_error": 0.0123,
    "nu_reconstruction": 0.0456,
    "true": True,
}
CLOSED = {
    name: {"share": share, "kl": 0.01 * (1 - share), "low": share - 0.05, "high": share + 0.05}
    for name, share in zip(CHANGES, (0.99, 0.9, 0.89, 0.5, 0.84321, 0.05, -0.2, 0.86, 0.01, 0.97, 0.61), strict=True)
}
FOUND = {
    "diff_version": 1,
    "checkpoint": "runs/diff",
    "encoder": '{"name": "batch_topk", "k": 16}',
    "n_latents": 512,
    "widths": [128, 128],
    "models": {"base": "embedded", "tuned": "runs/tuned"},
    "hooks": {"base": "transformer.h.2:out", "tuned": "transformer.h.2:out"},
    "text": "embedded",
    "tokens": 30_011,
    "tokens_asked": 60_000,
    "documents": 321,
    "seed": 0,
    "git_commit": None,
    "fvu": {"base": 0.0312, "tuned": 0.0345},
    "l0": 16.04,
    "counts": {"base_only": 0, "shared": 480, "rotated": 3, "tuned_only": 1, "uneven": 6, "dead": 22},
    "true_exclusive": {"base_only": 0, "tuned_only": 1},
    "relative_norms": [0] * 18 + [3, 240, 240, 4] + [0] * 17 + [1],
    "cosines": [0] * 38 + [20, 460],
    "cosine_median": 0.9991,
    "mean_difference": {"norm": 0.021, "logits": LOGITS},
    "principal": [{"share": 0.62, "logits": LOGITS}],
    "latents": [LATENT],
    "patching": {
        "changed_latents": 4,
        "drawn_latents": 1,
        "tokens": 30_100,
        "documents": 322,
        "kl_base": 0.0042,
        "closed": CLOSED,
    },
    "reasons": {},
}


@pytest.fixture
def values():
    return copy.deepcopy(FOUND)


def test_the_page_names_models_figures_and_contexts(values):
    html = render_diff(values)
    for words in (
        "runs/tuned",
        "30,011 tokens of 321 documents",
        "0.843",
        "relative norm 0.983",
        "nu error 0.012",
        "exclusive latents",
    ):
        assert words in html
    assert "&lt;i&gt;a" in html
    assert "<i>a" not in html
    assert "&lt;b&gt;ring" in html
    assert html.count("<svg") == html.count("</svg>") == 3
    assert render_diff(values) == html


def test_every_change_has_a_row_and_an_interval(values):
    html = render_diff(values)
    for name, meaning in CHANGES.values():
        assert name in html
        assert escape(meaning) in html
    assert html.count('<div class="note">0.') >= 5


def test_models_of_two_widths_have_a_page_that_says_what_is_missing(values):
    values |= dict.fromkeys(("cosines", "cosine_median", "mean_difference", "principal", "patching"))
    values["latents"][0] |= {"nu_error": None, "nu_reconstruction": None, "true": None}
    del values["true_exclusive"]
    values["reasons"] = {"patching": "the two models differ in width at their hooks"}
    html = render_diff(values)
    assert "<code>patching</code>: not measured, because the two models differ in width at their hooks." in html
    assert "nu error 0" not in html
    assert html.count("<svg") == 1


def test_equal_models_have_nothing_to_close(values):
    values["patching"] |= {"kl_base": 0.0, "closed": dict.fromkeys(CHANGES)}
    values["latents"] = []
    html = render_diff(values)
    assert "predict the same" in html
    assert "every latent that fires writes the same to both models" in html


def test_the_page_s_command_and_place(values, tmp_path):
    path = tmp_path / "diff.json"
    path.write_text(json.dumps(values | {"seed": 3, "difference_sae_asked": True}))
    html = render_file(path).read_text()
    assert "sparsary diff runs/diff --tokens 60000 --difference-sae --seed 3" in html
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "latents"}))
    with pytest.raises(ValueError, match="expected what sparsary diff writes, got a file without some of it"):
        render_file(path)


def test_an_sae_on_the_difference_has_a_section_of_its_own(values):
    plain = render_diff(values)
    assert "Trained on the difference" not in plain
    entry = {key: LATENT[key] for key in LATENT if key not in ("kind", "relative_norm", "cosine", "nu_error")}
    sae = {"folder": "difference_sae", "encoder": values["encoder"], "n_latents": 512, "fvu": 0.25, "l0": 15.5, "dead": 7}
    values |= {
        "difference_sae_asked": True,
        "difference_sae": sae | {"latents": [entry | {"contribution": 0.625, "latent": 93}]},
    }
    html = render_diff(values)
    assert "fvu 0.25 of the difference" in html
    assert "0.625 of the summed squared contributions" in html
    assert "latent 93" in html


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_draws_the_page_without_complaint(values, tmp_path):
    file = tmp_path / "diff.html"
    file.write_text(render_diff(values), encoding="utf-8")
    assert CHROMIUM is not None
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --enable-logging=stderr"
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.stdout.count("<svg") == 3
