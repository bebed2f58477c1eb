"""The command that compares circuits: its files and page, and what it refuses."""

import json
import re
import shutil

import pytest
import torch

import sparsary
from sparsary.eval.circuits.comparison import run
from sparsary.eval.circuits.comparison.run import compare_circuits
from sparsary.eval.circuits.comparison.summary import comparison_tables
from sparsary.eval.pages.circuit_comparison import DIFFERENCES, OVERLAPS, REPAIRS, UNITS, render_circuit_comparison
from sparsary.eval.pages.circuit_comparison_glossary import EXPLANATIONS, comparison_markdown
from sparsary.eval.pages.render import render_file

EVIL = "</script><img src=x onerror=alert(1)>"
TASKS = ("agreement_simple", "agreement_pp")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two tasks of the embedded model, against itself, in heads and MLPs."""
    out = tmp_path_factory.mktemp("compared")
    settings = sparsary.CircuitSettings(
        tasks=TASKS, methods=("attribution", "random"), pairs=12, random_circuits=2, units=("components",)
    )
    return compare_circuits(settings=settings, models=["embedded", "embedded"], repairs=[TASKS], out=out)


def test_every_two_circuits_are_compared_and_every_one_is_run_on_every_task(compared):
    names = [f"{task}, {side}" for task in TASKS for side in ("base", "tuned")]
    assert [row["name"] for row in compared["tasks_scored"]] == names
    assert len(compared["overlaps"]) == 2 * 6
    assert {(row["circuit"], row["task"]) for row in compared["cross"]} == {(a, b) for a in names for b in names}
    assert len(compared["differences"]) == 4 * 3
    assert [row["task"] for row in compared["changed"]] == list(TASKS)
    # A model against itself.
    same = next(row for row in compared["overlaps"] if (row["a"], row["b"]) == (names[0], names[1]))
    assert same["jaccard"] == same["spearman"] == same["share_of_smaller"] == 1.0
    assert [(row["a"], row["b"]) for row in compared["repairs"]] == [tuple(f"{task}, tuned" for task in TASKS)]


@pytest.fixture(scope="module")
def of_latents(tmp_path_factory):
    """Latents of a checkpoint, and edges, on two tasks."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    dictionary = sparsary.SAE(128, 40, sparsary.ENCODERS["topk"](k=6))
    dictionary.save(folder, {"model": {"id": "embedded"}, "hook": "transformer.h.1:out"})
    settings = sparsary.CircuitSettings(
        tasks=TASKS, methods=("attribution",), pairs=12, random_circuits=2, edges=True, units=("components", "latents")
    )
    return str(folder), compare_circuits([folder], settings, repairs=[TASKS])


def test_latents_of_a_checkpoint_and_edges_are_compared_too(of_latents):
    folder, found = of_latents
    latents = f"{folder}: latents"
    assert {row["family"] for row in found["overlaps"]} == {"heads and MLPs", latents, "edges"}
    assert not found["refused"]
    units = {row["family"]: row["units"] for row in found["tasks_scored"]}
    # Latents, and the error as a node.
    assert units[latents] == 41
    assert units["edges"] > units["heads and MLPs"]
    row = next(row for row in found["overlaps"] if row["family"] == "edges")
    assert 0 <= row["floor"] < row["jaccard"] <= 1
    assert all(row["unit"].startswith("transformer.h.1:out/") for row in found["shared"] if row["family"] == latents)
    assert any("->" in row["unit"] for row in found["shared"] if row["family"] == "edges")
    repaired = {row["family"]: row for row in found["repairs"]}
    assert repaired["edges"]["refused"] == "edges have no activations of their own"
    html = found.page.read_text(encoding="utf-8")
    assert "--edges --random-circuits 2 --compare" in html.replace("\n", " ")
    assert "edges have no activations of their own" in html


def test_methods_without_scores_of_single_pairs_are_refused_with_a_reason(compared):
    (row,) = compared["refused"]
    assert row["method"] == "random"
    assert "expected a method that scores every pair" in row["refused"]


def test_the_page_is_made_of_the_file_alone_and_shows_every_row(compared, tmp_path):
    copied = shutil.copy(compared["path"], tmp_path / "other.json")
    page = render_file(copied)
    html = page.read_text(encoding="utf-8")
    assert page.name == "other.html"
    found = json.loads(compared.page.with_suffix(".json").read_text(encoding="utf-8"))
    assert render_circuit_comparison(found) == render_circuit_comparison(found)
    for title in ("Overlaps", "Does a share more with b than with c?", "from the base to the tuned model", "Repair: accuracy"):
        assert title in html
    assert html.count('class="matrix"') == 4
    assert "--compare --out" in html.replace("\n", " ")


def test_text_of_results_does_not_become_html(compared):
    found = json.loads(compared.page.with_suffix(".json").read_text(encoding="utf-8"))
    text = json.dumps(found).replace(TASKS[0], json.dumps(EVIL)[1:-1])
    html = render_circuit_comparison(json.loads(text))
    assert "<img" not in html
    assert "&lt;img" in html
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", html)


def test_the_tables_of_the_documentation_are_those_of_the_page(pytestconfig):
    assert comparison_markdown() in (pytestconfig.rootpath / "docs" / "circuit_comparison.md").read_text(encoding="utf-8")


def test_every_column_of_the_page_is_a_figure_of_the_file(compared):
    rows = {OVERLAPS: "overlaps", DIFFERENCES: "differences"}
    for columns, table in rows.items():
        assert {column.key for column in columns} <= compared[table][0].keys()
    unit = compared["changed"][0]["units"][0]
    assert {column.key for column in UNITS} <= unit.keys()
    explained = {key for entries in EXPLANATIONS.values() for key in entries}
    assert {"jaccard", "ceiling", "floor", "faithfulness", "exchanged", "lost", "closed"} <= explained
    assert {column.key for column in REPAIRS} >= {"accuracy_after", "accuracy_opposite"}
    assert comparison_markdown().count("\n") == 2 + len(explained)


def test_the_terminal_shows_overlaps_changes_and_repairs(compared):
    tables = comparison_tables(compared)
    assert [head[-1] for head, _ in tables] == ["shared on b", "closed by gained", "opposite answers"]
    assert [len(rows) for _, rows in tables] == [6, 2, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"models": ["embedded"], "tasks": ("ioi",)},
            r"--compare: expected two circuits or more, got one \(ioi of",
        ),
        ({"models": [], "tasks": TASKS}, r"--compare: expected CHECKPOINTs or --model MODEL, got neither"),
        ({"models": ["a", "b", "c"], "tasks": TASKS}, r"--model: expected one model, or a base model and a tuned one, got 3"),
        ({"models": ["embedded"], "tasks": ("ioi", "ioi")}, r"--task: expected different tasks, got ioi, ioi"),
        (
            {"models": ["embedded"], "tasks": TASKS, "repairs": [("agreement_simple", "agreement_p")]},
            r"--repair: .*agreement_simple, agreement_pp.*got 'agreement_p'.*agreement_pp",
        ),
        (
            {"models": ["embedded"], "tasks": TASKS, "repairs": [("agreement_pp", "agreement_pp")]},
            r"--repair: expected two different tasks",
        ),
        ({"models": ["embedded"], "tasks": TASKS, "out": None}, r"--out: required with --compare and no CHECKPOINT"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(given, said, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", None)
    settings = sparsary.CircuitSettings(tasks=given["tasks"], methods=("attribution",))
    out = given.get("out", tmp_path)
    with pytest.raises(ValueError, match=said):
        compare_circuits(settings=settings, models=given["models"], repairs=given.get("repairs", ()), out=out)


def test_a_repair_by_a_task_with_other_answers_is_refused(tmp_path):
    settings = sparsary.CircuitSettings(tasks=("agreement_simple", "greater_than"), methods=("attribution",), pairs=8)
    with pytest.raises(ValueError, match=r"--repair: expected two tasks with answers in common, got agreement_simple and"):
        compare_circuits(settings=settings, models=["embedded"], repairs=[settings.tasks], out=tmp_path)
