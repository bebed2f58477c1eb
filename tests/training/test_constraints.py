"""Averaged weights, aligned encoders, and the penalty on overlapping decoder directions."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sparsary
from sparsary.sae import ENCODERS, SAE, losses
from sparsary.sae.losses import overlap
from sparsary.sae.ranks import UNDIVIDED
from sparsary.training import loop
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.fused_adam import FusedAdam
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.training.optim import DictionaryAdam, align_, averages
from sparsary.training.phases import Phases
from sparsary.training.recipe import check_recipe

D, LATENTS, BATCH, STEPS = 7, 23, 40, 12
OPTIMIZERS = pytest.mark.parametrize("optimizer", [DictionaryAdam, FusedAdam], ids=["plain", "fused"])


@pytest.fixture
def rows():
    torch.manual_seed(3)
    return torch.randn(BATCH * STEPS, D)


def values(**changes):
    section = {"n_latents": LATENTS, "encoder": {"name": "topk", "k": 3}} | changes.pop("dictionary", {})
    recipe = {"dictionary": section, "tokens": BATCH * STEPS, "batch_tokens": BATCH, "lr_warmup_steps": 0, "lr": 0.02}
    return recipe | {"save_every": 5} | changes


def steps_of(optimizer, count, **changes):
    """Weights after each of some steps, and the optimizer."""
    recipe = check_recipe(values(**changes) | {"out_dir": "never", "harvest": {"hooks": ["a:out"]}}, "recipe")
    torch.manual_seed(7)
    sae = SAE(D, LATENTS, ENCODERS["topk"](k=3))
    made = optimizer(sae, Phases(sae, recipe), recipe)
    objective, found = Objective(sae, 7.0, AuxSettings(0.0, 3)), []
    usage = LatentUsage(torch.zeros(LATENTS, dtype=torch.bool), torch.zeros(LATENTS).double())
    for _ in range(count):
        objective(ActivationBatch(torch.randn(BATCH, D)), usage)[0].backward()
        made.step()
        made.zero_grad()
        found.append({name: p.detach().clone() for name, p in sae.named_parameters()})
    return found, made, sae


def with_hook(**section):
    return {"dictionary": {"hook": "a:out"} | section}


@OPTIMIZERS
def test_averages_are_a_plain_mean_and_then_an_exponential_one(optimizer):
    if optimizer is FusedAdam:
        pytest.importorskip("numba")
    found, made, sae = steps_of(optimizer, 9, weight_average=0.75, **with_hook())
    expected = {name: tensor.double() for name, tensor in found[0].items()}
    for step, weights in enumerate(found[1:], 2):
        for name, mean in expected.items():
            mean.lerp_(weights[name].double(), max(0.25, 1 / step))
            if name == "W_dec":
                mean.copy_(F.normalize(mean, dim=-1))
    kept = averages(sae, made)
    assert kept.keys() == expected.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tensor, found[-1][name], atol=1e-3), name


def test_averaging_changes_the_checkpoint_and_not_the_training(rows, tmp_path):
    plain = sparsary.train(values(), rows, out_dir=str(tmp_path / "plain"))
    averaged = sparsary.train(values(weight_average=0.9), rows, out_dir=str(tmp_path / "averaged"))
    states = [load_file(folder / "state.safetensors") for folder in (plain, averaged)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    own = load_file(averaged / "dictionary.safetensors")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(own[name], states[1][f"optimizer/dictionary/{name}/average"])
        assert not torch.equal(own[name], states[1][f"dictionary/{name}"])
    torch.testing.assert_close(own["W_dec"].norm(dim=-1), torch.ones(LATENTS))


def test_a_resumed_run_has_the_averages_of_one_that_was_not_stopped(rows, tmp_path, monkeypatch, assert_same_tensors):
    recipe = values(weight_average=0.9, dictionary={"encoder": {"name": "batch_topk", "k": 3}, "orthogonality": 0.1})
    whole = sparsary.train(recipe, rows, out_dir=str(tmp_path / "whole"))
    step, taken = loop.step, []

    def stopping(*arguments):
        if len(taken) == 8:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments)

    monkeypatch.setattr(loop, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        sparsary.train(recipe, rows, out_dir=str(tmp_path / "stopped"))
    monkeypatch.undo()
    # The last state is that of step 5; its loadable dictionary holds the averages too.
    early = load_file(tmp_path / "stopped" / "dictionary.safetensors")
    assert torch.equal(
        early["W_enc"], load_file(tmp_path / "stopped" / "state.safetensors")["optimizer/dictionary/W_enc/average"]
    )
    again = sparsary.train(recipe, rows, out_dir=str(tmp_path / "stopped"))
    assert_same_tensors(sparsary.load(again), sparsary.load(whole))


@OPTIMIZERS
def test_aligned_encoders_stay_so_at_every_step(optimizer):
    if optimizer is FusedAdam:
        pytest.importorskip("numba")
    found, made, sae = steps_of(optimizer, 5, weight_average=0.5, **with_hook(aligned=True))
    for weights in (*found, averages(sae, made)):
        torch.testing.assert_close((weights["W_enc"] * weights["W_dec"]).sum(-1), torch.ones(LATENTS), rtol=0, atol=1e-5)
    free, _, _ = steps_of(optimizer, 5, **with_hook())
    assert ((free[-1]["W_enc"] * free[-1]["W_dec"]).sum(-1) - 1).abs().max() > 0.01


def test_aligning_moves_a_row_by_the_least():
    """To the nearest point of the plane <e, d> = 1: along d only, and not at all if it is on it."""
    torch.manual_seed(0)
    W_enc, W_dec = (torch.randn(LATENTS, D, dtype=torch.float64) for _ in range(2))
    moved = W_enc.clone()
    align_(moved, W_dec)
    torch.testing.assert_close((moved * W_dec).sum(-1), torch.ones(LATENTS, dtype=torch.float64))
    along = F.normalize(W_dec, dim=-1)
    step = moved - W_enc
    torch.testing.assert_close(step, (step * along).sum(-1, keepdim=True) * along)
    again = moved.clone()
    align_(again, W_dec)
    torch.testing.assert_close(again, moved)


def test_only_saes_with_their_own_encoder_are_aligned():
    for section in ({"encoder": {"name": "matching_pursuit", "k": 3}}, {"kind": "transcoder"}):
        recipe = values(dictionary={"aligned": True} | section)
        with pytest.raises(ValueError, match=r"dictionary\.aligned: expected it with kind sae"):
            sparsary.train(recipe, [(torch.randn(50, 5), torch.randn(50, 5))], out_dir="nowhere")
    later = {"start": 0.5, "encoder": {"name": "topk", "k": 2}}
    with pytest.raises(ValueError, match="weight_average: expected 0 with phases"):
        sparsary.train(values(weight_average=0.9, phases=[later]), torch.randn(50, 5), out_dir="nowhere")


def brute(atoms, order, groups):
    total = 0.0
    for group in order.tensor_split(groups):
        for i in group:
            cosines = [F.cosine_similarity(atoms[i], atoms[j], dim=0) for j in group if j != i]
            total = total + torch.stack(cosines).pow(2).max()
    return total / len(atoms)


def test_overlap_is_the_squared_cosine_with_the_nearest_of_a_group(monkeypatch):
    torch.manual_seed(0)
    atoms = torch.randn(11, D, dtype=torch.float64, requires_grad=True)
    for size, step in ((1024, 3), (4, 3), (4, 4)):
        monkeypatch.setattr(losses, "OVERLAP_GROUP", size)
        order = torch.randperm(11, generator=torch.Generator().manual_seed(step))
        wanted, found = brute(atoms, order, math.ceil(11 / size)), overlap(atoms, step, UNDIVIDED)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(each, atoms)[0] for each in (found, wanted)))
        assert torch.autograd.gradcheck(lambda atoms, step=step: overlap(atoms, step, UNDIVIDED), atoms)
    assert float(overlap(atoms, 3, UNDIVIDED).detach()) != float(overlap(atoms, 5, UNDIVIDED).detach())
    assert float(overlap(atoms[:1], 0, UNDIVIDED).detach()) == 0
    assert float(overlap(torch.eye(5), 0, UNDIVIDED)) == 0


def test_the_penalty_keeps_directions_apart_and_draws_no_random_numbers(rows, tmp_path):
    found = {}
    for weight in (0.0, 3.0):
        recipe = values(dictionary={"orthogonality": weight}, tokens=100 * BATCH, log_every=10)
        folder = sparsary.train(recipe, rows, out_dir=str(tmp_path / str(weight)))
        found[weight] = float(overlap(sparsary.load(folder).W_dec.detach(), 0, UNDIVIDED))
        log = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        assert ('"overlap"' in log) == (weight > 0)
    assert found[3.0] < 0.9 * found[0.0]
    sae = SAE(D, LATENTS, ENCODERS["topk"](k=3))
    usage = LatentUsage(torch.zeros(LATENTS, dtype=torch.bool), torch.zeros(LATENTS).double(), step=6)
    before = torch.get_rng_state()
    _, terms = Objective(sae, 7.0, AuxSettings(0.0, 3, orthogonality=0.5))(ActivationBatch(rows[:BATCH]), usage)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(terms.named["overlap"], 0.5 * overlap(sae.W_dec, 6, UNDIVIDED).detach())
