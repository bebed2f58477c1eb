"""Sites: the hooks they name hold the tensors that the blocks of each architecture read and write."""

import pytest
import torch
import transformers
from torch import nn

from sparsary.training.activations.model import LanguageModel, skeleton
from sparsary.training.activations.sites import SITES, TWO_SIDED, find_block, n_layers, site_hooks, sites_of
from sparsary.training.recipe import ModelSection

TOKENS = {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {**TOKENS, "num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
OLD = {**TOKENS, "n_layer": 3, "n_embd": 12, "n_head": 2}
MODELS = {
    "GPT2": OLD,
    "GPTNeoX": SIZES | {"use_parallel_residual": True},
    "GPTNeoX sequential": SIZES | {"use_parallel_residual": False},
    "Llama": SIZES | {"num_key_value_heads": 1},
    "Mistral": SIZES | {"num_key_value_heads": 1, "head_dim": 6},
    "Qwen3": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
    "Gemma": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
    "Gemma2": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
    "Olmo2": SIZES,
    "OPT": SIZES | {"ffn_dim": 20, "word_embed_proj_dim": 12, "max_position_embeddings": 16},
    "OPT norms behind": SIZES
    | {"ffn_dim": 20, "word_embed_proj_dim": 12, "max_position_embeddings": 16, "do_layer_norm_before": False},
    "Bloom": OLD | {"hidden_size": 12},
    "Mpt": TOKENS | {"n_layers": 3, "d_model": 12, "n_heads": 2, "max_seq_len": 16},
    "GPTJ": OLD | {"rotary_dim": 2},
    "GPTNeo": TOKENS | {"num_layers": 3, "hidden_size": 12, "num_heads": 2, "attention_types": [[["global"], 3]]},
    "Phi": SIZES | {"hidden_size": 16},
    "Falcon": SIZES,
}
PARALLEL = {"GPTNeoX", "GPTJ", "Phi", "Falcon"}
# Where what a part has written is normed before it is added, or what was added is.
NORMED = {"Gemma2", "Olmo2", "OPT norms behind"}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def tiny(name):
    config = getattr(transformers, f"{name.split()[0]}Config")(**MODELS[name])
    return LanguageModel(transformers.AutoModelForCausalLM.from_config(config), None, name, None)


def test_every_site_holds_the_tensors_the_block_reads_and_writes(name):
    model = tiny(name)
    with torch.no_grad():
        for _, parameter in model.module.named_parameters():
            # Fresh biases are zero and fresh norms one: then some mistakes would not show.
            parameter.add_(0.1 * torch.randn_like(parameter))
    layer = 1
    assert n_layers(model.module) == 3
    hooks = {site: site_hooks(model.module, layer, site) for site in sites_of(model.module)}
    assert set(SITES) - set(hooks) == ({"resid_mid", "router"} if name in PARALLEL else {"router"})
    assert all(one == other for site, (one, other) in hooks.items() if site not in TWO_SIDED)
    assert hooks["mlp"] == (hooks["mlp_in"][0], hooks["mlp_out"][0])
    seen = model.activations(torch.randint(3, 41, (2, 7)), tuple({hook for pair in hooks.values() for hook in pair}))
    at = {site: seen[pair[0]] for site, pair in hooks.items() if site not in TWO_SIDED}
    assert all(x.shape[:2] == (2, 7) for x in at.values())

    parts = find_block(model.module, layer)
    module = model.module.get_submodule(parts.mlp[0])
    with torch.no_grad():
        if parts.mlp[0] == parts.mlp[1]:
            torch.testing.assert_close(module(at["mlp_in"]), at["mlp_out"])
        elif "residual" in module.forward.__code__.co_varnames:
            torch.testing.assert_close(module(at["mlp_in"], torch.zeros_like(at["mlp_in"])), at["mlp_out"])
        else:
            assert name.startswith("OPT")
            block = model.module.get_submodule(parts.path)
            torch.testing.assert_close(block.fc2(block.activation_fn(block.fc1(at["mlp_in"]))), at["mlp_out"])
        torch.testing.assert_close(model.module.get_submodule(parts.attention_projection)(at["attn_heads"]), at["attn_out"])
    if name in PARALLEL:
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"] + at["mlp_out"], at["resid_post"])
    elif name not in NORMED:
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"])
        torch.testing.assert_close(at["resid_mid"] + at["mlp_out"], at["resid_post"])
    else:
        norms = {key: norm for key, norm in model.module.get_submodule(parts.path).named_children() if "norm" in key}
        with torch.no_grad():
            if name == "OPT norms behind":
                mid = norms["self_attn_layer_norm"](at["resid_pre"] + at["attn_out"])
                post = norms["final_layer_norm"](at["resid_mid"] + at["mlp_out"])
            else:
                mid = at["resid_pre"] + norms["post_attention_layernorm"](at["attn_out"])
                post = at["resid_mid"] + norms["post_feedforward_layernorm"](at["mlp_out"])
        torch.testing.assert_close(mid, at["resid_mid"])
        torch.testing.assert_close(post, at["resid_post"])


def test_every_block_has_its_own_hooks_and_the_meta_device_will_do(name):
    config = getattr(transformers, f"{name.split()[0]}Config")(**MODELS[name])
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    hooks = {pair for layer in range(3) for pair in find_block(module, layer).sites().values()}
    widths = LanguageModel(module, None, name, None).widths(tuple({hook for pair in hooks for hook in pair}))
    assert set(widths.values()) <= {12, 16}
    assert [site_hooks(module, layer, "resid_pre")[0].rsplit(".")[-1] for layer in range(3)] == ["0:in", "1:in", "2:in"]


def test_the_embedded_model_s_transcoder_hooks_are_what_users_write():
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**OLD))
    assert site_hooks(module, 2, "mlp") == ("transformer.h.2.mlp:in", "transformer.h.2.mlp:out")
    assert site_hooks(module, 2, "attn_heads") == ("transformer.h.2.attn.c_proj:in",) * 2
    assert site_hooks(module, 2, "resid_mid") == ("transformer.h.2.ln_2:in",) * 2


def test_embedded_model_sites_add_up(embedded_model):
    ids = torch.randint(3, 900, (2, 11))
    at = {site: site_hooks(embedded_model.module, 3, site)[0] for site in sites_of(embedded_model.module) if site != "mlp"}
    seen = embedded_model.activations(ids, tuple(at.values()))
    mid = seen[at["resid_pre"]] + seen[at["attn_out"]]
    torch.testing.assert_close(mid, seen[at["resid_mid"]])
    torch.testing.assert_close(mid + seen[at["mlp_out"]], seen[at["resid_post"]])
    assert skeleton(ModelSection()).widths(tuple(at.values())) == dict.fromkeys(at.values(), 128)


def meta(name, **changes):
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**MODELS[name] | changes)
        return transformers.AutoModelForCausalLM.from_config(config)


def test_what_is_not_there_is_refused_with_what_is():
    module = meta("GPTNeoX")
    with pytest.raises(ValueError, match=r"^dictionary\.layer: expected 0 to 2, as the model has 3 blocks, got 9\."):
        site_hooks(module, 9, "mlp")
    with pytest.raises(ValueError, match=r"^dictionary\.layer: expected 0 to 2.*got -1\."):
        site_hooks(module, -1, "mlp")
    with pytest.raises(ValueError, match=r"^dictionary\.site: expected one of resid_pre, resid_post,.*read the same stream"):
        site_hooks(module, 1, "resid_mid")
    with pytest.raises(
        ValueError, match=r"^dictionary\.site: expected one of .* mlp for .*, got 'mlpp'\. Did you mean 'mlp'\?"
    ):
        site_hooks(module, 1, "mlpp")


def test_a_model_whose_mlp_cannot_be_located_says_what_its_block_holds():
    with torch.device("meta"):
        config = transformers.MambaConfig(vocab_size=41, num_hidden_layers=2, hidden_size=12, state_size=4)
        module = transformers.AutoModelForCausalLM.from_config(config)
    assert sites_of(module) == ("resid_pre", "resid_post")
    for site in ("mlp", "mlp_out", "resid_mid"):
        with pytest.raises(ValueError, match=r"the MLP could not be located in .*mixer\.in_proj.*hook_in and hook_out"):
            site_hooks(module, 1, site)
    with pytest.raises(ValueError, match=r"attention's output projection could not be located"):
        site_hooks(module, 1, "attn_heads")


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"dictionary\.layer: expected a module list of .* blocks in Linear, found none"):
        n_layers(nn.Linear(3, 3))
