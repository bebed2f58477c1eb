"""The toy transformer: read like any other model, and what its masks and shares do."""

import pytest
import torch

from sparsary.eval.circuits.known import ToyConfig, ToyTransformer
from sparsary.eval.circuits.known.toy import blank
from sparsary.training.activations.architecture import Architecture
from sparsary.training.activations.model import LanguageModel
from sparsary.training.activations.sites import SITES, sites_of

SIZES = {"n_layers": 2, "n_heads": 3, "d_model": 7, "d_head": 5, "n_ctx": 11, "d_vocab": 13, "d_vocab_out": 4}
KINDS = [
    {"d_mlp": 17},
    {"d_mlp": 17, "norm": "layer", "activation": "gelu", "causal": False},
    {"d_mlp": 17, "norm": "rms"},
    {},
    {"norm": "layer"},
]


def made(**kind):
    module = ToyTransformer(ToyConfig(**SIZES, **kind)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return LanguageModel(module, None, "known:random", None)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_anatomy_makes_up_the_model(kind):
    model = made(**kind)
    anatomy = Architecture(model)
    token_ids = torch.randint(0, 13, (2, 6))

    def close(one, other):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

    trace = anatomy.trace(token_ids)
    resid = anatomy.W_E[token_ids] + anatomy.W_P[:6]
    for layer, at in zip(anatomy.layers, trace.layers, strict=True):
        close(resid, at.pre)
        close(layer.attention_norm.apply(at.pre, at.attention_scale), at.attention_in)
        close(torch.einsum("chts,cshd->cthd", at.pattern, at.v), at.z)
        close(torch.einsum("cthd,hdm->ctm", at.z, layer.W_O) + layer.b_O, at.attention_out)
        resid = resid + at.attention_out
        close(resid, at.mid)
        close(layer.mlp_norm.apply(at.mid, at.mlp_scale), at.mlp_in)
        resid = resid + at.mlp_out
    close(anatomy.final_norm.apply(resid, trace.last_scale) @ anatomy.W_U.T + model.module.lm_head.bias, trace.logits)
    if "norm" not in kind:
        assert (trace.last_scale == 1).all()
        assert torch.equal(trace.layers[0].pre, trace.layers[0].attention_in)


def test_sites_are_found_and_a_model_of_attention_only_lacks_those_of_an_mlp():
    dense = tuple(site for site in SITES if site != "router")
    assert sites_of(made(d_mlp=17).module) == dense
    assert sites_of(made(d_mlp=17, n_experts=5).module) == SITES
    assert sites_of(made().module) == ("resid_pre", "resid_post", "attn_heads", "attn_out")
    assert made(d_mlp=17).widths(("h.1.attn.o_proj:in", "h.0.mlp.down_proj:in")) == {
        "h.1.attn.o_proj:in": 15,
        "h.0.mlp.down_proj:in": 17,
    }


def test_the_future_changes_nothing_unless_attention_sees_both_ways():
    token_ids = torch.randint(0, 13, (3, 6))
    changed = token_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 13
    for causal in (True, False):
        model = made(d_mlp=17, causal=causal)
        same = torch.equal(model.logits(token_ids)[:, :-1], model.logits(changed)[:, :-1])
        assert same == causal


def test_padding_is_not_attended_to():
    model = made(causal=False, pad_id=0)
    prompt = torch.randint(1, 13, (2, 4))
    padded = torch.nn.functional.pad(prompt, (0, 3))
    torch.testing.assert_close(model.logits(padded)[:, :4], model.logits(prompt))
    # The same by a mask instead of the token.
    open_model = LanguageModel(ToyTransformer(ToyConfig(**SIZES, causal=False)).double(), None, "known:open", None)
    open_model.module.load_state_dict(model.module.state_dict())
    mask = (padded != 0).long()
    torch.testing.assert_close(open_model.module(padded, attention_mask=mask).logits[:, :4], model.logits(prompt))
    assert not torch.allclose(open_model.logits(padded)[:, :4], model.logits(prompt))


def test_a_share_of_nothing_is_a_sum_over_what_is_visible():
    attention = made(attention_share=0.0).module.h[0].attn
    pattern = attention.pattern(torch.randn(1, 3, 4, 4).double(), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(pattern[0, 0], torch.ones(4, 4).double().tril())
    attention.silent[2] = True
    silenced = attention.pattern(torch.randn(1, 3, 4, 4).double(), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(silenced[0, 1, 2], torch.zeros(4).double())
    assert torch.equal(silenced[0, 1, 3], torch.ones(4).double())


def test_a_blank_model_says_nothing_and_attentions_are_given_when_asked_for():
    module = blank(ToyConfig(**SIZES, d_mlp=17, norm="layer"))
    output = module(torch.zeros(2, 5, dtype=torch.long), output_attentions=True)
    assert (output.logits == 0).all()
    torch.testing.assert_close(output.attentions[1][0, 0, 4], torch.full((5,), 0.2))
    assert module(torch.zeros(2, 5, dtype=torch.long)).attentions is None


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="norm: expected one of none, layer, rms, got 'batch'"):
        ToyConfig(**SIZES, norm="batch")
    with pytest.raises(ValueError, match=r"at most 11 positions \(n_ctx\), got 12"):
        made().logits(torch.zeros(1, 12, dtype=torch.long))
