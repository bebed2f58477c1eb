"""Supervised dictionaries of the indirect-object task: exact cases, and interventions on the embedded model."""

import json

import numpy as np
import pytest
import torch

from sparsary.eval.probing.ioi import score as supervised
from sparsary.eval.probing.ioi.prompts import PromptPlan, Prompts, PromptWords, draw_plans
from sparsary.eval.probing.ioi.score import greedy_edit, score_supervised, supervised_table
from sparsary.eval.probing.ioi.supervised import (
    cross_section,
    end_logits,
    least_squares_dictionary,
    logit_difference,
    mean_dictionary,
)
from sparsary.eval.probing.subject import probe_target
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder

SOURCE = {
    "hook": "transformer.h.2:out",
    "model": {"id": "embedded", "device": "cpu"},
    "text": {"source": "embedded", "context_length": 64},
    "harvest": {"heldout": 0.05},
}


def sae_of(atoms, threshold=0.0):
    """ReLU latents that read along their atoms."""
    dictionary = SAE(atoms.shape[1], atoms.shape[0], build_encoder({"name": "relu"}))
    with torch.no_grad():
        dictionary.W_dec.copy_(atoms)
        dictionary.W_enc.copy_(atoms)
        dictionary.b_enc.fill_(-threshold)
    return dictionary.eval()


@pytest.fixture(scope="module")
def exact(embedded_model):
    """A dictionary without error: every dimension, with either sign."""
    return probe_target(sae_of(torch.cat([torch.eye(128), -torch.eye(128)])), embedded_model, SOURCE)


@pytest.fixture(scope="module")
def words(embedded_model):
    return PromptWords.of(embedded_model, 12)


def factorial(n):
    """Every combination of two of n names and an order, and activations that are sums of one vector for each value."""
    cells = [(io, s, pos) for io in range(n) for s in range(n) for pos in (0, 1)]
    io, s, pos = (np.array(column) for column in zip(*cells, strict=True))
    prompts = Prompts(
        torch.zeros(len(cells), 2, dtype=torch.long), torch.zeros(len(cells), 4, dtype=torch.long), io, s, pos, torch.arange(n)
    )
    torch.manual_seed(0)
    parts = {"io": torch.randn(n, 4, 7), "s": torch.randn(n, 4, 7), "pos": torch.randn(2, 4, 7)}
    x = 3 + sum(parts[name][torch.from_numpy(prompts.values(name))] for name in parts)
    return prompts, x, parts


def test_in_a_balanced_design_means_are_least_squares_and_exact():
    prompts, x, parts = factorial(5)
    means, least = mean_dictionary(x, prompts), least_squares_dictionary(x, prompts)
    assert torch.allclose(means.reconstruct(prompts), x, atol=1e-4)
    assert torch.allclose(least.reconstruct(prompts), x, atol=1e-4)
    for name, part in parts.items():
        assert torch.allclose(means.features[name], part - part.mean(0), atol=1e-4)
        assert torch.allclose(least.features[name], means.features[name], atol=1e-3)
    # Where attributes correlate, only least squares stay exact.
    some = torch.from_numpy((prompts.io + prompts.s) % 4 > 0) | (torch.from_numpy(prompts.pos) == 0)
    rows = some.numpy()
    fewer = Prompts(
        prompts.token_ids[some], prompts.places[some], prompts.io[rows], prompts.s[rows], prompts.pos[rows], prompts.name_ids
    )
    assert torch.allclose(least_squares_dictionary(x[some], fewer).reconstruct(fewer), x[some], atol=1e-3)
    assert not torch.allclose(mean_dictionary(x[some], fewer).reconstruct(fewer), x[some], atol=1e-1)


def test_greedy_edits_take_the_nearest_step_and_stop_when_none_helps():
    writes = torch.eye(3)
    source, target = torch.tensor([[1.0, 0, 5]]), torch.tensor([[1.0, 3, 1]])
    wanted = target @ writes - source @ writes
    added, chosen = greedy_edit(source, target, writes, wanted, 1)
    assert (chosen.tolist(), added.tolist()) == ([[2]], [[0, 0, -4]])
    added, chosen = greedy_edit(source, target, writes, wanted, 4)
    assert (chosen.tolist(), added.tolist()) == ([[2, 1, -1, -1]], wanted.tolist())
    added, chosen = greedy_edit(source, target, writes, -wanted, 2)
    assert (chosen.tolist(), added.abs().sum().item()) == ([[-1, -1]], 0)
    # A step of 3 towards something 1 away ends farther off.
    added, chosen = greedy_edit(source, torch.tensor([[4.0, 0, 5]]), writes, torch.tensor([[1.0, 0, 0]]), 1)
    assert (chosen.tolist(), added.abs().sum().item()) == ([[-1]], 0)
    added, chosen = greedy_edit(source, source, writes, wanted, 2)
    assert (chosen.tolist(), added.abs().sum().item()) == ([[-1, -1]], 0)


def test_prompts_are_what_their_plans_say(words, exact):
    prompts = words.prompts([PromptPlan(2, 7, 0, 0, 0, 0, 0), PromptPlan(2, 7, 1, 1, 1, 3, 4)])
    names = [words.names[2], words.names[7]]
    for row, places, order in zip(prompts.token_ids, prompts.places, ("IO first", "S first"), strict=True):
        text = exact.model.tokenizer.convert_ids_to_tokens(row.tolist())
        assert [text[place] for place in places[:3]] == [names[0], names[1], names[1]]
        assert text[places[3]] == "to"
        assert (places[0] < places[1]) == (order == "IO first")
        assert places.min() >= 8
    assert logit_difference(end_logits(exact, prompts), prompts).min() > 1
    changed = PromptPlan(2, 7, 0, 0, 0, 0, 0).changed("s", 3)
    assert (changed.s, changed.io) == (3, 2)
    plans = draw_plans(words, 50, 0, [1, 2, 3])
    assert {plan.io for plan in plans} <= {1, 2, 3}
    assert all(plan.io != plan.s for plan in plans)
    assert plans == draw_plans(words, 50, 0, [1, 2, 3])


def test_replaced_positions_are_those_asked_for(words, exact):
    prompts = words.prompts(draw_plans(words, 5, 1))
    x = cross_section(exact, prompts)
    plain = end_logits(exact, prompts)
    assert torch.allclose(end_logits(exact, prompts, (0, 1, 2, 3), x), plain, atol=1e-4)
    # Another prompt's END decides whom the model names.
    other = x.flip(0)
    found = end_logits(exact, prompts, (3,), other).argmax(-1)
    assert found.tolist() == plain.flip(0).argmax(-1).tolist()


@pytest.fixture(scope="module")
def judged(exact):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "EDIT_SIZES", (2, 6, 256))
        patch.setattr(supervised, "CROSS_SECTIONS", {"end": (3,), "names": (0, 1)})
        return score_supervised(exact, n_names=12, fit_prompts=200, scored_prompts=32, edit_prompts=12)


def test_a_dictionary_without_error_is_sufficient_and_necessary(judged):
    report, rows = judged
    assert report["supervised_accuracy"] == 1
    assert report["supervised_end_latents_sufficiency"] == pytest.approx(1, abs=1e-3)
    # What it leaves is nothing, and the mean takes its place.
    assert report["supervised_end_latents_necessity"] == pytest.approx(1, abs=1e-3)
    assert report["supervised_end_mean_features_sufficiency"] > 0.7
    # By then the names' own positions have been read.
    assert report["supervised_names_latents_sufficiency"] is None
    assert "moves the logit difference by" in report["supervised_names_latents_why"]
    json.dumps([report, rows], allow_nan=False)
    head, lines = supervised_table(report)
    assert all(len(line) == len(head) for line in lines)


def test_editing_everything_is_the_true_patch_and_no_edit_is_not(judged):
    report, _ = judged
    assert report["supervised_edit_io_end_latents_256"] == 1
    assert report["supervised_edit_io_end_no_edit"] == 0
    assert report["supervised_edit_io_end_latents_2"] <= report["supervised_edit_io_end_latents_6"] <= 1
    assert report["supervised_edit_io_end_mean_features"] > 0.4
    assert report["supervised_edit_io_end_random_latents"] < 0.5
    assert "changes no prediction" in report["supervised_edit_s_end_why"]


def test_latents_that_are_the_attributes_are_found(embedded_model):
    """A dictionary of the mean features at END: one latent for every name that is IO there."""
    words = PromptWords.of(embedded_model, 8)
    base = probe_target(sae_of(torch.eye(128)), embedded_model, SOURCE)
    prompts = words.prompts(draw_plans(words, 600, 5))
    x = cross_section(base, prompts)[:, 3]
    # Each latent reads whether its name is IO, by least squares, and fires when that is likelier than not.
    wanted = torch.nn.functional.one_hot(torch.from_numpy(prompts.io), 8).float()
    reader = torch.linalg.lstsq(x - x.mean(0), wanted - wanted.mean(0)).solution.T
    dictionary = sae_of(reader)
    with torch.no_grad():
        dictionary.b_dec.copy_(x.mean(0))
        dictionary.b_enc.copy_(wanted.mean(0) - 0.5)
    subject = probe_target(dictionary, embedded_model, SOURCE)
    codes = supervised.prompt_codes(subject, cross_section(subject, prompts))
    fresh = words.prompts(draw_plans(words, 300, 6))
    found = supervised._interpretability(prompts, fresh, codes, supervised.prompt_codes(subject, cross_section(subject, fresh)))
    assert found["supervised_end_io_f1"] > 0.9
    assert found["supervised_end_io_detected"] == 1
    assert found["supervised_end_io_split"] == 1
    assert found["supervised_end_io_latents_interpreted"] >= 7
    assert found["supervised_end_s_f1"] < 0.5


def test_a_dead_dictionary_is_judged_without_nan(embedded_model, monkeypatch):
    monkeypatch.setattr(supervised, "CROSS_SECTIONS", {"end": (3,)})
    dead = probe_target(sae_of(torch.eye(128)[:13], threshold=1e6), embedded_model, SOURCE)
    report, rows = score_supervised(dead, n_names=8, fit_prompts=80, scored_prompts=16, edit_prompts=8)
    assert report["supervised_l0"] == 0
    assert report["supervised_end_io_f1"] == 0
    assert report["supervised_edit_io_end_latents_16"] == report["supervised_edit_io_end_no_edit"]
    json.dumps([report, rows], allow_nan=False)


def test_a_dictionary_that_writes_elsewhere_is_refused(exact):
    elsewhere = exact.provenance | {"hooks_in": ["transformer.h.2.mlp:in"], "hooks_out": ["transformer.h.2.mlp:out"]}
    with pytest.raises(ValueError, match="--task supervised: expected a dictionary that maps the activation"):
        score_supervised(probe_target(exact.dictionary, exact.model, elsewhere))
