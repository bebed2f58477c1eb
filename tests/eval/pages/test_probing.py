"""The page of probing results: what it shows of the file, and that nothing in it becomes HTML."""

import re

from sparsary.eval.pages.probing import render_probing
from sparsary.eval.pages.probing_glossary import definition

EVIL = "</script><img src=x onerror=alert(1)>"
FOUND = {
    "probing_version": 1,
    "checkpoint": "runs/topk",
    "encoder": '{"name": "topk", "k": 16}',
    "n_latents": 1024,
    "hook": "transformer.h.2:out",
    "model": "embedded",
    "labels": None,
    "seed": 0,
    "factors_count": 94,
    "factors_chance_f1": 0.05,
    "factors_done": True,
    "factors_role_count": 4,
    "supervised_end_latents_sufficiency": 0.74,
    "supervised_end_latents_sufficiency_low": 0.71,
    "supervised_end_latents_sufficiency_high": 0.77,
    "supervised_end_latents_necessity": 0.7,
    "supervised_end_mean_features_sufficiency": 1.2,
    "supervised_end_mean_features_necessity": 0.9,
    "supervised_edit_io_end_no_edit": 0.0,
    "supervised_edit_io_end_latents_2": 0.25,
    "supervised_edit_io_s2_why": "nothing to edit",
    "supervised_done": True,
    "tpp_done": False,
    "tpp_why": f"no labels {EVIL}",
    "scr_warning": "unreliable",
}
for detector, value in (("latent", 0.5), ("probe", 0.8), ("neuron", 0.4), ("dimension", 0.3)):
    FOUND |= {f"factors_{detector}_f1": value, f"factors_{detector}_f1_low": value - 1e-5, f"factors_role_{detector}_f1": value}
    FOUND |= {f"factors_{detector}_f1_high": value + 1e-5}
for place in ("s2", "names"):
    for kind in ("latents", "mean_features"):
        FOUND |= {f"supervised_{place}_{kind}_{key}": None for key in ("sufficiency", "necessity")}
        FOUND |= {f"supervised_{place}_{kind}_why": "too little to explain"}
for k in (1, 5, 20):
    FOUND |= {f"sparse_probing_{kind}_top_{k}_test_accuracy": 0.7 + k / 100 for kind in ("sae", "llm")}
    FOUND |= {f"scr_metric_threshold_{k}": k / 50, f"scr_dir1_metric_threshold_{k}": k / 60}
FACTOR = {
    "factor": f"role={EVIL}",
    "positives": 9,
    "latent": 17,
    "latent_f1": 0.9,
    "probe_f1": 1.0,
    "absorption_fraction": None,
}


def test_the_page_shows_tiles_tables_and_plots():
    html = render_probing(FOUND, [FACTOR], "../features/features.html")
    tiles = dict(re.findall(r'data-key="(\w+)">.*?<div class="value">(.*?)</div>', html))
    assert tiles["factors_latent_f1"] == "0.5"
    assert "0.49999\u20130.50001" in html
    assert html.count("<figure>") == 3
    assert "best latent 0.5, linear probe 0.8" in html
    assert '<a href="../features/features.html#17">17</a>' in html
    assert "tpp did not run: no labels" in html
    assert "unreliable" in html
    # Positions where nothing can be measured take one row.
    assert html.count("too little to explain") == 2
    assert "0.71 to 0.77" in html
    assert "nothing to edit" in html


def test_text_is_escaped_and_equal_input_gives_equal_bytes():
    html = render_probing(FOUND, [FACTOR])
    assert "<img" not in html
    assert html == render_probing(FOUND, [FACTOR])
    assert "default-src 'none'" in html


def test_a_file_of_one_task_is_enough():
    html = render_probing({"probing_version": 1, "seed": 0}, [])
    assert "no task could run" in html
    assert "<figure>" not in html


def test_figures_have_definitions():
    for key in FOUND:
        if key.startswith(("factors_", "supervised_", "sparse_", "scr_", "tpp_")):
            assert definition(re.sub("_(low|high)$", "", key)).endswith("."), key
