"""Pages from written files alone: which file is which, what lies beside it, and errors that help."""

import ast
import json
import re
from pathlib import Path

import pytest

from sparsary.eval.pages import render
from sparsary.eval.pages.document import ENVIRONMENT, TEMPLATES, document
from sparsary.eval.pages.render import render_file
from sparsary.eval.pages.report import render_report
from sparsary.eval.pages.stack import COLUMNS, EXPLANATIONS, TOTALS

PAGES = TEMPLATES.parent
RUN = {"name": "a", "directory": "runs/a", "report": {"fvu": 0.25, "l0_mean": 5.0}, "reasons": {}}
FAMILY = {"name": "a", "encoder": "{}", "n_latents": 7, "training_tokens": 5, "selection": "per token", "live": False}
SHARED = dict.fromkeys(("model", "hook", "text", "tokens", "dead_window_tokens"))
STACK = dict.fromkeys((*EXPLANATIONS, *TOTALS, "layers"), 1) | {column.key: [0.5] for column in COLUMNS}
STACK |= {"kind": "stack", "encoder": None, "model": None, "text": None, "training_tokens": None, "git_commit": None}
ABOUT = {"schema_version": 1, "n_latents": 1, "hooks_in": ["a"], "hooks_out": ["a"], "sampled_tokens": 5}
LATENT = {"density": 0.0, "max_activation": None, "mean_activation": None, "firings": 0, "histogram": None, "logits": None}
LATENT |= {key: [] for key in ("top", "quantiles", "top_tokens", "co_firing", "lifted", "correlated", "nearest")}
LATENT |= {"scores": dict.fromkeys(("predicate_f1", "example_embedding", "logit_lens")), "details": {}, "explanation": None}
# Name of the file, what it holds, words of its page.
RESULTS = [
    ("report.json", {"report_version": 1, "fvu": 0.25}, "All entries"),
    ("report.json", STACK | {"stack_report_version": 1, "layer_hooks": ["a:in -> a:out"]}, "replaced alone"),
    (
        "comparison.json",
        {"runs_version": 1, "runs": [RUN], "different": {}, "pareto": {"fvu": ["a"], "ce_increase": []}},
        "1 runs",
    ),
    (
        "comparison.json",
        SHARED | {"comparison_version": 1, "families": [FAMILY | {"directories": ["a"], "figures": {}}], "best": {}},
        "1 run group",
    ),
    (
        "circuits.json",
        {"model": "embedded", "checkpoints": [], "hooks": {}, "tasks": [], "rows": [], "curves": [], "circuits": []},
        "Circuits of embedded",
    ),
    ("features.json", ABOUT, "1 latents"),
    ("probing.json", {"probing_version": 1, "seed": 0}, "Probing of"),
]


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Plots take seconds, and have tests of their own."""
    for name in ("report", "runs", "recipes"):
        monkeypatch.setattr(f"sparsary.eval.pages.{name}.PLOTS", ())


@pytest.mark.parametrize(("name", "result", "words"), RESULTS)
def test_each_result_is_known_by_its_entries(tmp_path, name, result, words):
    path = tmp_path / name
    path.write_text(json.dumps(result))
    (tmp_path / "features.jsonl").write_text(json.dumps(LATENT | {"reasons": {}}) + "\n")
    assert render_file(str(path)) == path.with_suffix(".html")
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert words in page
    assert "default-src 'none'" in page
    other = path.rename(tmp_path / "other.json")
    if name == "features.json":
        assert render_file((tmp_path / "features.jsonl").rename(tmp_path / "other.jsonl")) == tmp_path / "other.html"
    render_file(other)
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == page


def test_a_report_has_the_curve_of_the_log_beside_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(render, "render_report", lambda report, curve, _: seen.append(curve) or render_report(report, curve))
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in (run, out):
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({"report_version": 1, "checkpoint": str(run)}))
    # A killed run's last line is half-written.
    (run / "metrics.jsonl").write_text('{"tokens": 5, "fvu": 0.5}\n{"tok')
    for folder in (run, out):
        render_file(folder / "report.json")
    (out / "metrics.jsonl").write_text("")
    render_file(out / "report.json")
    assert seen == [[{"tokens": 5, "fvu": 0.5}]] * 2 + [[]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.json", None, r"missing.json: expected this file, found none"),
        ("report.json", "{", r"report.json: expected JSON, got invalid JSON"),
        ("report.json", "[]", r"expected the JSON of a command that writes a page \(report.json, .*got other JSON"),
        ("cfg.json", '{"d_in": 5}', r"cfg.json: expected the JSON of a command"),
        ("report.json", '{"stack_report_version": 1}', r"expected what sparsary eval writes, .*training_tokens.*Run it again"),
        ("features.json", json.dumps(ABOUT), r"features.jsonl: expected this file, found none"),
        ("graph.json", '{"metadata": 0, "qParams": 0, "nodes": 0, "links": 0}', r"expected graph-page.json beside it"),
    ],
)
def test_what_cannot_be_rendered_is_said_and_leaves_the_page_alone(tmp_path, name, text, message):
    path = tmp_path / name
    path.with_suffix(".html").write_text("old")
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        render_file(path)
    assert path.with_suffix(".html").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_data_cannot_end_its_element():
    macro = ENVIRONMENT.from_string('{% from "macros.html" import json_data %}{{ json_data("d", value) }}')
    text = macro.render(value={"a": "</script><!--<script>", "b": 1})
    (inner,) = re.findall(r'<script type="application/json" id="d">(.*)</script>', text)
    assert "<" not in inner
    assert json.loads(inner) == {"a": "</script><!--<script>", "b": 1}


def test_a_name_that_a_template_misspells_is_an_error():
    with pytest.raises(Exception, match="'tiles' is undefined"):
        document("report.html", "title", command="report", heading="", facts={})


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.py")), ids=lambda path: path.name)
def test_pages_import_no_evaluation_and_hold_no_markup(path):
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level > 1:
            assert (node.level, node.module) == (3, "sae.files"), f"{path.name} imports {node.module}"
    assert not re.findall(r"</?(html|style|script|div|span|table|t[dhr]|p)\b", text)


def test_templates_are_shipped():
    with (Path(__file__).parents[3] / "pyproject.toml").open(encoding="utf-8") as handle:
        assert '"sparsary.eval.pages" = ["templates/*"]' in handle.read()
