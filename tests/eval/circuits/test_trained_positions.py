"""Positions of prompts that training left out are counted, and the dictionary is judged on the prompts."""

from pathlib import Path

import pytest
import torch

from sparsary.eval.checkpoint import LoadedCheckpoint, LoadedDictionary
from sparsary.eval.circuits.compared_units import ComparedCheckpoint
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.trained_positions import prompt_fit
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.metrics import RunningFvu
from sparsary.training.recipe import ModelSection
from sparsary.transcoders.load import NO_OPTIONS

HOOK = "transformer.h.2:out"


@pytest.fixture(scope="module")
def pairs(embedded_model):
    return make_pairs("ioi", embedded_model, 9, seed=0)


def checkpoint(harvest):
    torch.manual_seed(3)
    dictionary = SAE(128, 70, ENCODERS["topk"](k=5)).eval().requires_grad_(False)
    member = LoadedDictionary(Path("runs/a"), dictionary, {} if harvest is None else {"harvest": harvest}, ())
    opened = LoadedCheckpoint("runs/a", Path("runs/a"), (member,), False, False, NO_OPTIONS)
    return ComparedCheckpoint("runs/a", {HOOK: dictionary}, {HOOK: HOOK}, ModelSection(), opened)


def test_nothing_left_out_is_no_doubt(embedded_model, pairs):
    (row,), doubts = prompt_fit(embedded_model, checkpoint({"exclude_leading": 0, "exclude_special": False}), pairs)
    assert doubts == []
    assert row["positions"] == int(pairs.lengths.sum())
    assert (row["positions_left_out"], row["fvu_left_out"]) == (0, None)
    x = embedded_model.activations(pairs.clean, (HOOK,))[HOOK][pairs.valid]
    expected = RunningFvu(128)
    expected.update(x, checkpoint({}).by_hook[HOOK](x))
    assert row["fvu"] == pytest.approx(float(expected.value()), rel=1e-5)


def test_other_libraries_files_say_nothing(embedded_model, pairs):
    assert prompt_fit(embedded_model, checkpoint(None), pairs)[1] == []


@pytest.mark.parametrize("leading", [1, 4, 100])
def test_leading_positions_are_counted(embedded_model, pairs, leading):
    (row,), (doubt,) = prompt_fit(embedded_model, checkpoint({"exclude_leading": leading, "exclude_special": False}), pairs)
    missing = int(pairs.lengths.clamp(max=leading).sum())
    assert row["positions_left_out"] == missing
    assert (doubt.asked, doubt.had) == (int(pairs.lengths.sum()), int(pairs.lengths.sum()) - missing)
    assert doubt.doubtful
    assert f"fvu {row['fvu']:.4f} at {HOOK}" in str(doubt)
    assert row["fvu_left_out"] is not None or leading == 1


def test_special_tokens_are_counted_once(embedded_model, pairs):
    special = torch.isin(pairs.clean, torch.tensor(embedded_model.tokenizer.all_special_ids)) & pairs.valid
    (row,), doubts = prompt_fit(embedded_model, checkpoint({"exclude_leading": 0, "exclude_special": True}), pairs)
    assert row["positions_left_out"] == int(special.sum())
    assert len(doubts) == bool(special.any())
