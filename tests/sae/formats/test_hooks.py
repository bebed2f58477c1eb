"""Hook names, both ways, on models that exist: what a name is translated to must be where the model has it."""

import pytest

from sparsary.sae.formats.hooks import (
    ARCHITECTURES,
    architecture_of,
    before_norm,
    behind_norm,
    hub_model,
    layer_of,
    to_module,
    to_transformer_lens,
    transformer_lens_model,
)
from sparsary.sae.row_norm import ROW_NORMS

MODELS = {
    "gpt2": "gpt2",
    "gpt_neox": "EleutherAI/pythia-70m",
    "llama": "meta-llama/Llama-3.1-8B",
    "gemma2": "google/gemma-2-2b",
}


@pytest.mark.parametrize("architecture", MODELS)
def test_every_place_goes_there_and_back(architecture):
    model = MODELS[architecture]
    assert architecture_of(model) == architecture
    for place, path in ARCHITECTURES[architecture].places:
        hook = to_module(f"blocks.11.{place}", model)
        assert hook.startswith(ARCHITECTURES[architecture].blocks + ".11")
        first = next(name for name, other in ARCHITECTURES[architecture].places if other == path)
        assert to_transformer_lens(hook, model) == f"blocks.11.{first}"


@pytest.mark.parametrize(
    ("name", "model", "hook"),
    [
        ("blocks.3.hook_resid_post", "gpt2-small", "transformer.h.3:out"),
        ("blocks.0.hook_resid_pre", "gpt2-small", "transformer.h.0:in"),
        ("blocks.3.attn.hook_z", "pythia-70m-deduped", "gpt_neox.layers.3.attention.dense:in"),
        ("blocks.3.hook_mlp_out", "gemma-2b", "model.layers.3.mlp:out"),
        # Normed once more before it is added.
        ("blocks.3.hook_mlp_out", "gemma-2-2b", "model.layers.3.post_feedforward_layernorm:out"),
        ("hook_embed", "gpt2", "transformer.wte:out"),
        ("model.layers.3", "stories3M", "model.layers.3:out"),
        ("model.layers.3.mlp:in", None, "model.layers.3.mlp:in"),
        # No module emits these.
        ("blocks.3.ln2.hook_normalized", "gpt2-small", None),
        ("blocks.3.hook_resid_mid", "pythia-70m", None),
        ("hook_embed", "gemma-2b", None),
        ("blocks.3.hook_resid_post", "somebody/elses", None),
    ],
)
def test_names_of_transformer_lens_are_module_paths(name, model, hook):
    assert to_module(name, model) == hook


def test_module_paths_of_the_same_tensor_have_the_same_name():
    assert to_transformer_lens("transformer.h.2.attn:out") == "blocks.2.hook_attn_out"
    assert to_transformer_lens("transformer.h.2.mlp.c_proj:out") == "blocks.2.hook_mlp_out"
    assert to_transformer_lens("gpt_neox.layers.2.mlp.dense_4h_to_h:out") == "blocks.2.hook_mlp_out"
    # In Gemma 2 this is before the norm behind the MLP, where TransformerLens has another name.
    assert to_transformer_lens("model.layers.2.mlp:out", "google/gemma-2-2b") == "blocks.2.mlp.hook_out"
    assert to_transformer_lens("transformer.h.2.ln_1:out") is None
    assert to_transformer_lens("encoder.blocks.2:out") is None


def test_models_have_two_names():
    for lens, hub in (
        ("gpt2-small", "openai-community/gpt2"),
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("gemma-2b", "google/gemma-2b"),
    ):
        assert hub_model(lens) == hub
        assert transformer_lens_model(hub) == lens
    assert hub_model("mine/own") == transformer_lens_model("mine/own") == "mine/own"
    assert hub_model(None) is transformer_lens_model(None) is None


def test_layers_are_read_from_either_spelling():
    assert layer_of("blocks.11.hook_resid_post") == layer_of("transformer.h.11:out") == layer_of("model.layers.11.mlp:in") == 11
    assert layer_of("hook_embed") is None


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_the_paths_are_modules_of_the_models(family, tiny_model):
    names = dict(tiny_model(family).module.named_modules())
    architecture = ARCHITECTURES[family]
    for _, path in architecture.places:
        inner = path.rsplit(":", 1)[0]
        assert f"{architecture.blocks}.1{'.' if inner else ''}{inner}" in names
    assert architecture.embedding in names


def test_gemma_s_paths_are_modules_of_it():
    import torch
    import transformers

    sizes = {"vocab_size": 41, "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
    with torch.device("meta"):
        config = transformers.Gemma2Config(**sizes, head_dim=6, num_key_value_heads=2)
        names = dict(transformers.AutoModelForCausalLM.from_config(config).named_modules())
    for _, path in ARCHITECTURES["gemma2"].places:
        inner = path.rsplit(":", 1)[0]
        assert f"model.layers.1{'.' if inner else ''}{inner}" in names


@pytest.mark.parametrize(
    ("model", "normed", "path"),
    [
        ("meta-llama/Llama-3.2-1B", "blocks.4.ln2.hook_normalized", "model.layers.4.post_attention_layernorm:in"),
        ("google/gemma-2-2b", "blocks.4.ln2.hook_normalized", "model.layers.4.pre_feedforward_layernorm:in"),
        ("google/gemma-2b", "blocks.0.ln1.hook_normalized", "model.layers.0.input_layernorm:in"),
        ("gpt2", "blocks.4.ln2.hook_normalized", None),
        (None, "blocks.4.ln2.hook_normalized", None),
        ("meta-llama/Llama-3.2-1B", "blocks.4.hook_resid_post", None),
    ],
)
def test_streams_before_an_rms_norm_s_gain_are_those_before_the_norm(model, normed, path):
    assert before_norm(normed, model) == path
    if path is not None:
        assert behind_norm(path, model) == normed
    assert behind_norm("model.layers.4.mlp:in", model) is None


def test_a_model_s_rms_norm_is_the_row_norm_times_its_gain(tiny_model):
    """Up to the constant that the model adds to the mean square, which is small beside that of streams."""
    import torch

    norm = dict(tiny_model("llama").module.named_modules())["model.layers.1.post_attention_layernorm"]
    x, gain = (3 * torch.randn(9, len(norm.weight)) + 1).to(norm.weight), (torch.rand(len(norm.weight)) + 0.5).to(norm.weight)
    with torch.no_grad():
        norm.weight.copy_(gain)
        torch.testing.assert_close(norm(x) / gain, ROW_NORMS["constant_norm"](x).rows, rtol=1e-5, atol=1e-5)
        norm.weight.fill_(1)
