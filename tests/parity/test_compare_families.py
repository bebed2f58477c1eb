"""Matching of l0 in the comparison of families with other libraries, on curves whose answer is known."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("compare_families", FOLDER / "compare_families.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_families", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("family_cases", None)


CURVES = {
    "real": lambda knob: 1.1 * knob + 0.3,
    "penalty": lambda knob: 300 / (1 + knob) ** 1.5,
    "whole": lambda knob: 0.87 * knob,
}


@pytest.mark.parametrize("kind", sorted(CURVES))
def test_l0_is_matched_in_few_steps(script, kind):
    tried, knob = {}, {"real": 16.0, "penalty": 0.1, "whole": 16.0}[kind]
    while len(tried) < script.TRIES and knob not in tried:
        tried[knob] = CURVES[kind](knob)
        runs = [{"knob": at, "l0": l0, "fvu": 1 / l0} for at, l0 in tried.items()]
        if abs(tried[knob] / 16 - 1) <= script.TOLERANCE or script.between(runs, 16) is not None:
            break
        knob = script.next_knob(tried, 16, kind)
        assert kind != "whole" or knob == round(knob)
    else:
        pytest.fail(f"{kind}: {tried}")
    assert len(tried) <= 5


def test_a_penalty_is_raised_even_where_the_last_raise_did_not_help(script):
    assert script.next_knob({0.1: 97.0, 0.8: 123.0}, 16, "penalty") > 0.8
    assert script.next_knob({3.0: 2.0, 0.4: 1.0}, 16, "penalty") < 0.4


def test_between_two_runs_figures_lie_on_the_line_through_them(script):
    runs = [
        {"knob": k, "l0": l0, "fvu": l0**-0.5, "dead": 0.1 * math.log(l0)} for k, l0 in ((1.0, 14.5), (2.0, 17.0), (9.0, 40.0))
    ]
    found = script.interpolated(runs, 16)
    assert found["matched"] == "interpolated"
    assert found["l0"] == 16
    assert found["fvu"] == pytest.approx(16**-0.5)
    assert found["dead"] == pytest.approx(0.1 * math.log(16))
    assert 1 < found["knob"] < 2
    far = script.interpolated([runs[0], runs[2]], 16)
    assert (far["matched"], far["l0"]) == ("no", 14.5)


def test_a_table_of_a_page_is_replaced(script):
    page = "a\n<!-- table x -->\nold\n<!-- end of table x -->\nb\n"
    assert script.with_table(page, "x", "new") == "a\n<!-- table x -->\n\nnew\n\n<!-- end of table x -->\nb\n"
    with pytest.raises(SystemExit, match="expected the lines"):
        script.with_table(page, "y", "new")


def test_every_family_is_trained_here_at_the_width_and_budget_of_its_case(script, tmp_path):
    for name, case in script.Comparison(tmp_path, tmp_path / "python", 1, False).cases.items():
        for family in script.FAMILIES:
            if (family in script.TRANSCODERS) == (name in script.OF_MLPS.values()):
                recipe = case.recipe(family, 5, 1, tmp_path / "run")
                assert recipe.dictionary.n_latents == case.n_latents
                assert 5 in recipe.dictionary.encoder.values()
                assert (recipe.tokens, recipe.batch_tokens, recipe.seed) == (case.tokens, case.batch, 1)


def test_a_whole_budget_of_which_little_is_unused_counts_as_matched(script, tmp_path, monkeypatch):
    comparison = script.Comparison(tmp_path, tmp_path / "python", 1, False)
    l0 = {3.0: 2.91, 4.0: 3.81}
    monkeypatch.setattr(comparison, "run", lambda *of: {"knob": of[-1], "l0": l0[of[-1]], "fvu": 0.1})
    found = comparison.at_l0(comparison.cases["planted"], "topk", script.OURS, script.EQUAL, 0, None)
    assert (found["matched"], found["l0"]) == ("budget", 2.91)
    l0[3.0] = 2.8
    assert comparison.at_l0(comparison.cases["planted"], "topk", script.OURS, script.EQUAL, 0, None)["matched"] == "no"
