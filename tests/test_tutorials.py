"""Tutorials run as readers run them, cell by cell in an empty folder, and their results are what their text says."""

import ast
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
TUTORIALS = {path.stem: path for path in sorted((ROOT / "docs" / "tutorials").glob("[0-9]*.py"))}
CELL = re.compile(r"(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)")


class Notebook:
    """A tutorial that was run: its variables, and the values that its cells show."""

    def __init__(self, path):
        self.names, self.shown = {}, []
        for markdown, code in CELL.findall(path.read_text(encoding="utf-8")):
            if not markdown:
                self.run(ast.parse(code), str(path))

    def run(self, tree, name):
        """Run a cell, and keep the value of its last line as a notebook shows it."""
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self.names)
        value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), self.names)
        if value is not None:
            self.shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))

    def __getitem__(self, name):
        return self.names[name]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Return a function that runs a tutorial by its number."""
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context():
        matplotlib.use("Agg")

        def run(number):
            found = Notebook(next(path for name, path in TUTORIALS.items() if name.startswith(number)))
            assert all(found.shown)
            return found

        yield run
    pyplot.close("all")


def test_every_tutorial_is_tested_and_listed():
    tested = re.findall(r'notebook\("(\d\d)"\)', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(tested) == sorted(name[:2] for name in TUTORIALS)
    index = (ROOT / "docs" / "tutorials" / "index.md").read_text(encoding="utf-8")
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in TUTORIALS:
        assert f"({name}.py)" in index
        assert f"tutorials/{name}.md" in nav
