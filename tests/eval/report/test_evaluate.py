"""From a checkpoint to its report."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsary
from sparsary.eval.checkpoint import folders
from sparsary.eval.metrics.document_sums import STATISTICS, read_sums
from sparsary.eval.pages.glossary import EXPLANATIONS
from sparsary.eval.report.evaluate import evaluate, evaluate_all
from sparsary.eval.report.summary import report_summary
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.files import read_json
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import train_recipe
from sparsary.training.stages import StageProgress


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    values = {
        "text": {"context_length": 32},
        "harvest": {"hooks": ["transformer.h.2:out"], "tokens": 8000, "store": str(folder / "store")},
        "dictionary": {"hook": "transformer.h.2:out", "n_latents": 131, "encoder": {"name": "topk", "k": 8}},
        "tokens": 16_000,
        "batch_tokens": 400,
        "lr": 3e-3,
        "lr_warmup_steps": 5,
        "out_dir": str(folder / "run"),
        "eval_tokens": 4000,
    }
    return train_recipe(resolve_recipe(check_recipe(values, "recipe")))


@pytest.fixture(scope="module")
def report(checkpoint):
    return evaluate(str(checkpoint))


def test_the_report_is_flat_finite_json(checkpoint, report):
    saved = read_json(checkpoint / "report.json")
    assert saved == {key: value for key, value in report.items() if key != "report_path"}
    for key, value in saved.items():
        assert key == "reasons" or isinstance(value, str | int | float | bool | None | list), key
        if isinstance(value, float):
            assert math.isfinite(value), key
    assert (checkpoint / "report.html").read_text().lower().startswith("<!doctype html>")


def test_the_figures_hang_together(report):
    assert report["fvu"] == pytest.approx(report["fvu_total"], rel=1e-9)
    assert 0 < report["fvu_nonlinear"] <= report["fvu_total"] < 0.6
    assert report["l0_mean"] <= 8
    assert report["ce_clean"] < report["ce_spliced"] < report["ce_zero"]
    assert 0.5 < report["ce_recovered_zero"] < 1
    assert report["tokens"] >= 2000
    assert report["dark_matter_fit_tokens"] >= 2000
    assert report["documents"] > 20
    assert report["text"] == "embedded"
    assert "fvu" in dict(report_summary(report))


def test_the_sums_by_document_hold_the_report_s_figures(checkpoint, report, tmp_path, no_page):
    sums = read_sums(checkpoint)
    assert len(sums["documents"]) == report["documents"]
    for key, statistic in STATISTICS.items():
        totals = {name: values.sum() for name, values in sums.items()}
        assert statistic(totals) == pytest.approx(report[key], rel=1e-9), key
    # Also where everything is taken from the cache, and never an older report's.
    (tmp_path / "documents.safetensors").write_bytes(b"of another report")
    evaluate(str(checkpoint), str(tmp_path))
    again = read_sums(tmp_path)
    assert all(np.array_equal(values, again[name]) for name, values in sums.items())


def test_the_report_says_who_was_dead_when_training_ended(checkpoint, report):
    usage = sparsary.load(checkpoint).training_usage
    assert report["dead_training_fraction"] == usage.dead_fraction
    # dead_after_tokens is more than the training had.
    assert report["dead_training_window_tokens"] == usage.tokens == report["training_tokens"]
    assert f"{usage.dead_fraction:.2%} on the training's last" in dict(report_summary(report))["latents"]
    assert report["seed"] == 0
    assert len(report["recipe_digest"]) == 16


def test_the_model_s_own_sparsity_is_measured_without_passes_of_its_own(checkpoint, report, monkeypatch, no_page, tmp_path):
    from sparsary.eval import heldout
    from sparsary.eval.metrics.native_sparsity import NativeSparsity
    from sparsary.eval.report import on_model as suite
    from sparsary.training.activations.model import load_model

    assert "NewGELUActivation" in report["reasons"]["mlp_active_share"]
    passes = []

    def with_relus(section):
        model = load_model(section)
        for block in model.module.transformer.h:
            block.mlp.act = torch.nn.ReLU()
        model.module.register_forward_hook(lambda *_: passes.append(1))
        return model

    monkeypatch.setattr(heldout, "load_model", with_relus)
    counts = []
    for groups in ((*suite.GROUPS[:2], suite.GROUPS[5]), (*suite.GROUPS[:2], suite.GROUPS[5], NativeSparsity)):
        monkeypatch.setattr(suite, "GROUPS", groups)
        passes.clear()
        found = evaluate(str(checkpoint), str(tmp_path / "x"), tokens=900, cache=False)
        counts.append(len(passes))
    assert counts[0] == counts[1] > 0
    assert len(found["mlp_active_share"]) == 4
    assert all(0 < share < 1 for share in found["mlp_active_share"])


def test_evaluating_twice_gives_the_same(checkpoint, report, tmp_path, no_page):
    again = evaluate(str(checkpoint), str(tmp_path / "elsewhere"))
    assert {k: v for k, v in again.items() if k != "report_path"} == {k: v for k, v in report.items() if k != "report_path"}
    assert (tmp_path / "elsewhere" / "report.json").exists()


def test_the_mean_ablation_and_the_regression_use_other_documents_than_the_score(checkpoint, monkeypatch, no_page):
    from sparsary.eval import heldout

    seen = []
    pieces = heldout.text_batches

    def spy(*arguments):
        owners = set()
        seen.append(owners)
        for piece in pieces(*arguments):
            owners |= piece.documents
            yield piece

    monkeypatch.setattr(heldout, "text_batches", spy)
    evaluate(str(checkpoint), str(checkpoint / "x"), tokens=1500, cache=False)
    fitted, scored = seen
    assert fitted
    assert scored
    assert not fitted & scored


def test_tensors_are_judged_without_a_model(tmp_path, no_page):
    torch.manual_seed(0)
    SAE(6, 23, ENCODERS["topk"](k=4)).save(tmp_path / "d")
    with pytest.raises(ValueError, match=r"activations=x"):
        evaluate(str(tmp_path / "d"))
    report = evaluate(str(tmp_path / "d"), activations=torch.randn(500, 6))
    assert report["tokens"] == 250
    assert "ce_clean" not in report
    assert report_summary(report)
    for rows, message in (
        (torch.full((9, 6), torch.nan), "expected finite numbers"),
        (torch.randn(9, 7), "expected width 6, the dictionary's d_in, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(str(tmp_path / "d"), activations=rows)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evaluate(str(tmp_path / "d"), activations=torch.randn(1, 6))


def test_a_dictionary_of_another_width_is_refused(checkpoint, tmp_path):
    config = json.loads((checkpoint / "dictionary.json").read_text())
    SAE(6, 23, ENCODERS["topk"](k=4)).save(tmp_path / "d", config["provenance"])
    with pytest.raises(ValueError, match=r"/d: transformer\.h\.2:out: expected width 6, the dictionary's d_in, got 128"):
        evaluate_all([str(checkpoint), str(tmp_path / "d")], tokens=600)


def test_without_heldout_documents_there_is_nothing_to_judge_on(checkpoint, tmp_path):
    config = json.loads((checkpoint / "dictionary.json").read_text())
    (tmp_path / "t.txt").write_text("The war lasted from the year 1732 to the year 1741.")
    config["provenance"]["text"] |= {"source": "files", "files": [str(tmp_path / "t.txt")]}
    from sparsary.sae import load_dictionary

    load_dictionary(checkpoint).save(tmp_path / "d", config["provenance"])
    with pytest.raises(ValueError, match=r"expected held-out documents, got none\. Raise harvest\.heldout"):
        evaluate(str(tmp_path / "d"))


@pytest.fixture(scope="module")
def rivals(checkpoint, tmp_path_factory):
    """Two more dictionaries of the same model and text, one at another hook."""
    config = json.loads((checkpoint / "dictionary.json").read_text())
    folder = tmp_path_factory.mktemp("rivals")
    torch.manual_seed(7)
    other = {key: ["transformer.h.1:out"] for key in ("hooks_in", "hooks_out")} | {"hook": "transformer.h.1:out"}
    for name, k, changes in (("narrow", 3, {}), ("earlier", 5, other)):
        SAE(128, 67, ENCODERS["topk"](k=k)).save(folder / name, config["provenance"] | changes)
    return [str(folder / name) for name in ("narrow", "earlier")]


def figures(report):
    return {key: value for key, value in report.items() if key not in ("report_path", "checkpoint")}


def passes(monkeypatch):
    """Counts the forward passes of every model from here on."""
    from sparsary.training.activations.model import LanguageModel

    seen = []
    for name in ("activations", "run"):
        real = getattr(LanguageModel, name)

        def counted(*arguments, real=real, **options):
            seen.append(1)
            return real(*arguments, **options)

        monkeypatch.setattr(LanguageModel, name, counted)
    return seen


def test_judged_together_figures_are_those_of_judging_alone(checkpoint, rivals, monkeypatch, tmp_path, no_page):
    everyone = [str(checkpoint), *rivals]
    seen = passes(monkeypatch)
    alone = [evaluate(path, str(tmp_path / f"{i}"), tokens=700, cache=False) for i, path in enumerate(everyone)]
    apart = len(seen)
    seen.clear()
    together = evaluate_all(everyone, folders(everyone, str(tmp_path / "all")), 700, cache=False)
    assert [figures(report) for report in together] == [figures(report) for report in alone]
    # Alone: one pass per piece to fit; clean, spliced, three ablations and two parts of the error to score. Together the third
    # needs its own ablations for its hook; the second its splice and the parts.
    assert len(seen) < 0.7 * apart
    for path, report in zip(everyone, together, strict=True):
        assert report["checkpoint"] == path
        assert json.loads((tmp_path / "all" / Path(path).name / "report.json").read_text())["fvu"] == report["fvu"]


def test_folders_are_named_as_checkpoints_are_as_far_as_needed():
    assert folders(["runs/a"], None) == [None]
    assert folders(["runs/a"], "out") == ["out"]
    assert folders(["runs/a", "runs/b"], "out") == ["out/a", "out/b"]
    assert folders(["one/seed-0", "two/seed-0"], "out") == ["out/one-seed-0", "out/two-seed-0"]
    with pytest.raises(ValueError, match=r"runs/a: expected distinct checkpoints"):
        folders(["runs/a", "runs/a"], "out")


def test_what_was_measured_is_not_measured_again(rivals, monkeypatch, tmp_path, caplog, no_page):
    from sparsary.eval.report import on_model as suite

    path = rivals[0]
    first = evaluate(path, str(tmp_path / "1"), tokens=600)
    seen = passes(monkeypatch)
    real = suite.eval_data
    monkeypatch.setattr(suite, "eval_data", None)
    assert figures(evaluate(path, str(tmp_path / "2"), tokens=600)) == figures(first)
    assert seen == []
    monkeypatch.setattr(suite, "eval_data", real)

    # A new version of one group makes that one be measured again, without the splices of another.
    class Newer(suite.GROUPS[0]):
        version = 1000

    monkeypatch.setattr(suite, "GROUPS", (Newer, *suite.GROUPS[1:]))
    assert figures(evaluate(path, str(tmp_path / "3"), tokens=600)) == figures(first)
    without_splices = len(seen)
    seen.clear()
    evaluate(path, str(tmp_path / "4"), tokens=600, cache=False)
    assert 0 < without_splices < 0.5 * len(seen)
    # Other weights, other tokens, or a damaged file: measured.
    (damaged,) = (Path(path) / "eval_cache").glob("downstream-*")
    damaged.write_text("{")
    seen.clear()
    assert figures(evaluate(path, str(tmp_path / "5"), tokens=600)) == figures(first)
    assert seen
    assert "damaged; its metrics are recomputed" in caplog.text
    assert evaluate(path, str(tmp_path / "6"), tokens=100)["tokens"] < first["tokens"]


def test_options_reach_their_group_and_are_part_of_the_key(rivals, monkeypatch, tmp_path, no_page):
    from sparsary.eval.report import on_model as suite

    seen = []

    class Curious(suite.GROUPS[2]):
        name = "curious"

        def __init__(self, setting):
            seen.append(dict(setting.options))
            super().__init__(setting)

    monkeypatch.setattr(suite, "GROUPS", (*suite.GROUPS, Curious))
    for options in ({}, {"curious": {"ridge": 0.5}}, {"curious": {"ridge": 0.5}}, {}):
        evaluate_all([rivals[0]], [str(tmp_path)], 600, metric_options=options)
    assert seen == [{}, {"ridge": 0.5}]
    with pytest.raises(ValueError, match=r"metric_options: expected names among .*, curious, got 'curius'"):
        evaluate_all([rivals[0]], metric_options={"curius": {}})


def test_progress_goes_up_to_the_number_of_tokens(rivals, monkeypatch, tmp_path, no_page):
    told, update = [], StageProgress.update

    def recorded(stage, done, stats=None):
        told.append((stage.name, stage.total, done))
        update(stage, done, stats)

    monkeypatch.setattr(StageProgress, "update", recorded)
    evaluate(rivals[1], str(tmp_path), tokens=700)
    assert {entry[:2] for entry in told} == {("evaluation", 700)}
    done = [entry[2] for entry in told]
    assert done == sorted(done)
    assert done[-1] == 700
    assert len(done) > 3


def saved_like(checkpoint, directory, dictionary, **changes):
    config = json.loads((checkpoint / "dictionary.json").read_text())
    dictionary.save(directory, config["provenance"] | changes)
    return str(directory)


def test_a_dead_dictionary_is_judged_and_says_what_is_undefined(checkpoint, tmp_path):
    dead = SAE(128, 67, ENCODERS["topk"](k=5))
    with torch.no_grad():
        dead.b_enc.fill_(-1e6)
    report = evaluate(saved_like(checkpoint, tmp_path / "d", dead), tokens=600)
    saved = json.loads((tmp_path / "d" / "report.json").read_text(), parse_constant=pytest.fail)
    assert saved["dead_fraction"] == 1
    assert saved["effective_latents"] is None
    assert saved["reasons"]["effective_latents"] == "no latent fires"
    assert saved["reasons"].keys() == {key for key, value in saved.items() if value is None and key != "git_commit"}
    assert "no latent fires" in (tmp_path / "d" / "report.html").read_text()
    assert report_summary(report)


def test_text_without_tokens_that_count_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsary.eval.heldout.FRUITLESS_CONTEXTS", 16)
    config = json.loads((checkpoint / "dictionary.json").read_text())
    harvest = config["provenance"]["harvest"] | {"exclude_leading": 32}
    path = saved_like(checkpoint, tmp_path / "d", SAE(128, 67, ENCODERS["topk"](k=5)), harvest=harvest)
    with pytest.raises(ValueError, match=r"got none in 16 contexts: all are special or excluded\. Lower harvest.exclude"):
        evaluate(path)


def test_text_may_be_given_as_an_argument(checkpoint, tmp_path):
    for text in (tmp_path / "gone.txt", [str(tmp_path / "gone.txt")]):
        with pytest.raises(ValueError, match=r"gone\.txt"):
            evaluate(checkpoint, text=text)


def test_activations_that_are_not_finite_are_refused(checkpoint, rivals, monkeypatch, tmp_path):
    from sparsary.training.activations.model import LanguageModel

    real = LanguageModel.activations

    def overflowing(self, *arguments, **options):
        return {hook: x * torch.inf for hook, x in real(self, *arguments, **options).items()}

    monkeypatch.setattr(LanguageModel, "activations", overflowing)
    with pytest.raises(
        ValueError, match=r"transformer.h.2:out: expected finite activations, .* Evaluate it with model.dtype: float"
    ):
        evaluate(rivals[0], str(tmp_path), tokens=600, cache=False)


def test_contexts_with_a_token_that_is_not_finite_are_left_out_and_told(
    checkpoint, rivals, monkeypatch, tmp_path, caplog, no_page
):
    """A run that trained on such a model can be judged; whole contexts go, because nothing after such a token is finite."""
    from sparsary.training.activations.model import LanguageModel

    plain = evaluate(rivals[0], str(tmp_path / "plain"), tokens=900, cache=False)
    real, spoiled = LanguageModel.hooked, []

    @contextmanager
    def overflowing(self, readers):
        def spoiling(reader):
            def read(x):
                if x.shape[1] > 8 and len(spoiled) < 2:
                    x = x.clone()
                    x[0, 20, 3] = float("inf")
                    spoiled.append(x)
                return reader(x)

            return read

        with real(self, {hook: spoiling(reader) for hook, reader in readers.items()}):
            yield

    monkeypatch.setattr(LanguageModel, "hooked", overflowing)
    report = evaluate(rivals[0], str(tmp_path), tokens=900, cache=False)
    assert spoiled
    (line,) = report["skipped"]
    assert line.startswith("evaluation: tokens whose activations are not finite: ")
    assert "Excluded from the evaluation" in caplog.text
    assert "skipped" not in plain
    assert all(np.isfinite(value) for value in report.values() if isinstance(value, float))
    assert report["fvu"] == pytest.approx(plain["fvu"], rel=0.5)


GIVEN = {
    "array": lambda x: x.numpy(),
    "list of arrays": lambda x: [x[:100].numpy(), x[100:].double().numpy()],
    "DataLoader": lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=64),
    "generator": lambda x: (piece for piece in x.split(33)),
    "mapping": lambda x: {"x": x.numpy()},
}


@pytest.fixture(scope="module")
def judged_rows(checkpoint, tmp_path_factory):
    """Rows for the checkpoint, and the report of their tensor."""
    x = torch.randn(300, sparsary.load(str(checkpoint)).d_in, generator=torch.Generator().manual_seed(0))
    return x, evaluate(str(checkpoint), str(tmp_path_factory.mktemp("rows")), activations=x)


@pytest.mark.parametrize("kind", GIVEN)
def test_activations_in_whatever_holds_them_are_judged(checkpoint, judged_rows, tmp_path, kind, no_page):
    x, expected = judged_rows
    found = evaluate(str(checkpoint), str(tmp_path / "b"), activations=GIVEN[kind](x))
    assert found["fvu"] == pytest.approx(expected["fvu"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]


def test_few_documents_are_shared_by_the_halves_or_have_no_interval(checkpoint, tmp_path, no_page):
    config = json.loads((checkpoint / "dictionary.json").read_text())
    file = tmp_path / "t.txt"
    changes = {
        "text": config["provenance"]["text"] | {"source": "files", "files": [str(file)]},
        "harvest": config["provenance"]["harvest"] | {"heldout": 0.999},
    }
    path = saved_like(checkpoint, tmp_path / "d", SAE(128, 67, ENCODERS["topk"](k=5)), **changes)
    long = "Then Mary went to the store and gave a ring to Kevin because she was there. " * 30
    file.write_text(long)
    assert evaluate(path, tokens=400)["documents_shared"] == 1
    file.write_text(long + "\n\n" + long.replace("Mary", "Kevin"))
    report = evaluate(path, tokens=60)
    assert report["documents"] == 1
    assert report["ce_increase"] is not None
    assert report["ce_increase_low"] is None
    assert "at least two documents" in report["reasons"]["ce_increase_low"]


def test_every_entry_of_a_report_is_explained(report):
    known = {key for entries in EXPLANATIONS.values() for key in entries}
    assert {key for key in report if key != "report_path"} <= known


def test_the_command_judges_several(checkpoint, rivals, monkeypatch, capsys, tmp_path, no_page):
    arguments = ["eval", *rivals, "--out", str(tmp_path / "out"), "--tokens", "600", "--no-cache"]
    monkeypatch.setattr("sys.argv", ["sparsary", *arguments])
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in ("narrow", "earlier"):
        assert (tmp_path / "out" / name / "report.json").exists()
    assert printed.count("report: ") == 2


def test_the_map_of_the_error_is_fitted_as_the_command_says(checkpoint, monkeypatch, tmp_path, no_page):
    out = str(tmp_path / "out")
    arguments = ["eval", str(checkpoint), "--out", out, "--tokens", "600", "--no-cache"]
    reports = []
    for more in ([], ["--no-bias", "--ridge", "0.5", "--authors"], ["--ridge", "-1"]):
        monkeypatch.setattr("sys.argv", ["sparsary", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            sparsary.main()
        assert ended.value.code == (2 if "-1" in more else 0)
        reports.append(json.loads((tmp_path / "out" / "report.json").read_text()))
    usual, asked, _ = reports
    assert (usual["dark_matter_bias"], usual["dark_matter_ridge"]) == (True, 1e-6)
    assert (asked["dark_matter_bias"], asked["dark_matter_ridge"]) == (False, 0.5)
    assert asked["fvu_nonlinear"] != usual["fvu_nonlinear"]
    assert "authors_err_norm_r2" in asked
    assert "authors_err_norm_r2" not in usual
