"""Fronts of sweeps over budgets, and the areas between them."""

import json
import math
from pathlib import Path

import pytest

from sparsary.eval.compare.families import compared
from sparsary.eval.compare.fronts import areas_summary
from sparsary.eval.compare.groups import Point, RunGroup
from sparsary.eval.compare.run import comparison_summary
from sparsary.eval.pages.fronts import area_rows, front_cards
from sparsary.eval.pages.recipes import COLUMNS, render_recipes

ABOUT = {"kind": "sae", "n_latents": 97, "training_tokens": 1010, "selection": "per token", "hook": "h.0:out"}


def sweep(encoder, l0s, fvu, seeds=3, noise=0.0):
    """Groups of an encoder with these budgets; ``fvu`` is a function of l0, and seeds differ by a factor."""
    groups = []
    for l0 in l0s:
        points = []
        for seed in range(seeds):
            report = ABOUT | {"encoder": json.dumps({"name": encoder, "k": l0}), "l0_mean": l0, "seed": seed}
            report["fvu"] = fvu(l0) * math.exp(noise * (seed - 1))
            points.append(Point(((Path(f"{encoder}-{l0}-{seed}"), 1.0),), report, seed))
        groups.append(RunGroup(f"{encoder}-{l0}", tuple(points)))
    return groups


def power(scale, exponent=-0.5):
    return lambda l0: scale * l0**exponent


def test_fronts_of_a_constant_ratio_have_that_area_whatever_their_budgets():
    groups = sweep("topk", (4, 8, 16, 32), power(1.0)) + sweep("relu", (5, 12, 40), power(1.1), noise=0.01)
    found = compared(groups, COLUMNS)
    assert [front["name"] for front in found["fronts"]] == ["topk", "relu"]
    assert [point["l0_mean"]["mean"] for point in found["fronts"][1]["points"]] == [5, 12, 40]
    (row,) = found["areas"]
    assert (row["front"], row["against"], row["figure"]) == ("relu", "topk", "fvu")
    assert row["ratio"] == pytest.approx(1.1)
    assert (row["l0_low"], row["l0_high"]) == (pytest.approx(5), pytest.approx(32))
    assert row["paired"]
    assert row["ratio_low"] < 1.1 < row["ratio_high"]
    assert row["verdict"] == "worse"
    # Against the other one the ratio is the inverse.
    (row,) = compared(groups, COLUMNS, against="relu-12")["areas"]
    assert (row["front"], row["ratio"], row["verdict"]) == ("topk", pytest.approx(1 / 1.1), "better")


def test_fronts_that_cross_are_compared_by_the_mean_over_log_l0():
    # log ratio (l0 / 8)^0.2 is 0.2 log(l0 / 8): from 4 to 16 it is antisymmetric about 8.
    groups = sweep("topk", (4, 16), power(1.0)) + sweep("relu", (4, 16), power(8**-0.2, -0.3), noise=0.001)
    (row,) = compared(groups, COLUMNS)["areas"]
    assert row["ratio"] == pytest.approx(1.0)
    assert row["verdict"] == "equivalent"


def test_one_seed_has_an_area_and_no_verdict():
    found = compared(sweep("topk", (4, 16), power(1.0), seeds=1) + sweep("relu", (4, 16), power(1.2), seeds=1), COLUMNS)
    assert found["areas"][0]["ratio"] == pytest.approx(1.2)
    assert areas_summary(found)[1][-1] == "undecided: one seed"
    assert area_rows(found)[0].interval == ""


def test_without_a_common_range_or_a_second_sweep_there_is_no_area():
    low, high = sweep("topk", (4, 8), power(1.0)), sweep("relu", (16, 32), power(1.0))
    assert compared(low + high, COLUMNS)["areas"] == []
    found = compared(low + sweep("relu", (8,), power(1.0)), COLUMNS)
    assert [front["name"] for front in found["fronts"]] == ["topk"]
    assert found["areas"] == []
    assert compared(sweep("relu", (8,), power(1.0)), COLUMNS)["fronts"] == []


def test_at_a_matched_l0_the_fronts_are_those_of_the_runs():
    groups = sweep("topk", (4, 16), power(1.0)) + sweep("relu", (4, 16), power(1.1))
    found = compared(groups, COLUMNS, match_l0=8)
    assert len(found["families"]) == 2
    assert [front["members"] for front in found["fronts"]] == [["topk-4", "topk-16"], ["relu-4", "relu-16"]]


def test_page_and_terminal_show_fronts_and_areas():
    groups = sweep("topk", (4, 8, 32), power(1.0), noise=0.02) + sweep("relu", (4, 8, 32), power(1.3), noise=0.01)
    common = {"model": "m", "hook": "h.0:out", "text": "t", "tokens": 997, "dead_window_tokens": 997}
    found = common | compared(groups, COLUMNS) | {"version": 1}
    for family in found["families"]:
        family |= {"live": False, "directories": [], "kind": "sae"}
    card, other = front_cards(found)
    assert "topk from 0.5001 at l0 4 to 0.1768 at 32" in card.words
    # No run has a ce_increase.
    assert not other.words
    page = render_recipes(found)
    assert "Areas between fronts" in page
    assert "relu / topk" in page
    tables = comparison_summary(found)
    assert tables[-1][1][:3] == ["relu / topk", "fvu", "1.300"]
    # A comparison of an older version has neither.
    old = {key: value for key, value in found.items() if key not in ("fronts", "areas")}
    assert front_cards(old) == []
    assert "Areas between fronts" not in render_recipes(old)
