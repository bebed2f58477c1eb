"""Models as people have them: objects in memory, wrappers of other libraries, and hooks in another spelling."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsary
from sparsary.training import transformer_lens_hooks
from sparsary.training.activations.memory_models import beneath, held, hold
from sparsary.training.recipe import check_recipe
from sparsary.training.resolve_hooks import resolve_recipes


@pytest.fixture(scope="module")
def chats(load_beside):
    return load_beside("tiny_chats")


@pytest.fixture(scope="module")
def module(chats):
    return chats.chat_module("gpt2")


@pytest.fixture(scope="module")
def tokenizer(chats):
    return chats.chat_tokenizer()


def recipe(tmp_path, **dictionary):
    (tmp_path / "a.txt").write_text("\n\n".join(f"number {n} and then {n * n}" for n in range(200)))
    return {
        "text": {"source": "files", "files": [str(tmp_path / "a.txt")], "context_length": 16},
        "harvest": {"exclude_leading": 2, "heldout": 0.3, "live_buffer_tokens": 200},
        "dictionary": {"hook": "transformer.h.1:out", "n_latents": 24, "encoder": {"name": "topk", "k": 4}} | dictionary,
        "tokens": 200,
        "batch_tokens": 50,
        "out_dir": str(tmp_path / "run"),
        "eval_tokens": 100,
    }


def test_a_model_in_memory_is_known_by_its_weights(chats, module, tokenizer, tmp_path, no_page):
    run = sparsary.train(recipe(tmp_path), model=module, tokenizer=tokenizer)
    provenance = json.loads((run / "dictionary.json").read_text())["provenance"]
    name, content = provenance["model"]["id"], provenance["content"]["model"]
    assert name == f"memory:GPT2LMHeadModel@{content['parameters'][:16]}"
    report = sparsary.evaluate(run, model=module, tokenizer=tokenizer)
    assert not any("weights changed" in doubt for doubt in report["doubts"])
    # While the program has the model, its name is enough.
    assert sparsary.evaluate(run, cache=False)["fvu"] == report["fvu"]
    other = chats.chat_module("gpt2")
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 0.5
    changed = sparsary.evaluate(run, model=other, tokenizer=tokenizer, out=tmp_path / "other")
    assert any("its weights changed" in doubt for doubt in changed["doubts"])
    assert changed["fvu"] != report["fvu"]
    with pytest.raises(ValueError, match=r"model: its weights changed"):
        sparsary.train(recipe(tmp_path) | {"tokens": 400}, model=other, tokenizer=tokenizer)


def test_a_model_that_is_gone_is_told(chats, tokenizer):
    name = hold(chats.chat_module("gpt2"), tokenizer)
    gc.collect()
    with pytest.raises(ValueError, match=r"model.id: memory:.* of another program, or one that is gone.*--model DIRECTORY"):
        held(name)
    assert held("gpt2") is None


def test_models_are_found_beneath_wrappers(module, tokenizer):
    bridge = nn.Module()
    bridge.original_model, bridge.tokenizer = module, tokenizer
    envoy = SimpleNamespace(_module=module, tokenizer=tokenizer)
    adapted = nn.Module()
    adapted.get_base_model = lambda: module
    twice = SimpleNamespace(_module=bridge)
    for wrapper in (bridge, envoy, twice):
        assert beneath(wrapper) == (module, tokenizer)
    assert beneath(adapted, tokenizer) == (module, tokenizer)
    assert beneath(module, tokenizer) == (module, tokenizer)


def test_models_that_cannot_be_used_are_told(module, tokenizer):
    with pytest.raises(
        ValueError, match=r"model: expected a causal language model of transformers.*got Linear, which has none"
    ):
        beneath(nn.Linear(2, 2), tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer: expected the model's tokenizer"):
        beneath(module)
    with torch.device("meta"):
        empty = type(module)(module.config)
    with pytest.raises(ValueError, match=r"expected loaded weights, got GPT2LMHeadModel without them.*dispatch=True"):
        beneath(empty, tokenizer)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.1.hook_resid_post", "transformer.h.1:out"),
        ("blocks.2.hook_resid_pre", "transformer.h.2:in"),
        ("blocks.0.hook_mlp_out", "transformer.h.0.mlp:out"),
        ("blocks.1.attn.hook_z", "transformer.h.1.attn.c_proj:in"),
        ("blocks.1.mlp.hook_post", "transformer.h.1.mlp.c_proj:in"),
    ],
)
def test_hooks_of_transformer_lens_are_read_as_the_model_s_own(module, tokenizer, tmp_path, caplog, monkeypatch, theirs, ours):
    monkeypatch.setattr(transformer_lens_hooks, "_told", [])
    model = sparsary.LanguageModel.from_pretrained(module, tokenizer)
    several = [check_recipe(recipe(tmp_path, hook=theirs) | {"model": {"id": "x"}}, "recipe") for _ in range(2)]
    with caplog.at_level("INFO"):
        found = resolve_recipes(several, model)
    assert [member.recipe.dictionary.hook for member in found] == [ours] * 2
    assert found[0].recipe.harvest.hooks == (ours,)
    assert f"{theirs}: read as {ours}." in caplog.text
    assert caplog.text.count("center_writing_weights") == 1


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.7.hook_resid_post", r"expected 0 to 2, as the model has 3 blocks, got 7"),
        ("blocks.1.ln2.hook_normalized", r"dictionary.hook: expected a module path and a side"),
        ("blocks.1.hook_mlp_in", r"dictionary.hook: expected a module path and a side"),
    ],
)
def test_places_that_a_model_does_not_have_are_told(module, tokenizer, tmp_path, hook, message):
    model = sparsary.LanguageModel.from_pretrained(module, tokenizer)
    with pytest.raises(ValueError, match=message):
        resolve_recipes([check_recipe(recipe(tmp_path, hook=hook) | {"model": {"id": "x"}}, "recipe")], model)
