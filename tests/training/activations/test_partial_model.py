"""Models loaded for some hooks only: the same activations from fewer weights, on many architectures."""

import logging
from types import SimpleNamespace

import pytest
import torch

from sparsary.training.activations.hidden_states import HookError
from sparsary.training.activations.model import LanguageModel, load_model, load_model_for, skeleton
from sparsary.training.activations.partial_model import NotLoaded, unneeded_modules
from sparsary.training.activations.sites import block_paths
from sparsary.training.recipe import ModelSection, check_recipe
from sparsary.training.resolve_hooks import resolve_recipe
from sparsary.training.run import run_harvest

# Attention, hybrids, experts, state spaces, shared layers and keys, positions and norms of several kinds.
KINDS = """
    arcee bamba bart bert biogpt bloom codegen cohere2 dbrx deepseek_v3 electra exaone4 falcon falcon_mamba gemma gemma2 gemma3
    gemma3_text glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoehybrid jamba lfm2 llama llama4_text mamba2
    minimax mistral mixtral nemotron nemotron_h olmo2 opt phi3 qwen2_moe qwen3 qwen3_5 qwen3_next recurrent_gemma stablelm
    starcoder2 xglm xlnet zamba zamba2
""".split()
# Whose code looks into blocks before it runs them.
WHOLE = ("big_bird", "falcon_h1", "rwkv")


@pytest.fixture(scope="module")
def tiny(load_beside):
    return load_beside("tiny_models")


@pytest.fixture
def saved(tiny, tmp_path):
    """Saves a tiny model and returns its section."""

    def save(kind, **changes):
        tiny.tiny_model(kind, **changes).save_pretrained(tmp_path / kind)
        tiny.tiny_tokenizer().save_pretrained(tmp_path / kind)
        return ModelSection(id=str(tmp_path / kind), device="cpu")

    return save


def early_hook(outline):
    """Hook behind the first block but one, or the first of few."""
    blocks = block_paths(outline.module)
    return f"{blocks[min(1, len(blocks) - 2)]}:out"


def left_out(model):
    return [part.path for part in model.module.modules() if isinstance(part, NotLoaded)]


def n_weights(model):
    return sum(parameter.numel() for parameter in model.module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_part_before_a_hook_computes_what_the_whole_model_computes(kind, saved):
    section = saved(kind)
    outline = skeleton(section)
    hook = early_hook(outline)
    whole, part = load_model(section), load_model_for(section, (hook,), outline)
    assert left_out(part)
    assert n_weights(part) < n_weights(whole)
    assert not any(parameter.is_meta for parameter in part.module.parameters())
    ids = torch.randint(4, 88, (3, 16))
    torch.testing.assert_close(part.activations(ids, (hook,)), whole.activations(ids, (hook,)))
    # Identity is that of the files.
    assert part.content() == whole.content()
    assert type(part.module).__name__ == type(whole.module).__name__


@pytest.mark.parametrize("kind", WHOLE)
def test_a_model_that_cannot_be_split_is_loaded_as_a_whole_and_says_so(kind, saved, caplog):
    section = saved(kind)
    outline = skeleton(section)
    with caplog.at_level(logging.WARNING):
        model = load_model_for(section, (early_hook(outline),), outline)
    assert not left_out(model)
    assert "loading the whole model" in caplog.text
    model.logits(torch.randint(4, 88, (2, 5)))


def test_blocks_from_the_last_hook_on_are_left_out_and_an_untied_output_layer(saved):
    section = saved("llama", num_hidden_layers=5, tie_word_embeddings=False)
    outline = skeleton(section)
    after = [f"model.layers.{layer}" for layer in range(5)]
    assert unneeded_modules(outline, ("model.layers.1:in",)) == (*after[2:], "lm_head")
    assert unneeded_modules(outline, ("model.layers.2.mlp:out", "model.layers.0:out")) == (*after[3:], "lm_head")
    assert unneeded_modules(outline, ("model.embed_tokens:out",)) == (*after, "lm_head")
    # The last block is needed, and what comes behind it.
    for hook in ("model.layers.4:in", "model.norm:out", "lm_head:in"):
        assert unneeded_modules(outline, ("model.layers.0:out", hook)) == ()
    # An output layer that is the embeddings is in memory anyway.
    tied = skeleton(saved("gpt2"))
    assert unneeded_modules(tied, ("transformer.h.0:out",)) == tuple(
        f"transformer.h.{i}" for i in (1, 2, 3)[: tied.module.config.n_layer - 1]
    )


def test_what_was_not_loaded_cannot_be_run_and_says_so(saved):
    section = saved("llama")
    model = load_model_for(section, ("model.layers.0:out",), skeleton(section))
    assert left_out(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1: was not loaded.*model\.truncate: never"):
        model.logits(torch.randint(4, 88, (2, 5)))
    with pytest.raises(HookError, match=r"model\.layers\.1\.mlp:out' does not exist"):
        model.find("model.layers.1.mlp:out")


def test_never_loads_the_whole_model(saved):
    section = saved("llama").model_copy(update={"truncate": "never"})
    model = load_model_for(section, ("model.layers.0:out",), skeleton(section))
    assert not left_out(model)


@pytest.mark.parametrize(("gradients", "whole"), [(False, False), (True, True)])
def test_a_harvest_loads_what_it_reads(gradients, whole, tmp_path, monkeypatch):
    loaded = []

    def harvested(model: LanguageModel, *_):
        loaded.append(model)
        return SimpleNamespace(directory=tmp_path / "store", manifest={})

    monkeypatch.setattr("sparsary.training.run.harvest_activations", harvested)
    hook = "transformer.h.1:out"
    values = {
        "model": {"device": "cpu"},
        "harvest": {"store": str(tmp_path / "store"), "tokens": 4096, "gradients": gradients},
        "dictionary": {"hook": hook, "n_latents": 32, "encoder": {"name": "topk", "k": 4}},
        "tokens": 4096,
        "out_dir": str(tmp_path / "run"),
    }
    run_harvest(resolve_recipe(check_recipe(values, "recipe")))
    assert bool(left_out(loaded[0])) != whole
