"""Encoders that only loaded dictionaries have keep the contract of all encoders, but that values may be negative."""

import pytest
import torch

from sparsary.sae import SAE, load_dictionary
from sparsary.sae.encoders import ENCODERS, LOADED_ENCODERS, build_encoder, encoder_spec

D, LATENTS, TOKENS = 11, 30, 13
ARGUMENTS = {
    "threshold": {},
    "group_max": {"k": 5},
    "residual_pursuit": {"max_steps": 4, "residual_norm": 0.5, "stop_on_repeat": True},
}
# Trained too, but with negative values.
SIGNED = [("signed_topk", {"k": 3, "by": by}) for by in ("value", "size")]
CASES = [*ARGUMENTS.items(), *SIGNED]


@pytest.fixture(params=range(len(CASES)), ids=[f"{name}{i}" for i, (name, _) in enumerate(CASES)])
def sae(request):
    name, arguments = CASES[request.param]
    torch.manual_seed(3)
    sae = SAE(D, LATENTS, (ENCODERS | LOADED_ENCODERS)[name](**arguments))
    with torch.no_grad():
        if sae.W_enc is not None:
            sae.W_enc.add_(0.1 * torch.randn(LATENTS, D))
            sae.b_enc.copy_(0.1 * torch.randn(LATENTS))
        sae.b_dec.copy_(torch.randn(D))
        sae.in_scale.fill_(1.7)
        sae.out_scale.fill_(1.7)
    if name == "threshold":
        sae.encoder.threshold.copy_(torch.rand(LATENTS))
    return sae.eval()


def test_they_are_not_among_those_that_are_trained():
    assert ARGUMENTS.keys() == LOADED_ENCODERS.keys()
    assert not ENCODERS.keys() & LOADED_ENCODERS.keys()


def test_silent_entries_do_not_count(sae):
    code = sae.encode(torch.randn(TOKENS, D))
    dense = code.to_dense(LATENTS)
    assert code.l0().sum() == code.firings(LATENTS).sum() == (code.values != 0).sum() > 0
    assert (dense != 0).any()


def test_code_does_not_depend_on_batch_mates(sae):
    x = torch.randn(TOKENS, D)
    alone = torch.cat([sae.encode(row[None]).to_dense(LATENTS) for row in x])
    torch.testing.assert_close(sae.encode(x).to_dense(LATENTS), alone)


@pytest.mark.parametrize("kind", ["no token", "zeros"])
def test_little_is_enough(sae, kind):
    x = torch.zeros(0 if kind == "no token" else 2, D)
    assert sae(x).shape == x.shape


def test_gradients_equal_the_dense_route(sae):
    sae, x = sae.double(), torch.randn(TOKENS, D, dtype=torch.float64)
    found = []
    for dense in (False, True):
        sae.zero_grad()
        code = sae.encode(x)
        y = (code.to_dense(LATENTS) @ sae.W_dec + sae.b_dec) * sae.out_scale if dense else sae.decode(code)
        y.pow(2).sum().backward()
        found.append({name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None})
    assert found[0].keys() == {name for name, _ in sae.named_parameters()}
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_saved_then_loaded_is_bit_equal(sae, tmp_path, assert_same_tensors):
    sae.save(tmp_path / "d")
    again = load_dictionary(tmp_path / "d")
    assert_same_tensors(again, sae)
    assert encoder_spec(again.encoder) == encoder_spec(sae.encoder)


def test_largest_by_size_may_be_negative_and_by_value_too():
    x = torch.tensor([[-3.0, 1.0, 2.0, -0.5]])
    for by, expected in (("value", [0, 1, 2, 0]), ("size", [-3, 0, 2, 0])):
        sae = SAE(4, 4, ENCODERS["signed_topk"](k=2, by=by)).eval()
        with torch.no_grad():
            sae.W_enc.copy_(torch.eye(4))
        assert sae.encode(x).to_dense(4).tolist() == [expected]
        assert sae.encode(-torch.ones(1, 4)).to_dense(4).sum() == -2


def test_groups_are_consecutive_latents():
    sae = SAE(4, 4, LOADED_ENCODERS["group_max"](k=2)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
    assert sae.encode(torch.tensor([[1.0, 5.0, -2.0, -1.0]])).to_dense(4).tolist() == [[0, 5, 0, 0]]
    with pytest.raises(ValueError, match=r"k: expected a divisor of n_latents = 4, got 3"):
        SAE(4, 4, LOADED_ENCODERS["group_max"](k=3))


def test_thresholds_are_strict_and_never_let_negative_values_through():
    sae = SAE(2, 2, LOADED_ENCODERS["threshold"]()).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
    sae.encoder.threshold.copy_(torch.tensor([1.0, -5.0]))
    found = sae.encode(torch.tensor([[1.0, -3.0], [1.5, 2.0]])).to_dense(2)
    assert found.tolist() == [[0, 0], [1.5, 2]]


def test_wrong_arguments_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"encoder\.max_steps: expected at least 1, got 0"):
        build_encoder({"name": "residual_pursuit", "max_steps": 0})


def test_an_autoencoder_need_not_subtract_its_bias(tmp_path, assert_same_tensors):
    sae = SAE(D, LATENTS, build_encoder({"name": "topk", "k": 3}), apply_b_dec_to_input=False).eval()
    plain = SAE(D, LATENTS, build_encoder({"name": "topk", "k": 3})).eval()
    plain.load_state_dict(sae.state_dict())
    with torch.no_grad():
        sae.b_dec.normal_()
    x = torch.randn(TOKENS, D)
    torch.testing.assert_close(sae(x), plain(x) + sae.b_dec)
    sae.save(tmp_path / "d")
    again = load_dictionary(tmp_path / "d")
    assert_same_tensors(again, sae)
    torch.testing.assert_close(again(x), sae(x))
    assert plain.arguments().keys() == {"kind", "d_in", "n_latents", "encoder"}


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
def test_what_is_normed_by_row_decodes_linearly(norm, tmp_path, assert_same_tensors):
    """Doubling a token's code doubles what its latents write; atoms are the same for all tokens."""
    sae = SAE(D, LATENTS, build_encoder({"name": "topk", "k": 3}), row_norm=norm).eval()
    with torch.no_grad():
        sae.b_dec.normal_()
    x = 5 * torch.randn(TOKENS, D) + 2
    code = sae.encode(x)
    written = sae(x) - sae.bypass(x)
    torch.testing.assert_close(code.to_dense(LATENTS) @ sae.W_dec, written)
    mean = x.mean(1, keepdim=True) if norm == "layer_norm" else 0
    deviation = x.std(1, keepdim=True) if norm == "layer_norm" else x.norm(dim=1, keepdim=True) / D**0.5
    torch.testing.assert_close(sae.bypass(x), deviation * sae.b_dec + mean)
    with pytest.raises(ValueError, match="expected the raw input, because this SAE undoes each token's own normalisation"):
        sae.decode(code)
    sae.save(tmp_path / "d")
    again = load_dictionary(tmp_path / "d")
    assert_same_tensors(again, sae)
    torch.testing.assert_close(again(x), sae(x))


def test_an_unknown_row_norm_is_refused():
    with pytest.raises(ValueError, match=r"row_norm: expected null or one of layer_norm, constant_norm, centred, got 'batch'"):
        SAE(D, LATENTS, build_encoder({"name": "relu"}), row_norm="batch")
