"""Runs that exist, side by side: what is a run, who is on the front, and the page in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sparsary
from sparsary.eval.compare.runs import collect_runs, compare_runs, pareto, runs_among, runs_summary
from sparsary.eval.pages.document import TEMPLATES
from sparsary.eval.pages.runs import COLUMNS, render_runs
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.files import read_json

REPORT = {
    "kind": "sae",
    "encoder": '{"name": "topk", "k": 5}',
    "selection": "per token",
    "n_latents": 67,
    "training_tokens": 3030,
    "model": "embedded",
    "text": "embedded",
    "hook": "transformer.h.2:out",
    "tokens": 1013,
    "l0_mean": 5.0,
    "fvu": 0.25,
    "fvu_low": 0.24,
    "fvu_high": 0.27,
    "ce_increase": 0.5,
    "ce_increase_low": 0.4,
    "ce_increase_high": 0.6,
    "ce_recovered_mean": 0.875,
    "l0_histogram_counts": [0, 0, 0, 0, 0, 1013],
    "linear_error_share": None,
    "reasons": {"linear_error_share": "a perfect <dictionary>"},
}
RUNS = {
    "small": {"l0_mean": 3.0, "fvu": 0.5, "ce_increase": 0.9, "ce_increase_low": 0.8, "ce_increase_high": 1.0},
    "beaten": {"l0_mean": 9.0, "fvu": 0.3, "ce_increase": 0.45},
    "large": {"l0_mean": 8.0, "fvu": 0.125, "ce_increase": 0.0625, "encoder": '{"name": "batch_topk", "k": 8}'},
    "bare": {"fvu": 0.75, "ce_increase": None, "l0_mean": 20.0},
}


@pytest.fixture
def runs(tmp_path):
    """Four judged runs, as directories with a report."""
    for name, changes in RUNS.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "report.json").write_text(json.dumps(REPORT | changes))
    return [tmp_path / "runs" / name for name in RUNS]


def test_runs_recipes_and_folders_of_runs_are_told_apart(runs, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.yaml").write_text("{}")
    assert runs_among([str(tmp_path / "recipes"), "elsewhere.yaml"]) is None
    assert runs_among([str(runs[1]), str(runs[0]), str(runs[1])]) == [runs[1], runs[0]]
    for name in ("layer-10", "layer-9"):
        SAE(5, 13, ENCODERS["topk"](k=2)).save(tmp_path / "grid" / name)
    # The report of a folder of checkpoints is about all of them at once.
    (tmp_path / "grid" / "report.json").write_text("{}")
    assert runs_among([str(tmp_path / "grid")]) == [tmp_path / "grid" / "layer-9", tmp_path / "grid" / "layer-10"]
    with pytest.raises(ValueError, match=r"recipes: expected a directory with dictionary.json or report.json"):
        runs_among([str(runs[0]), str(tmp_path / "recipes")])


def test_the_front_holds_who_is_not_beaten_in_both(runs):
    comparison = collect_runs(runs)
    assert comparison["pareto"] == {"fvu": ["small", "large"], "ce_increase": ["small", "large"]}
    assert comparison["different"] == {}
    equal = [{"name": name, "report": {"l0_mean": 4, "fvu": fvu}} for name, fvu in (("a", 0.5), ("b", 0.25), ("c", None))]
    assert pareto(equal, "fvu") == ["b"]
    head, *rows = runs_summary(comparison)
    assert head == ["run", *(column.label for column in COLUMNS)]
    assert [row[:3] for row in rows] == [
        ["small", "3", "0.5"], ["beaten", "9", "0.3"], ["large", "8", "0.125"], ["bare", "20", "0.75"],
    ]  # fmt: skip


def test_what_makes_figures_incomparable_is_said(runs):
    (runs[1] / "report.json").write_text(json.dumps(REPORT | {"tokens": 509, "hook": "transformer.h.1:out"}))
    comparison = collect_runs(runs)
    assert comparison["different"]["tokens"] == {"1,013": ["small", "large", "bare"], "509": ["beaten"]}
    html = render_runs(comparison)
    assert html.count('class="warning"') == 2
    assert "Not the same <code>tokens</code>" in html


def test_other_reports_and_too_few_runs_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"expected at least two runs, got 1\. For one alone: sparsary eval"):
        compare_runs(runs[:1], str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"small: --tokens: expected a checkpoint to evaluate"):
        compare_runs(runs, str(tmp_path / "out"), tokens=100)
    (runs[0] / "report.json").write_text(json.dumps({"stack_report_version": 1, "fvu_layer_mean": 0.5}))
    with pytest.raises(ValueError, match=r"report.json: fvu: expected the report of one dictionary"):
        compare_runs(runs, str(tmp_path / "out"))


def test_checkpoints_without_a_report_are_judged_together(runs, tmp_path, monkeypatch):
    judged = []

    def instead(checkpoints, **_options):
        judged.append(checkpoints)
        for path in checkpoints:
            (Path(path) / "report.json").write_text(json.dumps(REPORT))

    monkeypatch.setattr("sparsary.eval.compare.runs.evaluate_all", instead)
    new = [tmp_path / name for name in ("one", "two")]
    for path in new:
        SAE(5, 13, ENCODERS["topk"](k=2)).save(path)
    comparison = compare_runs([*runs, *new], str(tmp_path / "deep" / "out"))
    assert judged == [new]
    assert [run["name"] for run in comparison["runs"]] == [*RUNS, "one", "two"]
    saved = read_json(tmp_path / "deep" / "out" / "comparison.json")
    assert saved == {key: value for key, value in comparison.items() if key != "page_path"}


def test_page_is_self_contained_safe_and_the_same_each_time(runs):
    attack = '<script>alert(1)</script>"onload="x'
    (runs[0] / "report.json").write_text(json.dumps(REPORT | dict.fromkeys(("hook", "model", "encoder", "selection"), attack)))
    comparison = collect_runs(runs)
    comparison["runs"][1]["name"] = attack
    html = render_runs(comparison)
    assert html == render_runs(comparison)
    # The one script is ours, and the policy lets no other run.
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert script == "".join((TEMPLATES / f"{name}.js").read_text() for name in ("page", "table", "comparison"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html
    assert not re.search(r"@import|@font-face|<link|<iframe|<img|\bsrc=", html)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", html))
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_the_command_compares_runs(runs, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["sparsary", "compare", *arguments])
        with pytest.raises(SystemExit) as ended:
            sparsary.main()
        return ended.value.code

    assert run(*map(str, runs), "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "large" in printed
    assert "report: " in printed
    assert (tmp_path / "out" / "comparison.html").read_text().lower().startswith("<!doctype html>")
    assert run(*map(str, runs), "lr=1e-3") == 2
    assert "lr: expected no recipe keys with runs" in capsys.readouterr().err
    assert run("nowhere.yaml", "--tokens", "50") == 2
    assert "expected runs, got recipes" in capsys.readouterr().err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize(
    ("fragment", "shown", "hidden_points"),
    [
        ("", ["large", "beaten", "small", "bare"], set()),
        ("#sort=-l0_mean", ["bare", "beaten", "large", "small"], set()),
        # Without a value at the end both ways.
        ("#sort=ce_increase", ["large", "beaten", "small", "bare"], set()),
        ("#sort=-ce_increase", ["small", "beaten", "large", "bare"], set()),
        ("#sort=name&q=l0%3C9", ["large", "small"], {"1", "3"}),
        ("#q=batch_topk", ["large"], {"0", "1", "3"}),
        ("#q=fvu%3E0.2+topk&sort=-fvu", ["bare", "small", "beaten"], {"2"}),
    ],
)
def test_browser_sorts_and_filters(runs, tmp_path, fragment, shown, hidden_points):
    file = tmp_path / "comparison.html"
    file.write_text(render_runs(collect_runs(runs)), encoding="utf-8")
    assert CHROMIUM is not None
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000 --dump-dom"
    command = [CHROMIUM, *quiet.split(), *more.split(), f"--user-data-dir={tmp_path / 'profile'}", file.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    rows = re.findall(r'<tr data-number="\d"([^>]*)>.*?<strong>(.*?)</strong>', done.stdout, flags=re.DOTALL)
    assert [name for attributes, name in rows if "hidden" not in attributes] == shown
    points = re.findall(r'<g id="point-fvu-(\d)"([^>]*)>', done.stdout)
    assert len(points) == 4
    assert {number for number, attributes in points if "none" in attributes} == hidden_points
