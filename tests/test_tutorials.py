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


def test_train_and_judge(notebook):
    found = notebook("01")
    report = found["report"]
    assert report["l0_mean"] == 16
    assert report["fvu"] < 0.12
    assert 0 < report["ce_increase"] < 0.2
    runs = found["comparison"]["runs"]
    by_l0 = {run["report"]["l0_mean"]: run["report"]["fvu"] for run in runs}
    assert by_l0[8] > by_l0[16]
    figures = found["probing"].report
    assert figures["factors_probe_f1"] > figures["factors_latent_f1"] > figures["factors_dimension_f1"]
    assert found["ax"].get_legend_handles_labels()[1] == ["k = 8", "k = 16"]


def test_published_dictionary(notebook):
    found = notebook("02")
    assert sorted(path.name for path in Path("published").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert found["exported"].difference < 1e-5
    (figures,) = found["check"].values()
    assert figures.fvu < 0.2
    assert figures.warnings == ()
    assert len(found["table"]) == 256
    # The latent was found by prompts, and what it promotes is read off its weights.
    promoted = [entry["token"].strip() for entry in found["features"].records_of(found["latent"])[0]["logits"]["promoted"]]
    assert {"she", "her", "herself"} & set(promoted)
    counts = found["pd"].DataFrame(found["steered"]).fillna(0)
    assert counts.loc["he"].iloc[0] == 8
    assert counts.loc["she"].iloc[-1] > 0


def test_attribution_graph(notebook):
    found = notebook("03")
    assert found["report"]["layers"] == 4
    assert found["report"]["ce_increase"] < 0.2 * (found["report"]["ce_zero"] - found["report"]["ce_clean"])
    graph = found["graph"]
    assert graph["direct_spearman_norms"] > 0.99
    assert 0.5 < graph["replacement_score"] <= 1
    assert set(graph.to_pandas()["kind"]) == {"latent", "error", "token", "logit"}
    assert len(found["chosen"]) == 10
    shares = [*found["shares"].values()]
    assert shares[0] > 0.8
    assert shares[1] < shares[2]


def test_circuits(notebook):
    found = notebook("04")
    rows = {row["family"]: row for row in found["found"]["rows"]}
    assert rows["sae: errors ablated"]["cpr"] > rows["sae: random, errors ablated"]["cpr"]
    assert rows["sae: errors kept"]["accuracy"] == 1
    assert rows["sae: errors kept"]["exact_pearson"] > 0.9
    assert len(found["ax"].get_legend_handles_labels()[1]) == 4
    assert len(found["units"]) > 10


def test_dark_matter(notebook):
    table = notebook("05")["table"]
    assert list(table.index) == [64, 128, 256, 512]
    # The whole falls with width, and nearly all that falls is linear.
    assert table["fvu_total"].is_monotonic_decreasing
    fallen = table.loc[64] - table.loc[512]
    assert fallen["fvu_nonlinear"] < 0.25 * fallen["fvu_total"]
    assert table["linear_error_share"].is_monotonic_decreasing
    recovered = table.loc[512]
    assert recovered["ce_recovered_by_nonlinear_error"] > recovered["ce_recovered_by_linear_error"]
