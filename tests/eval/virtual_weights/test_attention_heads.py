"""Attention-output dictionaries: attributions to heads and sources add up to the pre-activation."""

import pytest
import torch

from sparsary.eval.virtual_weights.attention_heads import by_head, by_source, head_shares, residual_atoms
from sparsary.eval.virtual_weights.linear_readers import readers
from sparsary.sae import ENCODERS, SAE
from sparsary.training.activations.architecture import Architecture

LATENTS = torch.tensor([4, 0, 22])


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def anatomy(request, tiny_model):
    return Architecture(tiny_model(request.param))


def build(width, scale=1.7):
    sae = SAE(width, 23, ENCODERS["topk"](k=3)).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.in_scale.fill_(scale)
    sae.out_scale.fill_(scale)
    return sae


def pre_activations(sae, x):
    """As the encoder has them."""
    return torch.nn.functional.linear(sae.normalised(x), sae.W_enc, sae.b_enc)


def test_heads_and_sources_add_up_to_the_pre_activation(anatomy):
    sae = build(anatomy.n_heads * anatomy.d_head)
    at = anatomy.trace(torch.randint(3, 41, (2, 7))).layers[1]
    expected = pre_activations(sae, at.z.flatten(0, 1).flatten(1))[:, LATENTS].T.view(3, 2, 7)
    heads, constants = by_head(sae, at, LATENTS)
    torch.testing.assert_close(heads.sum(-1) + constants[:, None, None], expected, rtol=1e-9, atol=1e-9)
    positions = torch.tensor([6, 2])
    sources = by_source(sae, at, LATENTS, positions)
    torch.testing.assert_close(sources.sum(-1), heads[:, :, positions], rtol=1e-9, atol=1e-9)
    # Nothing comes from the future.
    assert (sources[:, :, 1, :, 3:] == 0).all()
    assert (sources[:, :, 1, :, :3] != 0).all()


def test_the_embedded_model_s_attributions_add_up_in_single_precision(embedded_model):
    anatomy = Architecture(embedded_model)
    sae = build(128).float()
    at = anatomy.trace(torch.randint(3, 900, (2, 11))).layers[2]
    _, constants = by_head(sae, at, LATENTS)
    sources = by_source(sae, at, LATENTS, torch.arange(11))
    expected = pre_activations(sae, at.z.flatten(0, 1).flatten(1))[:, LATENTS].T.view(3, 2, 11)
    torch.testing.assert_close(sources.sum((-1, -2)) + constants[:, None, None], expected, rtol=1e-4, atol=1e-4)


def test_what_a_head_adds_is_what_its_values_being_zero_takes_away(anatomy):
    sae = build(anatomy.n_heads * anatomy.d_head)
    at = anatomy.trace(torch.randint(3, 41, (1, 7))).layers[1]
    without = at.z.clone()
    without[:, :, 1] = 0
    change = pre_activations(sae, at.z[0].flatten(1)) - pre_activations(sae, without[0].flatten(1))
    heads, _ = by_head(sae, at, LATENTS)
    torch.testing.assert_close(heads[:, 0, :, 1].T, change[:, LATENTS], rtol=1e-9, atol=1e-9)


def test_shares_are_those_of_the_atoms_and_follow_the_heads():
    sae = build(12)
    shares = head_shares(sae, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(23, dtype=torch.float64))
    with torch.no_grad():
        sae.W_dec[5] = 0
        sae.W_dec[5, 4:6] = torch.tensor([3.0, 4.0])
        sae.W_dec[5, 8:9] = 15.0
    torch.testing.assert_close(head_shares(sae, 3)[5], torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64))
    before = head_shares(sae, 3)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.view(23, 3, 4)[:, [2, 0, 1]].flatten(1))
    torch.testing.assert_close(head_shares(sae, 3), before[:, [2, 0, 1]])


def test_a_latent_s_atom_in_the_stream_is_what_the_projection_makes_of_it(anatomy):
    sae = build(anatomy.n_heads * anatomy.d_head)
    projection = anatomy.model.module.get_submodule(anatomy.blocks[1].attention_projection)
    zero = torch.zeros(1, sae.d_out, dtype=torch.float64)
    with torch.no_grad():
        expected = projection(sae.W_dec * sae.out_scale) - projection(zero)
    torch.testing.assert_close(residual_atoms(sae, anatomy.layers[1]), expected, rtol=1e-9, atol=1e-9)


def test_what_has_no_linear_reading_or_no_heads_is_refused():
    with pytest.raises(ValueError, match=r"encoder with pre-activations, got MatchingPursuit"):
        readers(SAE(12, 23, ENCODERS["matching_pursuit"](k=2)))
    with pytest.raises(ValueError, match=r"latents: expected 0 to 22, got 3 to 23"):
        readers(build(12), torch.tensor([3, 23]))
    with pytest.raises(ValueError, match=r"expected a width divisible by 5 heads, got 12.*attn_heads"):
        head_shares(build(12), 5)
