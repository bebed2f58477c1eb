"""Figures that tell a dictionary on its own activations from one on others'."""

import re

import pytest
import torch

from sparsary.eval.sanity import sanity
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.transcoders import Transcoder


@pytest.fixture
def at_home():
    """A dictionary of 17 directions at right angles, and sparse sums of them, two a token on average, with some noise."""
    directions = torch.linalg.qr(torch.randn(17, 17)).Q
    strengths = (torch.rand(500, 17) < 2 / 17) * (0.5 + torch.rand(500, 17))
    sae = SAE(17, 17, build_encoder({"name": "relu"})).eval()
    with torch.no_grad():
        sae.W_enc.copy_(directions)
        sae.W_dec.copy_(directions)
        sae.b_enc.fill_(-0.1)
    return sae, strengths @ directions + 0.01 * torch.randn(500, 17) + 0.05


def test_at_home_there_is_nothing_to_say(at_home):
    found = sanity(*at_home, published_l0=2)
    assert found.tokens == 500
    assert 0.0 < found.fvu < 0.2
    assert 1 < found.l0 < 4
    assert 0.8 < found.cosine < 1
    assert 0.6 < found.norm_ratio < 1
    assert found.dead_fraction == 0
    assert found.warnings == ()
    x = at_home[1]
    expected = (at_home[0](x).detach() - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert found.fvu == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda sae, x: (scaled(sae, 3.0), x), "fvu .*: worse than the mean"),
        (lambda sae, x: (scaled(sae, 0.01), x), "fvu .*: (hardly better|worse) than the mean"),
        (lambda sae, x: (scaled(sae, 0.1), x), "outputs are .* times as long as they should be"),
        (lambda sae, x: (biased(sae, -50.0), x), "no latent fires: thresholds or biases are in other units"),
        (lambda sae, x: (biased(sae, 5.0), x), "l0 17 of 17 latents: a topk or threshold is missing"),
    ],
)
def test_elsewhere_it_says_what_is_wrong(change, says, at_home):
    found = sanity(*change(*at_home))
    assert any(re.search(says, warning) for warning in found.warnings), found.warnings


def scaled(sae, factor):
    with torch.no_grad():
        sae.W_dec.mul_(factor)
    return sae


def biased(sae, value):
    with torch.no_grad():
        sae.b_enc.fill_(value)
    return sae


def test_an_l0_far_from_the_published_one_is_said(at_home):
    assert "where 40 is published" in sanity(*at_home, published_l0=40).warnings[0]


def test_a_transcoder_needs_its_targets():
    transcoder = Transcoder(5, 3, 11, build_encoder({"name": "topk", "k": 2})).eval()
    with pytest.raises(ValueError, match="y: expected the transcoder's targets"):
        sanity(transcoder, torch.randn(9, 5))
    assert sanity(transcoder, torch.randn(9, 5), torch.randn(9, 3)).l0 <= 2


def test_equal_or_single_rows_have_no_variance(at_home):
    with pytest.raises(ValueError, match="expected rows that differ"):
        sanity(at_home[0], torch.ones(4, 17))
    with pytest.raises(ValueError, match="expected at least 2 tokens, got 1"):
        sanity(at_home[0], torch.ones(1, 17))
