"""The mixture by hand: the expert of each task is found, and switching it off takes its task and leaves the other."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparsary
from sparsary.eval.circuits.compared_units import components, experts
from sparsary.eval.circuits.known.mixture import ASK, ITEMS, MARKS, known_mixture
from sparsary.eval.circuits.methods import METHODS
from sparsary.eval.circuits.scoring.roc import roc_auc
from sparsary.eval.circuits.units.ablation import ablation_values
from sparsary.eval.circuits.units.nodes import NodeSpace


@pytest.fixture(scope="module")
def known():
    return known_mixture()


@pytest.fixture(scope="module")
def space(known):
    return NodeSpace(known.model, experts(known.model))


def of_task(known, space, task):
    return torch.tensor([name == known.experts[task] for name in space.names()])


@pytest.mark.parametrize("method", ["frequency", "exact", "attribution"])
@pytest.mark.parametrize("task", ["a", "b"])
def test_the_expert_of_a_task_ranks_first(known, space, task, method):
    found = METHODS[method]().discover(space, known.pairs[task])
    truth = of_task(known, space, task)
    assert (len(truth), int(truth.sum())) == (16, 1)
    assert roc_auc(found.values, truth) == 1.0
    assert found.values[truth] > found.values[~truth].max() + 0.3 * (method != "attribution")
    if method == "frequency":
        assert (found.cost.forwards, found.cost.backwards) == (2, 0)
        # The mark is read at every position, and there is none in the corrupted prompt.
        assert float(found.values[truth]) == 1.0


def test_one_off_takes_one_task_and_leaves_the_other(known, space):
    for task, other in (("a", "b"), ("b", "a")):
        kept = ~of_task(known, space, task)
        values = {}
        for name, pairs in known.pairs.items():
            off = ablation_values(space, "zero", pairs)(pairs)
            logits = space.run(pairs.clean, kept, off)
            values[name] = float(pairs.right(logits).mean()), float(pairs.measure(logits).mean())
            whole = space.run(pairs.clean, torch.ones(16), off)
            assert torch.equal(whole, known.model.logits(pairs.clean))
            assert float(pairs.right(whole).mean()) == 1.0
        assert values[task] == (0.0, pytest.approx(0.0, abs=1e-6))
        assert values[other] == (1.0, pytest.approx(1.0, abs=1e-4))


def test_half_an_expert_has_half_its_odds(known, space):
    pairs = known.pairs["a"].take([0])
    off = ablation_values(space, "zero", pairs)(pairs)
    share = torch.where(of_task(known, space, "a"), 0.5, 1.0).requires_grad_(True)
    router, seen = known.model.find(space.parts[1].hook_out)[0], []
    with torch.enable_grad():
        # Behind the hook of the run, which is registered in it.
        inner = router.register_forward_pre_hook(
            lambda *_: seen.append(router.register_forward_hook(lambda _, _args, output: seen.append(output[0])))
        )
        measured = pairs.measure(space.run(pairs.clean, share, off)).sum()
        inner.remove()
        seen[0].remove()
    whole = known.model.activations(pairs.clean, (space.parts[1].hook_out,))[space.parts[1].hook_out][0]
    change = (seen[-1] - whole).detach()
    assert change[:, 3].tolist() == pytest.approx([torch.tensor(0.5).log().item()] * 3, abs=1e-5)
    assert (change[:, [0, 1, 2, 4, 5, 6, 7]] == 0).all()
    assert torch.autograd.grad(measured, share)[0].isfinite().all()


def test_units_that_always_write_have_no_frequency(known):
    with pytest.raises(ValueError, match=r"frequency: a0: expected units that are active or silent"):
        METHODS["frequency"]().discover(NodeSpace(known.model, components(known.model)), known.pairs["a"])


def test_experts_of_a_model_in_memory_are_compared_without_a_dictionary(known, tmp_path):
    words = [*MARKS, *(f"i{item}" for item in range(ITEMS)), "ask"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="none"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="none")
    pairs, file = known.pairs["a"], tmp_path / "a.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                {"clean": clean, "corrupted": corrupted, "answers": list(q.answers), "foils": list(q.foils), "task": "next"}
            )
            + "\n"
            for clean, corrupted, ((q),) in zip(pairs.clean.tolist(), pairs.corrupted.tolist(), pairs.questions, strict=True)
        )
    )
    assert words[ASK] == "ask"
    settings = sparsary.CircuitSettings(
        tasks=(str(file),), methods=("frequency", "exact"), units=("experts", "components"), ablation="zero", pairs=20
    )
    found = sparsary.circuits(settings=settings, model=known.model.module, tokenizer=tokenizer, out=tmp_path / "out")
    rows = {(row["family"], row["method"]): row for row in found["rows"]}
    assert set(rows) == {(family, method) for family in ("heads and MLPs", "experts") for method in ("frequency", "exact")}
    for method in ("frequency", "exact"):
        row = rows["experts", method]
        assert (row["units"], row["nodes_80"], row["faithfulness_80"]) == (16, 1, pytest.approx(1.0, abs=1e-3))
    assert "active or silent" in rows["heads and MLPs", "frequency"]["refused"]
    page = (tmp_path / "out" / "circuits.html").read_text(encoding="utf-8")
    assert "experts" in page
    with pytest.raises(ValueError, match=r"--units latents: expected a CHECKPOINT"):
        sparsary.circuits(
            settings=sparsary.CircuitSettings(units=("latents",)), model=known.model.module, tokenizer=tokenizer, out=tmp_path
        )
    with pytest.raises(ValueError, match=r"--units: expected .*experts.*got 'expert'"):
        sparsary.CircuitSettings(units=("expert",))
    with pytest.raises(ValueError, match=r"--units experts: expected a model that has them, got none in embedded"):
        sparsary.circuits(settings=sparsary.CircuitSettings(units=("experts",)), model="embedded", out=tmp_path)
