"""How long latents had been silent when training ended: in the checkpoint, for whoever loads, converts, judges or describes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import sparsary
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.files import read_tensors
from sparsary.sae.hub import files_of
from sparsary.sae.training_usage import USAGE_FILE, TrainingUsage
from sparsary.transcoders.convert import convert

GOLDEN = Path(__file__).parents[1] / "golden"


def usage_of(directory):
    return sparsary.load(directory).training_usage


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of seven latents, of which two were silent for long and one for all of the training."""
    dictionary = SAE(5, 7, ENCODERS["topk"](k=2))
    silent_for = torch.tensor([0, 100, 999, 1000, 0, 5000, 10])
    dictionary.training_usage = TrainingUsage(silent_for, dead_after_tokens=1000, tokens=5000)
    dictionary.save(tmp_path / "saved", {"training_tokens": 5000})
    return tmp_path / "saved"


@pytest.mark.parametrize(("dead_after", "window"), [(500, 500), (10**7, 3030)])
def test_a_training_leaves_what_its_state_counted(write_recipe, recipe_values, dead_after, window):
    recipe_values |= {"dead_after_tokens": dead_after}
    recipe_values["dictionary"] |= {"encoder": {"name": "topk", "k": 2}}
    rows = torch.randn(3030, 11, generator=torch.Generator().manual_seed(0))
    run = sparsary.train(write_recipe(recipe_values), activations=rows.split(101))
    state = read_tensors(run / "state.safetensors")[0]["silent_for"]
    usage = usage_of(run)
    assert torch.equal(usage.silent_for, state)
    assert (usage.dead_after_tokens, usage.tokens, usage.window_tokens) == (dead_after, 3030, window)
    assert torch.equal(usage.dead, state >= window)
    # Beside the weights, which are as they were without it.
    assert "silent_for" not in read_tensors(run / "dictionary.safetensors")[0]
    (line,) = [value for name, value in sparsary.info(run).lines if name == "dead in training"]
    assert f"{usage.dead_fraction:.2%}, silent for {window:,} tokens" in line


def test_dead_is_silent_for_the_window(saved):
    usage = usage_of(saved)
    assert usage.dead.tolist() == [False, False, False, True, False, True, False]
    assert usage.dead_fraction == pytest.approx(2 / 7)


def test_it_outlives_saving_converting_and_uploading(saved, tmp_path):
    sparsary.load(saved).save(tmp_path / "again", {"training_tokens": 5000})
    convert(saved, tmp_path / "converted")
    for folder in ("again", "converted"):
        assert torch.equal(usage_of(tmp_path / folder).silent_for, usage_of(saved).silent_for)
        assert files_of(tmp_path / folder) == ["dictionary.safetensors", "dictionary.json", USAGE_FILE]
    (tmp_path / "grid").mkdir()
    shutil.copytree(saved, tmp_path / "grid" / "a")
    SAE(5, 7, ENCODERS["topk"](k=2)).save(tmp_path / "grid" / "b")
    assert f"a/{USAGE_FILE}" in files_of(tmp_path / "grid")
    assert f"b/{USAGE_FILE}" not in files_of(tmp_path / "grid")


@pytest.mark.parametrize("damage", ["gone", "cut", "of another save", "of other latents", "in another type"])
def test_a_missing_or_older_file_costs_nothing_else(saved, damage, caplog):
    path = saved / USAGE_FILE
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        silent_for = torch.zeros(8 if damage == "of other latents" else 7, dtype=torch.long)
        TrainingUsage(silent_for, 1000, 4000 if damage == "of another save" else 5000).save(saved)
    if damage == "in another type":
        from safetensors.torch import save_file

        save_file({"silent_for": torch.zeros(7)}, path, {"dead_after_tokens": "1000", "tokens": "5000"})
    dictionary = sparsary.load(saved)
    assert dictionary.n_latents == 7
    assert dictionary.training_usage is None
    assert str(path) in caplog.text


def test_a_dictionary_saved_where_a_trained_one_was_does_not_inherit_it(saved, caplog):
    SAE(5, 7, ENCODERS["topk"](k=2)).save(saved)
    assert usage_of(saved) is None
    assert not caplog.text


def test_other_dictionaries_have_none():
    for name in ("topk-none", "saelens-topk"):
        if (GOLDEN / name).exists():
            assert usage_of(GOLDEN / name) is None


def test_a_report_has_dead_latents_of_both_windows(saved, tmp_path):
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    report = sparsary.evaluate(saved, activations=rows)
    assert (report["dead_training_fraction"], report["dead_training_window_tokens"]) == (pytest.approx(2 / 7), 1000)
    assert report["dead_window_tokens"] == 20
    page = (saved / "report.html").read_text()
    assert "in the last 1,000 of training: 0.2857" in page
    SAE(5, 7, ENCODERS["topk"](k=2)).save(tmp_path / "bare")
    bare = sparsary.evaluate(tmp_path / "bare", activations=rows)
    assert bare["dead_training_fraction"] is None
    assert USAGE_FILE in bare["reasons"]["dead_training_fraction"]
    tile = (tmp_path / "bare" / "report.html").read_text().split('data-key="dead_fraction"')[1].partition("</div></div>")[0]
    assert "undefined" not in tile
    assert json.loads((tmp_path / "bare" / "report.json").read_text())["dead_training_window_tokens"] is None
