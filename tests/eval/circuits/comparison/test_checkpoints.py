"""Circuits of two checkpoints: exchanged weights against copied ones, and a model of which two parts were trained."""

import copy
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsary.eval.circuits.compared_units import components
from sparsary.eval.circuits.comparison.checkpoints import _exchanged, changed_units, require_same_architecture
from sparsary.eval.circuits.comparison.scored_task import score_task
from sparsary.eval.circuits.known import ToyConfig, ToyTransformer
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.tasks import make_pairs
from sparsary.eval.circuits.units.nodes import NodeSpace
from sparsary.training.activations.model import LanguageModel

ROOT = Path(__file__).parents[4]
# Units of a GPT-2 whose weights are changed.
HEAD, MLP = "a1/1", "m0"
WIDTH, HEAD_WIDTH = 12, 6


def changed(model, head=True, mlp=True):
    """A copy with other weights in one head and one MLP."""
    module = copy.deepcopy(model.module)
    draw = torch.Generator().manual_seed(5)

    def noise(tensor):
        return torch.randn(tensor.shape, generator=draw) * 0.3

    attention, own = module.transformer.h[1].attn, slice(HEAD_WIDTH, 2 * HEAD_WIDTH)
    with torch.no_grad():
        if head:
            for side in range(3):
                columns = slice(side * WIDTH + own.start, side * WIDTH + own.stop)
                attention.c_attn.weight[:, columns] += noise(attention.c_attn.weight[:, columns])
        if mlp:
            for parameter in module.transformer.h[0].mlp.parameters():
                parameter += noise(parameter)
    return LanguageModel(module, None, "changed", None)


def scored(model, pairs, name):
    space = NodeSpace(model, components(model))
    halves = pairs.take(slice(0, len(pairs) // 2)), pairs.take(slice(len(pairs) // 2, len(pairs)))
    return score_task(name, model.id, space, *halves, METHODS["exact"]())


@pytest.mark.parametrize("unit", [HEAD, MLP])
def test_exchanged_weights_are_what_copying_them_does(tiny_model, some_pairs, unit):
    base, pairs = tiny_model("gpt2"), some_pairs(8)
    one = changed(base, head=unit == HEAD, mlp=unit == MLP)
    tasks = [scored(model, pairs, name) for model, name in ((base, "base"), (one, "tuned"))]
    space, judged = tasks[0].space, tasks[0].judged_on
    units = torch.ones(space.size, dtype=torch.bool)
    with torch.no_grad():
        metrics = [judged.measure(model.run(judged.clean)).double().numpy() for model in (base, one)]
    # One unit differs, so that giving it to the base model makes the changed model, and the other way round.
    for run, donor, expected in ((0, 1, metrics[0] - metrics[1]), (1, 0, metrics[1] - metrics[0])):
        drops = _exchanged(tasks[run], tasks[donor], units)
        at = space.names().index(unit)
        assert drops[:, at] == pytest.approx(expected, abs=1e-5)
        assert np.abs(expected).max() > 1e-3
        assert np.abs(np.delete(drops, at, 1)).max() < 1e-6


def test_of_two_changed_units_both_and_no_others_have_an_effect(tiny_model, some_pairs):
    base, pairs = tiny_model("gpt2"), some_pairs(12)
    tasks = [scored(model, pairs, name) for model, name in ((base, "base"), (changed(base), "tuned"))]
    row = changed_units(*tasks, n_random=3)
    moved = {unit["unit"]: abs(unit["exchanged"]) for unit in row["units"]}
    assert len(moved) == tasks[0].space.size
    assert {name for name, effect in moved.items() if effect > 1e-6} == {HEAD, MLP}
    # Others gain by what they read.
    assert sum(abs(unit["gain"]) > 1e-5 for unit in row["units"]) > 2
    statuses = {unit["status"] for unit in row["units"]}
    assert statuses <= {"gained", "lost", "kept", "in neither"}
    assert row["units"] == sorted(row["units"], key=lambda unit: (-abs(unit["exchanged"]), -abs(unit["gain"])))


def test_a_model_against_itself_has_changed_nothing(tiny_model, some_pairs):
    base, pairs = tiny_model("gpt2"), some_pairs(8)
    tasks = [scored(model, pairs, name) for model, name in ((base, "base"), (base, "tuned"))]
    row = changed_units(*tasks, n_random=2)
    assert {unit["exchanged"] for unit in row["units"]} == {0.0}
    assert {unit["gain"] for unit in row["units"]} == {0.0}
    assert "ablated" not in row
    assert not any(unit["gain_beyond_ceiling"] for unit in row["units"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 3}, "equal layers, got 2 and 3"),
        ({"n_heads": 2}, "equal heads per layer, got 4 and 2"),
        ({"d_model": 64}, "equal width, got 32 and 64"),
    ],
)
def test_models_whose_units_do_not_correspond_are_refused(changes, said):
    base = ToyConfig(2, 4, 32, 8, 7, 4, 1, d_mlp=16)
    models = [LanguageModel(ToyTransformer(config), None, "toy", None) for config in (base, replace(base, **changes))]
    with pytest.raises(ValueError, match=rf"--model: expected two checkpoints of one model, with {said}"):
        require_same_architecture(*models)


def test_models_with_other_tokenizers_are_refused(tiny_model):
    base = tiny_model("gpt2")
    one = LanguageModel(base.module, LanguageModel.from_pretrained("embedded", device="cpu").tokenizer, "other", None)
    with pytest.raises(ValueError, match="equal tokenizer, got another"):
        require_same_architecture(base, one)


@pytest.fixture(scope="module")
def study():
    """The study whose figures are in docs/circuit_comparison.md; it imports results.py, which stands beside it."""
    folder = ROOT / "docs" / "studies"
    spec = importlib.util.spec_from_file_location("circuit_comparison_study", folder / "circuit_comparison.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        before = set(sys.modules)
        spec.loader.exec_module(module)
        for name in set(sys.modules) - before & {"results"}:
            sys.modules.pop(name, None)
    return module


def test_two_parts_that_were_trained_rank_first_and_no_others_changed(study, tmp_path):
    base = LanguageModel.from_pretrained("embedded", device="cpu")
    lines = study.gift_lines(260, 0)
    files = [study.write_lines(tmp_path / f"{name}.jsonl", some) for name, some in (("a", lines[60:]), ("b", lines[:60]))]
    taught, pairs = (make_pairs(file, base, None) for file in files)
    tuned = study.fine_tuned(base, taught, steps=100)
    free = {f"a{study.LAYER}/{study.HEAD}", f"m{study.MLP}"}
    tasks = [scored(model, pairs, name) for model, name in ((base, "base"), (tuned, "tuned"))]
    row = changed_units(*tasks, n_random=5)
    assert {unit["unit"] for unit in row["units"][:2]} == free
    truth = torch.tensor([unit["unit"] in free for unit in row["units"]])
    assert roc_auc(torch.tensor([abs(unit["exchanged"]) for unit in row["units"]]), truth) == 1.0
    for unit in row["units"]:
        assert unit["exchanged_beyond_ceiling"] == (unit["unit"] in free)
    assert {unit["status"] for unit in row["units"][:2]} == {"gained"}
    # The base model is at chance, and says so.
    assert row["size_base"] == 0
    assert "equal within noise" in row["doubts"][0]
    assert row["ablated"]["lost"] > 0.9
    assert row["put"]["closed"] > 0.8
    assert row["put"]["accuracy_after"] > row["put"]["accuracy_before"]
