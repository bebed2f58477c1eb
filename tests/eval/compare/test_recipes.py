"""Several recipes side by side: runs over one store, repeated calls, means and ranges, and the page."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.eval.compare import recipes as compare_module
from sparsary.eval.compare.families import summarize
from sparsary.eval.compare.recipes import (
    COLUMNS,
    collect_run_groups,
    compare_recipes,
    is_complete,
    load_families,
    recipes_summary,
    require_comparable,
    training_speed,
)
from sparsary.eval.pages.charts import FAMILY_COLORS, MARKERS
from sparsary.eval.pages.recipes import PLOTS, render_recipes
from sparsary.sae import load_dictionary
from sparsary.sae.files import read_json
from sparsary.training import preflight, resolve_hooks
from sparsary.training import run as run_module
from sparsary.training.recipe import load_recipe
from sparsary.training.resolve_hooks import resolve_recipes
from sparsary.training.signals import Stopped

REPORT = {
    "kind": "sae",
    "encoder": '{"name": "topk", "k": 5}',
    "n_latents": 67,
    "training_tokens": 3030,
    "model": "embedded",
    "text": "embedded",
    "hook": "transformer.h.2:out",
    "tokens": 1013,
    "dead_window_tokens": 1013,
    "fvu": 0.25,
    "ce_recovered_mean": 0.875,
    "ce_increase": 0.5,
    "kl_spliced": 0.4,
    "l0_mean": 5.0,
    "dead_fraction": 0.0,
    "dense_fraction": 0.125,
    "linear_error_share": 0.3,
}


class Table(HTMLParser):
    """Rows of the first table's cells, each as its pieces of text; words of the plots; all attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[list[str]]] = []
        self.plots: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.in_cell = False
        self.tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.tables += tag == "table"
        if tag == "tr" and self.tables == 1:
            self.rows.append([])
        elif tag in ("th", "td") and self.tables == 1:
            self.rows[-1].append([])
            self.in_cell = True
        elif tag == "svg" and ("role", "img") in attrs:
            self.plots.append(dict(attrs)["aria-label"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell and data.strip():
            self.rows[-1][-1].append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self.in_cell = False

    def cell(self, family: str, key: str) -> list[str]:
        (row,) = [row for row in self.rows if family in row[0]]
        return row[1 + [column.key for column in COLUMNS].index(key)]


@pytest.fixture
def judged(tmp_path):
    """Writes a run's directory with a report and a training speed, as training and evaluation would leave it."""

    def write(family: str, seed: int, **changes) -> Path:
        directory = tmp_path / "judged" / family / f"seed-{seed}"
        directory.mkdir(parents=True)
        (directory / "report.json").write_text(json.dumps(REPORT | changes))
        (directory / "metrics.jsonl").write_text('{"tokens_per_second": 1000.75}\n')
        return directory

    return write


@pytest.fixture
def recipes(recipe_values, tmp_path):
    """A directory of two recipes over one store, and a base that is none."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    # Half held out: evaluation, six times in one test, need not read through twenty documents for one.
    recipe_values["harvest"] |= {"tokens": 3000, "heldout": 0.5}
    recipe_values |= {"tokens": 1010, "eval_tokens": 300}
    wider = recipe_values | {"dictionary": recipe_values["dictionary"] | {"encoder": {"name": "topk", "k": 7}}}
    for name, values in (("narrow", recipe_values), ("wide", wider), ("base", {"nothing": "valid"})):
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Directories trained, directories judged and stores harvested since the last ``clear``."""
    seen = {"train": [], "evaluate": [], "harvest": []}

    def watch(module, name, key):
        real = getattr(module, name)

        def watched(*arguments, **options):
            seen[name.split("_")[0]].append(key(arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(compare_module, "train_recipe", lambda arguments: arguments[0].recipe.out_dir)
    watch(compare_module, "evaluate", lambda arguments: arguments[0])
    watch(run_module, "harvest_activations", lambda arguments: arguments[2].store)
    # Most of an evaluation this small would be the drawing of its page.
    monkeypatch.setattr("sparsary.eval.report.candidate.render_file", lambda path: path.with_suffix(".html"))
    return seen


def test_two_recipes_and_two_seeds_end_to_end(recipes, recipe_values, calls, tmp_path, monkeypatch):
    out = tmp_path / "out"
    overrides = {"lr": 2e-3}
    comparison = compare_recipes([str(recipes)], overrides, seeds=2, out=str(out))
    runs = [str(out / name / f"seed-{seed}") for name in ("narrow", "wide") for seed in (0, 1)]
    assert calls == {"train": runs, "evaluate": runs, "harvest": [recipe_values["harvest"]["store"]]}
    for run in runs:
        saved = load_recipe(Path(run) / "recipe.yaml")
        assert (saved.lr, saved.seed, saved.out_dir) == (2e-3, int(run[-1]), run)
    narrow, wide = comparison["families"]
    assert (narrow["name"], wide["name"]) == ("narrow", "wide")
    assert wide["figures"]["l0_mean"]["mean"] > narrow["figures"]["l0_mean"]["mean"]
    assert narrow["figures"]["fvu"]["min"] < narrow["figures"]["fvu"]["max"]
    for family in comparison["families"]:
        reports = [json.loads((Path(run) / "report.json").read_text()) for run in family["directories"]]
        assert family["figures"]["fvu"]["values"] == [report["fvu"] for report in reports]
        assert family["figures"]["tokens_per_second"]["min"] > 0
    assert read_json(out / "comparison.json") == {k: v for k, v in comparison.items() if k != "page_path"}
    page = (out / "comparison.html").read_text()
    # Rendered from the file alone it has no links to the runs' pages.
    bare = [re.sub(r"(?s)<nav.*?</nav>|<a [^>]*>|</a>", "", text) for text in (page, render_recipes(comparison))]
    assert bare[0] == bare[1]

    # Repeated: nothing is done again. The page was seen; drawing it takes a second.
    monkeypatch.setattr(compare_module, "render_file", lambda path: path.with_suffix(".html"))
    for seen in calls.values():
        seen.clear()
    assert compare_recipes([str(recipes)], overrides, seeds=2, out=str(out)) == comparison
    assert calls == {"train": [], "evaluate": [], "harvest": []}

    # A lost report is made again, and judging on more tokens touches every run; both leave the weights alone.
    weights = [load_dictionary(run).W_dec for run in runs]
    (Path(runs[3]) / "report.json").unlink()
    compare_recipes([str(recipes)], overrides, seeds=2, out=str(out))
    assert calls["evaluate"] == [runs[3]]
    calls["evaluate"].clear()
    compare_recipes([str(recipes / "narrow.yaml")], overrides | {"eval_tokens": 400}, seeds=1, out=str(out))
    assert calls["evaluate"] == [runs[0]]
    assert all(torch.equal(load_dictionary(run).W_dec, before) for run, before in zip(runs, weights, strict=True))

    with pytest.raises(ValueError, match=r"narrow/seed-0: expected an earlier run.*\n  lr: 0.002 there, 0.001 here"):
        compare_recipes([str(recipes)], {}, seeds=2, out=str(out))


def test_recipes_are_resolved_together_and_planned_once_each(recipes, tmp_path, monkeypatch, count_calls):
    for name in ("narrow", "wide"):
        values = json.loads((recipes / f"{name}.yaml").read_text())
        del values["dictionary"]["hook"]
        values["dictionary"] |= {"layer": 2, "site": "resid_post"}
        (recipes / f"{name}.yaml").write_text(json.dumps(values))
    seen = count_calls((compare_module, "resolve_recipes"), (resolve_hooks, "skeleton"), (preflight, "_plan"))
    monkeypatch.setattr(compare_module, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(compare_module, "collect_run_groups", lambda *_: {})
    monkeypatch.setattr(compare_module, "render_file", lambda path: path.with_suffix(".html"))
    compare_recipes([str(recipes)], {"tokens": 202}, seeds=2, out=str(tmp_path / "out"))
    assert seen == {"resolve_recipes": 1, "skeleton": 1, "_plan": 2}


def test_an_interrupted_run_goes_on_and_needs_no_store(recipes, calls, tmp_path, monkeypatch):
    out = tmp_path / "out"
    narrow = str(recipes / "narrow.yaml")
    live = {"harvest.store": None, "harvest.live_buffer_tokens": 600}
    judge = compare_module.evaluate
    monkeypatch.setattr(
        compare_module, "evaluate", lambda *_, **__: (_ for _ in ()).throw(Stopped(15, "at step 30; everything is saved."))
    )
    with pytest.raises(Stopped):
        compare_recipes([narrow], live, seeds=1, out=str(out))
    # Trained, not judged; and a report of some earlier state of the run does not count.
    run = load_recipe(narrow, live | {"out_dir": str(out / "narrow" / "seed-0")})
    assert not is_complete(run)
    (out / "narrow" / "seed-0" / "report.json").write_text(json.dumps(REPORT | {"training_tokens": 505}))
    assert not is_complete(run)
    monkeypatch.setattr(compare_module, "evaluate", judge)
    comparison = compare_recipes([narrow], live, seeds=1, out=str(out))
    assert is_complete(run)
    assert comparison["families"][0]["live"]
    assert calls["harvest"] == []
    # Trained further than the report says, or not yet to the end.
    assert not is_complete(run.model_copy(update={"eval_tokens": 301}))
    config = json.loads((out / "narrow" / "seed-0" / "dictionary.json").read_text())
    config["provenance"]["training_tokens"] = 505
    # As a user who edits the file has to.
    del config["checksum"]
    (out / "narrow" / "seed-0" / "dictionary.json").write_text(json.dumps(config))
    (out / "narrow" / "seed-0" / "report.json").write_text(json.dumps(REPORT | {"training_tokens": 505}))
    assert not is_complete(run)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("harvest", "store", "elsewhere"),
        ("harvest", "tokens", 2500),
        ("text", "context_length", 64),
        ("model", "dtype", "bfloat16"),
        (None, "eval_tokens", 3000),
    ],
)
def test_recipes_with_other_inputs_are_refused(recipes, recipe_values, tmp_path, calls, section, key, value):
    changed = recipe_values if section is None else recipe_values.setdefault(section, {})
    before = changed.get(key)
    changed[key] = value
    (recipes / "wide.yaml").write_text(json.dumps(recipe_values))
    name = key if section is None else f"{section}.{key}"
    expected = {"model.dtype": "'float32'"}.get(name, repr(before))
    with pytest.raises(ValueError, match=re.escape(f"  {name}: {expected} in narrow, {value!r} in wide")) as refused:
        compare_recipes([str(recipes)], {}, out=str(tmp_path / "out"))
    assert f"{name}=VALUE" in str(refused.value)
    assert calls["harvest"] == calls["train"] == []
    assert not (tmp_path / "out").exists()


def load_resolved(paths):
    families = load_families(paths, {})
    return dict(zip(families, resolve_recipes(list(families.values())), strict=True))


def test_a_hook_of_their_own_is_refused(recipes, recipe_values):
    hooks = ["transformer.h.2:out", "transformer.h.1:out"]
    recipe_values["harvest"]["hooks"] = hooks
    (recipes / "narrow.yaml").write_text(json.dumps(recipe_values))
    recipe_values["dictionary"]["hook"] = hooks[1]
    (recipes / "wide.yaml").write_text(json.dumps(recipe_values))
    with pytest.raises(ValueError, match=r"dictionary.hook: 'transformer.h.2:out' in narrow, 'transformer.h.1:out' in wide"):
        compare_recipes([str(recipes)])


def test_a_transcoder_compares_with_an_sae_of_what_it_predicts(recipes, recipe_values):
    """They read different tensors; the store is to hold both, and what is judged is the same."""
    del recipe_values["harvest"]["hooks"]
    shared = {"layer": 1, "n_latents": 31, "encoder": {"name": "topk", "k": 3}}
    for name, changes in {
        "narrow": {"kind": "sae", "site": "mlp_out"},
        "wide": {"kind": "transcoder", "site": "mlp"},
    }.items():
        (recipes / f"{name}.yaml").write_text(json.dumps(recipe_values | {"dictionary": shared | changes}))
    together = load_resolved([str(recipes)])
    require_comparable(together)
    assert {member.recipe.harvest.hooks for member in together.values()} == {
        ("transformer.h.1.mlp:in", "transformer.h.1.mlp:out")
    }
    away = recipe_values | {"dictionary": shared | {"kind": "transcoder", "site": "mlp", "layer": 2}}
    (recipes / "wide.yaml").write_text(json.dumps(away))
    with pytest.raises(
        ValueError, match=r"dictionary\.hook_out: 'transformer\.h\.1\.mlp:out' in narrow, 'transformer\.h\.2\.mlp"
    ):
        compare_recipes([str(recipes)])


def test_a_recipe_that_streams_is_held_to_model_text_hook_and_exclusions(recipes, recipe_values):
    store = {"store": None, "tokens": None, "gradients": False, "shard_tokens": 999}
    recipe_values["harvest"] |= store
    # The first by name: what has a store is still the yardstick.
    (recipes / "any.yaml").write_text(json.dumps(recipe_values))
    require_comparable(load_resolved([str(recipes)]))
    recipe_values["harvest"]["heldout"] = 0.25
    (recipes / "any.yaml").write_text(json.dumps(recipe_values))
    with pytest.raises(ValueError, match=r"got\n  harvest.heldout: 0.5 in narrow, 0.25 in any\nMake"):
        require_comparable(load_resolved([str(recipes)]))


def test_what_cannot_be_run_is_found_before_anything_is(recipes, recipe_values, tmp_path, calls):
    (recipes / "zoom.yaml").write_text(json.dumps(recipe_values | {"batch_tokens": 2999, "tokens": 6000}))
    with pytest.raises(ValueError, match="batch_tokens: expected at most"):
        compare_recipes([str(recipes)], {}, out=str(tmp_path / "out"))
    assert calls["harvest"] == calls["train"] == []


def test_which_files_are_recipes(recipes, recipe_values, tmp_path):
    assert list(load_families([str(recipes)], {})) == ["narrow", "wide"]
    both = [str(recipes / "wide.yaml"), str(recipes)]
    assert list(load_families(both, {"dictionary.n_latents": 71})) == ["wide", "narrow"]
    assert load_families(both, {"dictionary.n_latents": 71})["wide"].dictionary.n_latents == 71
    (recipes / "wide-more.yaml").write_text(json.dumps(recipe_values))
    assert list(load_families([str(recipes)], {})) == ["narrow", "wide", "wide-more"]
    twin = tmp_path / "wide.yaml"
    twin.write_text(json.dumps(recipe_values))
    with pytest.raises(ValueError, match=r"wide.yaml: expected distinct file names, .*Rename one"):
        load_families([str(recipes), str(twin)], {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected a directory with recipes"):
        load_families([str(tmp_path / "empty")], {})
    with pytest.raises(ValueError, match="got none"):
        load_families([], {})


@pytest.mark.parametrize(("key", "option"), [("seed", "--seeds"), ("out_dir", "--out")])
def test_keys_that_compare_sets_are_refused_as_overrides(recipes, key, option):
    with pytest.raises(ValueError, match=rf"{key}: compare sets it.*{option}"):
        compare_recipes([str(recipes)], {key: 1})


def test_a_failing_run_is_named(recipes, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("loss: not finite.")

    monkeypatch.setattr(compare_module, "train_recipe", fail)
    monkeypatch.setattr(compare_module, "run_harvest", lambda *_: None)
    with pytest.raises(ValueError, match=r"narrow/seed-0: loss: not finite\."):
        compare_recipes([str(recipes)], {}, out=str(tmp_path / "out"))


def test_means_ranges_and_best(judged):
    directories = {
        "a": [judged("a", 0, fvu=0.25), judged("a", 1, fvu=0.5), judged("a", 2, fvu=0.75)],
        "b": [judged("b", 0, fvu=0.125, l0_mean=4.9), judged("b", 1, fvu=0.125), judged("b", 2, fvu=0.125, kl_spliced=0.1)],
        "c": [
            judged("c", 0, ce_recovered_mean=0.9, fvu=0.0625),
            judged("c", 1, ce_recovered_mean=0.9, fvu=math.nan),
            judged("c", 2, fvu=0.1875),
        ],
        "d": [judged("d", seed, selection="oracle", fvu=0.0, ce_recovered_mean=1.0) for seed in range(3)],
    }
    comparison = collect_run_groups(directories)
    a, b, c, d = comparison["families"]
    about_a = {"mean": 0.5, "min": 0.25, "max": 0.75, "values": [0.25, 0.5, 0.75], "seed_sd": 0.25, "interval_over": "seeds"}
    assert a["figures"]["fvu"].items() >= about_a.items()
    assert b["figures"]["l0_mean"]["mean"] == pytest.approx(14.9 / 3)
    about_c = {"mean": 0.125, "min": 0.0625, "max": 0.1875, "values": [0.0625, None, 0.1875]}
    assert {key: c["figures"]["fvu"][key] for key in about_c} == about_c
    assert [family["selection"] for family in (a, d)] == ["per token", "oracle"]
    # Not the oracle, not who is undefined for a seed, not where all are equal, and never l0.
    assert comparison["best"] == {"fvu": ["b"], "ce_recovered_mean": ["c"], "kl_spliced": ["b"]}
    head, *rows = recipes_summary(comparison)
    assert head == ["mean over seeds", *(column.label for column in COLUMNS)]
    assert rows[0][-1] == "1,001"
    assert [row[:2] for row in rows] == [["a", "0.5"], ["b", "0.125*"], ["c", "0.125"], ["d (oracle)", "0"]]


def test_equal_best_values_are_best_together(judged):
    figures = {"a": 0.25, "b": 0.25, "c": 0.5}
    comparison = collect_run_groups({name: [judged(name, 0, fvu=fvu)] for name, fvu in figures.items()})
    assert comparison["best"] == {"fvu": ["a", "b"]}


def test_a_figure_no_report_has_is_not_measured():
    (report,) = [{key: value for key, value in REPORT.items() if not key.startswith(("ce_", "kl_"))}]
    figures = summarize("a", [report, report | {"fvu": None}], COLUMNS)["figures"]
    assert "kl_spliced" not in figures
    assert figures["fvu"]["values"] == [0.25, None]


def test_reports_on_other_tokens_do_not_compare(judged):
    directories = {"a": [judged("a", 0)], "b": [judged("b", 0, tokens=509)]}
    with pytest.raises(ValueError, match=r"b/seed-0/report.json: tokens: expected 1,013 as in .*a/seed-0/report.json, got 509"):
        collect_run_groups(directories)


def test_speed_is_the_median_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert training_speed(metrics) is None
    metrics.write_text("")
    assert training_speed(metrics) is None
    metrics.write_text("".join(json.dumps({"tokens_per_second": rate}) + "\n" for rate in (3.0, 1000.0, 1100.0, 1050.0, 2.0)))
    assert training_speed(metrics) == 1000.0


def test_page_shows_every_family_once_with_mean_and_range(judged):
    table = Table(
        render_recipes(
            collect_run_groups(
                {
                    "plain": [judged("plain", 0, fvu=0.25), judged("plain", 1, fvu=0.5)],
                    "none": [judged("none", 0, kl_spliced=None, fvu=math.nan), judged("none", 1, kl_spliced=None)],
                    "gradient": [judged("gradient", 0, selection="oracle: gradient", fvu=0.1) for _ in range(1)],
                },
                live={"none"},
            )
        )
    )
    head, *rows = table.rows
    assert [cell[0] for cell in head] == ["run group", *(column.label for column in COLUMNS)]
    assert [row[0][0] for row in rows] == ["plain", "none", "gradient"]
    assert table.cell("plain", "fvu") == ["0.375", "0.250\u20130.500"]
    assert table.cell("none", "fvu") == ["0.250", "1 of 2 seeds"]
    assert table.cell("none", "kl_spliced") == ["undefined"]
    assert table.cell("plain", "dead_fraction") == ["0"]
    assert table.cell("plain", "tokens_per_second") == ["1,001"]
    assert [any("streamed from the model" in text for text in row[0]) for row in rows] == [False, True, False]
    assert "oracle: gradient" in rows[2][0]
    assert not any("oracle" in text for row in rows[:2] for text in row[0])
    assert all("gradient \u2020" in plot for plot in table.plots)
    assert len(table.plots) == len(PLOTS)
    assert "None" not in table.text
    assert "nan" not in table.text.lower().split()


def test_page_without_model_says_not_measured(judged, tmp_path):
    directory = judged("a", 0)
    kept = {key: value for key, value in REPORT.items() if not key.startswith(("ce_", "kl_"))}
    (directory / "report.json").write_text(json.dumps(kept))
    table = Table(render_recipes(collect_run_groups({"a": [directory]})))
    assert table.cell("a", "kl_spliced") == ["not measured"]
    assert len(table.plots) == len(PLOTS) - 2


def test_page_is_self_contained_safe_and_the_same_each_time(judged):
    attack = '<script>alert(1)</script>"onload="x'
    changes = {"hook": attack, "model": attack, "encoder": attack, "selection": attack}
    comparison = collect_run_groups({"a": [judged("a", 0, **changes)], "b": [judged("b", 0)]})
    comparison["families"][1]["name"] = attack
    html = render_recipes(comparison)
    assert html == render_recipes(comparison)
    assert len(re.findall("<script>", html)) == 1
    assert attack not in html
    assert not re.search(r"@import|@font-face|<link|<iframe|<img", html)
    for name, value in Table(html).attributes:
        assert name != "onload"
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", html))
    assert "Content-Security-Policy" in html


def test_many_families_keep_looks_and_colours_apart(judged):
    names = [f"family-with-a-rather-long-$name$-{index}" for index in range(13)]
    assert len(names) <= math.lcm(len(FAMILY_COLORS), len(MARKERS))
    html = render_recipes(
        collect_run_groups({name: [judged(name, 0, l0_mean=4.0 + index)] for index, name in enumerate(names)})
    )
    table = Table(html)
    assert [row[0][0] for row in table.rows[1:]] == names
    plots = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    # Whole in both legends; in the other plots long names are broken into lines.
    assert all(plots.count(f">{name}<") == 2 for name in names)
    # Whatever colour stayed in a plot would be drawn the same on a dark page.
    assert not re.findall(r"(?:fill|stroke): #\w+", plots)
    assert {f"var(--family-{index})" for index in range(11)} <= set(re.findall(r"var\(--family-\d+\)", plots))


def test_the_command_prints_the_table_and_the_page(monkeypatch, capsys, judged):
    given = {}

    def instead(recipes, overrides, seeds, out, against, match_l0):
        given.update(recipes=recipes, overrides=overrides, seeds=seeds, out=out)
        return collect_run_groups({"[narrow]": [judged("narrow", 0)]}) | {"page_path": "there/comparison.html"}

    monkeypatch.setattr("sparsary.eval.compare.run.compare_recipes", instead)
    arguments = "compare recipes lr=2e-3 more.yaml --seeds 2 --out there dictionary.encoder.k=3"
    monkeypatch.setattr("sys.argv", ["sparsary", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    assert ended.value.code == 0
    overrides = {"lr": 2e-3, "dictionary.encoder.k": 3}
    assert given == {"recipes": ["recipes", "more.yaml"], "overrides": overrides, "seeds": 2, "out": "there"}
    printed = capsys.readouterr().out
    assert "[narrow]" in printed
    assert "1,001" in printed
    assert "report: there/comparison.html" in printed


@pytest.mark.parametrize(
    ("arguments", "message"), [("nowhere.yaml", "expected a recipe file"), ("recipes --seeds 0", "--seeds")]
)
def test_errors_are_one_message_and_status_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["sparsary", "compare", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("sparsary: ")
    assert message in said
    assert "Traceback" not in said
