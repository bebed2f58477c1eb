"""Links between the pages of a run: found on disk, entered in pages made before, and the command that made a page."""

import json
import re

import pytest

from sparsary.eval.pages.links import command
from sparsary.eval.pages.probing import TASKS
from sparsary.eval.pages.render import render_file

LATENT = {
    "latent": 0,
    "firings": 5,
    "density": 0.1,
    "max_activation": 2.0,
    "mean_activation": 1.0,
    "histogram": None,
    "top": [{"tokens": ["the", "<b>cat", "sat"], "activations": [0.0, 2.0, 0.5], "peak": 1, "document": 3}],
    "quantiles": [],
    "top_tokens": [{"token": "<b>cat", "share": 0.9}],
    "logits": None,
    "co_firing": [],
    "lifted": [],
    "correlated": [],
    "nearest": [],
    "scores": dict.fromkeys(("predicate_f1", "example_embedding", "logit_lens")),
    "details": {},
    "explanation": None,
    "reasons": {},
}
ABOUT = {"schema_version": 1, "n_latents": 7, "hooks_in": ["h.0:out"], "hooks_out": ["h.0:out"], "sampled_tokens": 5}


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    for name in ("report", "runs", "recipes"):
        monkeypatch.setattr(f"sparsary.eval.pages.{name}.PLOTS", ())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a report, in the working directory."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "a b"
    (run / "features").mkdir(parents=True)
    (run / "recipe.yaml").write_text("tokens: 5\n")
    report = {"report_version": 1, "checkpoint": "runs/a b", "n_latents": 7, "tokens_asked": 50, "fvu": 0.25, "l0_mean": 5.0}
    (run / "report.json").write_text(json.dumps(report))
    render_file(run / "report.json")
    return run


def with_features(run):
    (run / "features" / "features.json").write_text(json.dumps(ABOUT | {"checkpoint": "runs/a b"}))
    lines = [LATENT | {"latent": latent, "density": latent / 20} for latent in range(7)]
    (run / "features" / "features.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return render_file(run / "features" / "features.json")


def navigation(path):
    (found,) = re.findall(r'<nav class="pages".*?</nav>', path.read_text(encoding="utf-8"), re.DOTALL)
    return dict(re.findall(r'<a href="(.*?)">(.*?)</a>', found)), re.findall(r"<kbd>(.*?)</kbd>", found)


def test_a_page_names_the_command_and_the_recipe(run):
    assert navigation(run / "report.html") == ({"recipe.yaml": "recipe"}, ["sparsary eval &#39;runs/a b&#39; --tokens 50"])


def test_a_new_page_is_entered_in_the_others(run):
    page = with_features(run)
    assert navigation(page)[0] == {"../report.html": "report", "../recipe.yaml": "recipe"}
    assert navigation(run / "report.html")[0] == {"features/features.html": "features", "recipe.yaml": "recipe"}
    (run / "probing").mkdir()
    (run / "probing" / "probing.json").write_text(json.dumps({"probing_version": 1, "checkpoint": "runs/a b"}))
    render_file(run / "probing" / "probing.json")
    assert navigation(page)[0]["../probing/probing.html"] == "probing"
    # What rendering again gives is what was entered.
    before = (run / "report.html").read_text(encoding="utf-8")
    render_file(run / "report.json")
    assert (run / "report.html").read_text(encoding="utf-8") == before


def test_a_report_shows_example_latents_once_there_are_features(run):
    assert "sparsary features &#39;runs/a b&#39;" in (run / "report.html").read_text(encoding="utf-8")
    with_features(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    # Of six live latents, those at five quantiles of density.
    assert re.findall(r'<a href="features/features.html#(\d)">latent \1</a>', html) == ["1", "2", "4", "5", "6"]
    assert "&lt;b&gt;cat" in html
    assert "<b>cat" not in html
    assert 'class="peak"' in html


def test_features_of_another_size_are_not_shown(run):
    with_features(run)
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"n_latents": 8}))
    render_file(run / "report.json")
    assert 'class="example"' not in (run / "report.html").read_text(encoding="utf-8")


def test_a_comparison_links_to_reports_and_they_to_it(run):
    out = run.parent / "compared"
    out.mkdir()
    entry = {"name": "a", "directory": "runs/a b", "report": {"fvu": 0.25, "l0_mean": 5.0}, "reasons": {}}
    gone = entry | {"name": "gone", "directory": "runs/gone"}
    comparison = {"runs_version": 1, "runs": [entry, gone], "different": {}, "pareto": {"fvu": ["a"], "ce_increase": []}}
    (out / "comparison.json").write_text(json.dumps(comparison))
    html = render_file(out / "comparison.json").read_text(encoding="utf-8")
    assert '<a href="../a%20b/report.html">a</a>' in html
    assert "<strong>gone</strong>" in html
    assert "sparsary compare &#39;runs/a b&#39; runs/gone" in html
    assert navigation(run / "report.html")[0]["../compared/comparison.html"] == "comparison"


def test_results_that_were_moved_together_still_link(run, tmp_path, monkeypatch):
    with_features(run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    render_file(run / "report.json")
    assert navigation(run / "report.html")[0]["features/features.html"] == "features"


def test_commands_are_made_of_the_settings():
    circuits = {"checkpoints": ["runs/a"], "tasks": ["ioi"], "methods": ["random"], "ablation": "mean", "corruption": None}
    circuits |= {"pairs": 20, "seed": 3, "edges": True}
    expected = "sparsary circuits runs/a --task ioi --method random --ablation mean --pairs 20 --edges --seed 3"
    assert command("circuits", circuits) == expected
    graph = {"transcoders": "runs/t", "prompt": "it's here"}
    assert command("graph", graph) == "sparsary circuits runs/t --prompt 'it'\"'\"'s here'"
    assert command("probing", {"checkpoint": "d", "labels": "x.jsonl", "seed": 0}) == "sparsary probe d --labels x.jsonl"
    some = {"checkpoint": "d", "factors_done": True, "bottleneck_done": True, "factor_file": "f.jsonl"}
    assert command("probing", some) == "sparsary probe d --task factors --task bottleneck --factors f.jsonl"
    every = {"checkpoint": "d"} | {f"{task}_done": task != "scr" for task in TASKS}
    assert command("probing", every) == "sparsary probe d"
    assert command("comparison", {"families": []}) == command("report", {}) == ""
