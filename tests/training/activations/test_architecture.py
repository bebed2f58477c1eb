"""Anatomy: a model taken apart by one set of names, whose parts put together are the model."""

import pytest
import torch
from torch import nn

from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.model import LanguageModel, load_model
from sparsary.training.recipe import ModelSection


@pytest.fixture(params=["gpt2", "gpt_neox", "gpt_neox sequential", "llama", "qwen2"])
def anatomy(request, tiny_model):
    return Architecture(tiny_model(request.param))


@pytest.fixture
def token_ids():
    return torch.randint(3, 41, (2, 7))


def check(anatomy, token_ids, rtol=1e-9, atol=1e-9, embedded=None):
    def close(one, other):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)

    trace = anatomy.trace(token_ids)
    resid = anatomy.W_E[token_ids] if embedded is None else embedded
    if anatomy.W_P is not None:
        resid = resid + anatomy.W_P[: token_ids.shape[1]]
    for layer, at in zip(anatomy.layers, trace.layers, strict=True):
        close(resid, at.pre)
        close(layer.attention_norm.apply(at.pre, at.attention_scale), at.attention_in)
        close(torch.einsum("chts,cshd->cthd", at.pattern, at.v), at.z)
        close(torch.einsum("cthd,hdm->ctm", at.z, layer.W_O) + layer.b_O, at.attention_out)
        if layer.attention_post_norm is None:
            assert at.attention_written is at.attention_out
            assert at.mlp_written is at.mlp_out
        else:
            close(layer.attention_post_norm.apply(at.attention_out, at.attention_post_scale), at.attention_written)
            close(layer.mlp_post_norm.apply(at.mlp_out, at.mlp_post_scale), at.mlp_written)
        resid = resid + at.attention_written
        close(at.pre if anatomy.parallel else resid, at.mid)
        close(layer.mlp_norm.apply(at.mid, at.mlp_scale), at.mlp_in)
        resid = resid + at.mlp_written
    close(resid, trace.last)
    logits = anatomy.final_norm.apply(trace.last, trace.last_scale) @ anatomy.W_U.T
    close(logits if anatomy.logit_cap is None else (logits / anatomy.logit_cap).tanh() * anatomy.logit_cap, trace.logits)
    return trace


def test_the_parts_make_up_the_model(anatomy, token_ids):
    trace = check(anatomy, token_ids)
    future = torch.ones(7, 7).triu(1).bool()
    assert all((at.pattern[..., future] == 0).all() for at in trace.layers)
    assert anatomy.layers[0].W_V.shape == (anatomy.n_heads, anatomy.d_head, anatomy.d_model)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_parts_of_a_model_with_post_norms_make_it_up(family, tiny_model, token_ids):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=rf"got 'gemma[23_tex]+' \({family}\), which normalizes them first \(post_attention"):
        Architecture(model)
    anatomy = Architecture(model, post_norms=True)
    trace = check(anatomy, token_ids, embedded=anatomy.W_E[token_ids] * model.module.model.embed_tokens.embed_scale)
    # Gains are stored minus 1; the window of the first layer is three tokens.
    assert torch.equal(anatomy.final_norm.weight, 1 + model.module.model.norm.weight)
    assert [bool((at.pattern[..., 6, :4] == 0).all()) for at in trace.layers] == [True, False, True]
    assert [layer.q_norm is None for layer in anatomy.layers] == [family == "gemma2"] * 3


def test_the_embedded_model_s_parts_make_it_up(embedded_model):
    token_ids = torch.randint(3, 900, (2, 11))
    trace = check(Architecture(embedded_model), token_ids, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(trace.logits, embedded_model.logits(token_ids), rtol=1e-4, atol=2e-4)


def test_stories3M_s_parts_make_it_up(shared_data):  # noqa: N802 - the model's name
    model = load_model(ModelSection(id=str(shared_data / "models" / "stories3M"), device="cpu"))
    token_ids = torch.randint(3, 4000, (2, 11))
    trace = check(Architecture(model), token_ids, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(trace.logits, model.logits(token_ids), rtol=1e-4, atol=2e-4)


def test_carrying_and_folding_are_what_heads_and_norms_do(anatomy, token_ids):
    layer, at = anatomy.layers[1], anatomy.trace(token_ids).layers[1]
    x = torch.randn(anatomy.d_model, dtype=torch.float64)
    torch.testing.assert_close(layer.carry(1, x), layer.W_O[1].T @ (layer.W_V[1] @ x), rtol=1e-9, atol=1e-9)
    norm, reader = layer.mlp_norm, torch.randn(anatomy.d_model, dtype=torch.float64)
    read = (at.mid @ norm.fold(reader)) / at.mlp_scale + norm.bias @ reader
    torch.testing.assert_close(read, at.mlp_in @ reader, rtol=1e-9, atol=1e-9)


def test_the_model_is_as_it_was_also_after_a_failed_pass(tiny_model, token_ids):
    model = tiny_model("llama")
    anatomy, clean = Architecture(model), model.logits(token_ids)
    assert model.module.config._attn_implementation == "sdpa"

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.module.model.norm.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        anatomy.trace(token_ids)
    handle.remove()
    assert model.module.config._attn_implementation == "sdpa"
    anatomy.trace(token_ids)
    assert model.module.config._attn_implementation == "sdpa"
    assert torch.equal(model.logits(token_ids), clean)


def test_an_architecture_that_cannot_be_taken_apart_is_named():
    with pytest.raises(
        ValueError, match=r"model\.id: expected an architecture .*gpt2, gpt_neox, llama.*, got 'Linear' \(odd\)"
    ):
        Architecture(LanguageModel(nn.Linear(3, 3), None, "odd", None))
