"""What goes wrong at a first try is said by the dry run, and what it left behind is no obstacle to the next."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsary.sae.files import read_json
from sparsary.training.activations.shards import ActivationStore
from sparsary.training.embedded.corpus import embedded_document
from sparsary.training.locks import require_writable
from sparsary.training.preflight import preflight
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import run_harvest, train_recipe


def resolved(values):
    return resolve_recipe(check_recipe(values, "recipe"))


def documents(path, number=60, key="text"):
    rows = [json.dumps({key: embedded_document(1, each).text}) + "\n" for each in range(number)]
    path.write_text("".join(rows))
    return str(path)


def changed(values, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        values = values[parent]
    values[last] = value


@pytest.fixture
def values(recipe_values, tmp_path):
    """The small recipe on a file."""
    recipe_values["text"] |= {"source": "files", "files": [documents(tmp_path / "text.jsonl")]}
    recipe_values["harvest"]["tokens"] = 2500
    return recipe_values | {"tokens": 1010}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("text.files", ["nowhere.jsonl"]), r"text\.files: nowhere\.jsonl does not exist"),
        (("text.column", "words"), r"text\.jsonl:1: expected a JSON object with the key 'words'"),
        (("text.files", ["text.csv"]), r"text\.files: expected \.txt, \.json, \.jsonl, \.parquet, got text\.csv"),
        (
            ("text.context_length", 10_000),
            r"expected tokens to train on, got none from 60 documents \(\d+ held out\) in contexts of 10000 tokens",
        ),
        (("batch_tokens", 5000), r"batch_tokens: expected at most the \d+ training tokens of the store, got 5000"),
        (("out_dir", "/proc/nowhere/run"), r"out_dir: /proc/nowhere/run cannot be written"),
        (("out_dir", "text.jsonl/run"), r"out_dir: text\.jsonl/run cannot be written \(Not a directory\)"),
        (("out_dir", "n" * 300), r"out_dir: n+ cannot be written \(File name too long\)"),
        (("harvest.store", "text.jsonl"), r"harvest\.store: text\.jsonl cannot be written \(Not a directory\)"),
        (("harvest.store", "thesis"), r"harvest\.store: thesis: expected an empty directory or a store"),
        (("out_dir", "thesis"), r"out_dir: thesis: expected an empty directory or a run"),
        (("model.id", "no/model"), r"model\.id: 'no/model' could not be loaded"),
    ],
    ids=lambda change: str(change)[:50],
)
def test_a_dry_run_says_what_would_go_wrong(values, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    values |= {"model": {}, "tokens": 5000}
    changed(values, *change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        preflight(resolved(values))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_everything_at_once(values):
    values["text"]["files"] = ["nowhere.jsonl"]
    values["out_dir"] = "/proc/nowhere/run"
    with pytest.raises(ValueError, match="out_dir") as caught:
        preflight(resolved(values))
    assert len(str(caught.value).splitlines()) == 2


def test_a_dry_run_finds_another_run_in_out_dir(values):
    train_recipe(resolved(values))
    with pytest.raises(ValueError, match="got another run"):
        preflight(resolved(values | {"lr": 2e-3}))


def test_a_text_that_is_gone_is_no_matter_once_it_is_harvested(values):
    run_harvest(resolved(values))
    Path(values["text"]["files"][0]).unlink()
    assert preflight(resolved(values)).text is None
    train_recipe(resolved(values))


def test_a_folder_that_can_be_written_stays_as_it_is(tmp_path):
    require_writable(tmp_path / "a" / "b", "out_dir")
    require_writable(tmp_path, "out_dir")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["dtype", "exclude_leading", "heldout"])
def test_a_store_that_a_failed_harvest_left_empty_is_taken_over(values, key):
    good = values["text"]["files"]
    values["text"]["files"] = ["nowhere.jsonl"]
    with pytest.raises(ValueError, match="does not exist"):
        run_harvest(resolved(values))
    assert (Path(values["harvest"]["store"]) / "manifest.json").exists()
    values["text"]["files"] = good
    values["harvest"][key] = {"dtype": "float16", "exclude_leading": 3, "heldout": 0.2}[key]
    store = run_harvest(resolved(values))
    assert store.manifest["complete"]
    assert ActivationStore.open(values["harvest"]["store"]).tokens("train") > 1000
    train_recipe(resolved(values))


def test_a_run_without_a_step_is_taken_over(values, monkeypatch):
    from sparsary.training import run

    def fails(*_arguments):
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_loop", fails)
        with pytest.raises(ValueError, match="no"):
            train_recipe(resolved(values))
    assert (Path(values["out_dir"]) / "recipe.yaml").exists()
    directory = train_recipe(resolved(values | {"lr": 2e-3}))
    assert "lr: 0.002" in (directory / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match="got another run"):
        train_recipe(resolved(values))


# Longer runs.


def final(directory):
    return load_file(Path(directory) / "state.safetensors")


@pytest.mark.parametrize("live", [False, True])
def test_a_finished_run_is_made_longer(values, caplog, live):
    if live:
        values["harvest"] |= {"store": None, "live_buffer_tokens": 900}
    first = train_recipe(resolved(values))
    before = final(first)
    with caplog.at_level(logging.INFO):
        assert train_recipe(resolved(values | {"tokens": 2020})) == first
    assert "at step 10. tokens was raised from 1,010 to 2,020. lr, 50.0% of its peak so far, continues at" in caplog.text
    provenance = read_json(first / "dictionary.json")["provenance"]
    assert (provenance["training_tokens"], provenance["training_steps"]) == (2020, 20)
    assert provenance["lengthened"] == [[10, 1010]]
    assert not torch.equal(before["dictionary/W_dec"], final(first)["dictionary/W_dec"])
    steps = [json.loads(line)["step"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20]
    # And once more, after which a shorter one is another run.
    train_recipe(resolved(values | {"tokens": 2500}))
    assert read_json(first / "dictionary.json")["provenance"]["lengthened"] == [[10, 1010], [20, 2020]]
    # The state says how long the run was to be: a kill may have come before a longer run's first state, or a digit flipped.
    recipe, whole = first / "recipe.yaml", (first / "recipe.yaml").read_text()
    assert "\ntokens: 2500\n" in whole
    recipe.write_text(whole.replace("\ntokens: 2500\n", "\ntokens: 1010\n"))
    with pytest.raises(ValueError, match=r"tokens: 2500 there, 1010 here"):
        train_recipe(resolved(values))


def test_an_interrupted_run_that_is_made_longer_is_the_longer_run(values, stopped_after, tmp_path):
    # Nothing but the decay at the end depends on the length.
    with stopped_after(4):
        train_recipe(resolved(values))
    longer = train_recipe(resolved(values | {"tokens": 2020}))
    whole = train_recipe(resolved(values | {"tokens": 2020, "out_dir": str(tmp_path / "whole")}))
    assert torch.equal(final(longer)["dictionary/W_dec"], final(whole)["dictionary/W_dec"])


def test_a_run_past_a_phase_that_would_begin_later_is_not_made_longer(values):
    values["phases"] = [{"start": 0.5, "encoder": {"name": "topk", "k": 3}}]
    train_recipe(resolved(values))
    with pytest.raises(
        ValueError, match=r"in phase 1, which begins at step 15 of 3,030 tokens\. Train from scratch in another"
    ):
        train_recipe(resolved(values | {"tokens": 3030}))
    # What was refused has changed nothing.
    train_recipe(resolved(values))
    train_recipe(resolved(values | {"tokens": 1212}))
