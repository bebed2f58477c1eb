"""Groups of runs: covariance over documents, l0 off its target, sweeps matched in l0, claims."""

import json
import runpy
import sys

import numpy as np
import pytest

from sparsary.eval.bootstrap import resamples
from sparsary.eval.compare.families import differences_summary
from sparsary.eval.compare.groups import family_differences
from sparsary.eval.compare.recipes import COLUMNS, collect_run_groups, recipes_summary
from sparsary.eval.compare.runs import collect_runs
from sparsary.eval.metrics.document_sums import read_sums, write_sums
from sparsary.eval.pages.recipes import render_recipes
from sparsary.eval.pages.runs import render_runs

DOCUMENTS = 30
REPORT = {
    "kind": "sae",
    "n_latents": 1021,
    "training_tokens": 3030,
    "selection": "per token",
    "model": "embedded",
    "text": "embedded",
    "hook": "transformer.h.2:out",
    "tokens": 1013,
    "dead_window_tokens": 1013,
    "dead_fraction": 0.03,
}


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Plots take seconds, and have tests of their own."""
    for name in ("runs", "recipes", "fronts"):
        monkeypatch.setattr(f"sparsary.eval.pages.{name}.PLOTS", ())


@pytest.fixture
def run(tmp_path):
    """Writes a judged run whose fvu is that of its sums; documents have a difficulty that all runs share."""

    def write(name, seed, fvu=0.3, k=8, l0=None, sums=True, documents=None, **changes):
        directory = tmp_path / name / f"seed-{seed}"
        directory.mkdir(parents=True)
        hardness = 1 + np.random.default_rng(5).exponential(1, DOCUMENTS)
        noise = np.random.default_rng([*map(ord, name), seed]).normal(0, 0.02, DOCUMENTS)
        deviation = np.random.default_rng(6).uniform(50, 150, DOCUMENTS)
        error = deviation * fvu * hardness / 2 * (1 + noise)
        encoder = changes.pop("encoder", {"name": "topk", "k": k})
        report = REPORT | {"encoder": json.dumps(encoder), "l0_mean": k if l0 is None else l0, "seed": seed}
        report |= {"fvu": float(error.sum() / deviation.sum())} | changes
        (directory / "report.json").write_text(json.dumps(report))
        if sums:
            numbers = np.arange(3, 3 + DOCUMENTS) if documents is None else documents
            write_sums(directory, {"documents": numbers, "error": error, "deviation": deviation})
        return directory

    return write


def three(run, name, **changes):
    return [run(name, seed, **changes) for seed in range(3)]


def test_the_covariance_is_that_of_documents_drawn_for_all_at_once(run):
    directories = {"a": three(run, "a"), "b": three(run, "b", fvu=0.33)}
    found = collect_run_groups(directories)
    draws = {
        name: np.array(
            [np.mean([(w @ s["error"]) / (w @ s["deviation"]) for s in map(read_sums, paths)]) for w in resamples(DOCUMENTS)]
        )
        for name, paths in directories.items()
    }
    rows = found["document_covariance"]["figures"]["fvu"]
    assert np.array(rows) == pytest.approx(np.cov(np.stack(list(draws.values()))))
    (row,) = [row for row in found["differences"] if row["figure"] == "fvu"]
    assert (row["family"], row["against"], row["interval_over"]) == ("b", "a", "seeds and documents")
    # Documents are hard for both: of the difference little depends on which they are.
    alone = next(family for family in found["families"] if family["name"] == "a")["figures"]["fvu"]
    assert alone["interval_over"] == "seeds and documents"
    assert row["high"] - row["low"] < (alone["high"] - alone["low"]) / 2
    assert row["verdict"] == "worse"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("lost", ["no sums", "other documents"])
def test_without_sums_of_the_same_documents_intervals_are_of_seeds(run, lost):
    other = {"sums": False} if lost == "no sums" else {"documents": np.arange(DOCUMENTS)}
    found = collect_run_groups({"a": three(run, "a"), "b": three(run, "b", **other), "c": three(run, "c")})
    over = {row["family"]: row["interval_over"] for row in found["differences"] if row["figure"] == "fvu"}
    assert over == {"b": "seeds", "c": "seeds and documents"}
    dead = [row["interval_over"] for row in found["differences"] if row["figure"] == "dead_fraction"]
    assert dead == ["seeds", "seeds"]


@pytest.mark.parametrize(("l0", "off"), [(8.0, False), (8.15, False), (7.85, False), (8.17, True), (6.9, True)])
def test_a_family_off_its_target_l0_is_marked_and_never_best(run, l0, off):
    jumprelu = {"name": "jumprelu", "target_l0": 8}
    directories = {"a": three(run, "a"), "b": three(run, "b", fvu=0.1, encoder=jumprelu, l0=l0)}
    found = collect_run_groups(directories)
    a, b = found["families"]
    assert (a["off_target"], b["off_target"], found["target_l0"]) == (False, off, 8)
    # Of two, one is left: none is best of one.
    assert found["best"].get("fvu") == (None if off else ["b"])
    (row,) = [row for row in found["differences"] if row["figure"] == "fvu"]
    assert row["verdict"] == ("not at equal l0" if off else "better")
    name = recipes_summary(found)[2][0]
    page = render_recipes(found)
    assert ("l0 off by" in name) == ("l0 off by" in page) == off
    assert ("not at equal l0</div>" in page) == off


def test_a_budget_is_a_target_that_topk_may_miss_too(run):
    """Half of the k largest are not positive: an l0 of 5 at k = 8."""
    found = collect_run_groups({"a": three(run, "a"), "b": three(run, "b", l0=5.0)}, against="a")
    assert [family["off_target"] for family in found["families"]] == [False, True]
    # Without any target the reference's own l0 is what others are held to.
    relu = {"encoder": {"name": "relu", "sparsity": 0.1}}
    found = collect_run_groups({"c": three(run, "c", l0=20.0, **relu), "d": three(run, "d", l0=21.0, **relu)})
    assert (found["target_l0"], [family["off_target"] for family in found["families"]]) == (20.0, [False, True])


def power_law(l0):
    return 0.8 * l0**-0.5


def test_sweeps_are_interpolated_to_one_l0(run):
    sweeps = {
        f"{name}-{k}": [
            run(f"{name}-{k}", seed, l0=l0, encoder={"name": name, "k": k}, fvu=factor * power_law(l0), dead_fraction=dead)
            for seed in range(3)
        ]
        for name, factor in (("topk", 1.0), ("batch_topk", 0.9))
        for k, l0, dead in ((4, 4.1, 0.0), (16, 15.5, 0.1), (64, 60.0, 0.3))
    }
    found = collect_run_groups(sweeps, against="topk", match_l0=10.0)
    assert [family["name"] for family in found["families"]] == ["topk", "batch_topk"]
    topk, _ = found["families"]
    assert topk["between"] == ["topk-4", "topk-16"]
    assert topk["figures"]["l0_mean"]["mean"] == pytest.approx(10)
    ratio = topk["figures"]["fvu"]["mean"] / power_law(10.0)
    expected = np.mean([json.loads((path / "report.json").read_text())["fvu"] for path in sweeps["topk-4"]]) / power_law(4.1)
    assert ratio == pytest.approx(expected, rel=0.02)
    share = np.log(10 / 4.1) / np.log(15.5 / 4.1)
    assert topk["figures"]["dead_fraction"]["mean"] == pytest.approx(0.1 * share)
    assert not topk["off_target"]
    (row,) = [row for row in found["differences"] if row["figure"] == "fvu"]
    assert (row["family"], row["verdict"], row["interval_over"]) == ("batch_topk", "better", "seeds and documents")
    assert found["best"]["fvu"] == ["batch_topk"]
    page = render_recipes(found)
    assert "interpolated between topk-4, topk-16" in page
    assert "3 seeds each" in page
    # Without matching every budget but the reference's is another question.
    plain = collect_run_groups(sweeps)
    assert plain["best"] == {}
    assert [family["off_target"] for family in plain["families"]] == [True] * 6


@pytest.mark.parametrize("l0", [2.0, 80.0])
def test_nothing_is_extrapolated(run, l0):
    sweep = {f"topk-{k}": three(run, f"topk-{k}", k=k) for k in (4, 16)}
    with pytest.raises(ValueError, match=r"--match-l0: expected a sweep.*topk-4 \(4\), topk-16 \(16\)"):
        collect_run_groups(sweep, match_l0=l0)
    with pytest.raises(ValueError, match="--match-l0"):
        collect_run_groups({"topk-4": sweep["topk-4"]}, match_l0=4.0)


def test_an_unknown_reference_is_refused(run):
    with pytest.raises(ValueError, match=r"--against: expected one of aa, bb, got 'ab'"):
        collect_run_groups({"aa": three(run, "aa"), "bb": three(run, "bb")}, against="ab")


def test_reseed_noise_is_in_every_comparison(run):
    found = collect_run_groups({"a": three(run, "a"), "b": [run("b", 0)]})
    a = found["families"][0]["figures"]["fvu"]
    assert found["reseed_noise"]["fvu"] == {"seed_sd": pytest.approx(a["seed_sd"]), "df": 2}
    (row,) = [row for row in found["differences"] if row["figure"] == "fvu"]
    assert (row["verdict"], row["interval_over"], row["seed_sd"]) == ("undecided", "documents", None)
    assert differences_summary(found)[1][-1] == "undecided: one seed"
    assert collect_run_groups({"c": [run("c", 0)], "d": [run("d", 0)]})["reseed_noise"]["fvu"] is None


def test_runs_of_one_recipe_are_one_family_and_others_are_not(run):
    a = three(run, "a", recipe_digest="1")
    b = [run("b", seed, fvu=0.33, recipe_digest="2") for seed in (2, 1, 0)]
    other = run("other", 0, k=8, recipe_digest="3")
    found = collect_runs([*a, *b, other])
    names = {family["name"]: family["seeds"] for family in found["families"]}
    assert names == {"a (3 seeds)": [0, 1, 2], "b (3 seeds)": [0, 1, 2], "other-seed-0": [0]}
    by_family = {row["family"]: row["verdict"] for row in found["differences"] if row["figure"] == "fvu"}
    assert by_family == {"b (3 seeds)": "worse", "other-seed-0": "undecided"}
    assert "Differences to a (3 seeds)" in render_runs(found)
    # The same run twice is no second seed, and what says nothing of its recipe stands alone.
    again = collect_runs([a[0], run("again", 0, recipe_digest="1"), run("old", 1)])
    assert [len(family["seeds"]) for family in again["families"]] == [1, 1, 1]


def test_runs_of_a_sweep_are_matched_too(run):
    runs = [run(f"k{k}", 0, k=k, fvu=power_law(k)) for k in (4, 16)] + [run("single", 0, k=8, encoder={"name": "relu"}, l0=8.0)]
    found = collect_runs(runs, match_l0=8.0)
    assert [(family["name"], len(family["between"])) for family in found["families"]] == [("topk", 2), ("single-seed-0", 0)]
    assert "Interpolated to an l0 of 8: topk between" in render_runs(found)


def test_claims_are_data_and_tested_together(run, tmp_path, pytestconfig, monkeypatch, capsys):
    directories = {"topk": three(run, "topk"), "better": three(run, "better", fvu=0.2), "same": three(run, "same")}
    found = collect_run_groups(directories, against="topk")
    claims = [
        {"family": "better", "figure": "fvu", "claim": "reconstructs better", "source": "A"},
        {"family": "same", "figure": "dead_fraction", "claim": "as many dead", "source": "B", "expected": "equivalent"},
        {"family": "same", "against": "better", "figure": "fvu", "claim": "reconstructs better", "source": "C"},
    ]
    rows = family_differences(found, COLUMNS, [{"against": "topk"} | claim for claim in claims])
    assert [row["verdict"] for row in rows] == ["better", "equivalent", "worse"]
    assert rows[0]["p_holm"] >= 2 * rows[0]["p"]
    with pytest.raises(ValueError, match="claim: family: expected one of topk, better, same, got 'sam'"):
        family_differences(found, COLUMNS, [{"family": "sam", "figure": "fvu", "against": "topk"}])
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    (tmp_path / "claims.json").write_text(
        json.dumps([*claims, {"family": "absent", "figure": "fvu", "claim": "", "source": ""}])
    )
    script = pytestconfig.rootpath / "docs" / "studies" / "claims.py"
    arguments = [str(tmp_path / "comparison.json"), "--claims", str(tmp_path / "claims.json")]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    ends = [line.rsplit("|", 2)[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert ends == ["yes", "yes", "no: the opposite"]


def test_a_comparison_of_before_is_tested_on_seeds(run):
    """comparison.json of version 1 has values by seed, and neither covariance nor reference."""
    found = collect_run_groups({"topk": three(run, "topk"), "b": three(run, "b", fvu=0.2)})
    old = {"families": [{k: f[k] for k in ("name", "figures", "selection")} for f in found["families"]]}
    (row,) = family_differences(old, COLUMNS, [{"family": "b", "against": "topk", "figure": "fvu"}])
    assert (row["interval_over"], row["verdict"]) == ("seeds", "better")
