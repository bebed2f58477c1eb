"""The studies behind the documentation can be started, and what they found is kept one record to a line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "docs" / "studies").glob("*.py"))
RESULTS = sorted(path for folder in ("docs", "tests/bench", "tests/parity") for path in (ROOT / folder / "results").glob("*"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_how_it_is_run(path, monkeypatch, capsys):
    # As Python does for a script: they import results.py, which stands beside them.
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"python docs/studies/{path.name}" in said
    assert f"usage: {path.name}" in said


@pytest.fixture
def lines():
    return runpy.run_path(str(ROOT / "docs" / "studies" / "results.py"))["lines"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parents[1].name}/{path.name}")
def test_results_are_kept_one_record_to_a_line(path, lines):
    text = path.read_text()
    assert text == "\n".join(lines(json.loads(text))) + "\n", f"{path}: as it should be: python docs/studies/results.py {path}"


def test_lines_of_results_are_the_results(lines):
    rows = [{"a": number, "sizes": [1, 2.5], "label": "x" * 300} for number in range(3)]
    value = {"about": "all", "rows": rows, "by": {"seed 0": {"more": rows, "none": []}}}
    found = list(lines(value))
    assert json.loads("\n".join(found)) == value
    assert [json.loads(line.strip().rstrip(",")) for line in found if line.strip().startswith('{"a"')] == rows + rows
    assert len(found) == 18
