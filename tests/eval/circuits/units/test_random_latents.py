"""Random dictionaries: what they share with the trained ones, and that they fire as often."""

import pytest
import torch

from sparsary.eval.circuits.units.random_latents import random_like
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.encoder import Encoder
from sparsary.sae.metrics import fvu
from sparsary.transcoders.transcoder import Transcoder


@pytest.fixture
def trained(encoder_arguments, train_on_planted):
    """Builds an SAE that has seen some planted data; 31 latents in 17 dimensions."""

    def build(name):
        sae = SAE(17, 31, ENCODERS[name](**encoder_arguments[name]))
        sae.in_scale.fill_(1.3)
        sae.out_scale.fill_(1.3)
        # One that trains on gradients chooses as topk does without them.
        return (sae if name == "gradient_topk" else train_on_planted(sae, 25)).eval()

    return build


@pytest.mark.parametrize("name", ENCODERS)
def test_as_many_latents_fire_as_in_the_trained_dictionary(name, trained, planted):
    sae, x = trained(name), planted(719, 1)
    copied = random_like(sae, x)
    own, other = (one.encode(x).firings(31) for one in (sae, copied))
    assert own.sum() > 1000
    if name in ("topk", "gradient_topk", "matching_pursuit", "multi_topk", "signed_topk"):
        # Nothing but k is theirs to match: what was chosen and is not positive, or is chosen twice, does not fire.
        assert copied.encoder.k == sae.encoder.k
        assert abs(int(other.sum() - own.sum())) < 0.05 * own.sum()
    else:
        assert abs(int(other.sum() - own.sum())) <= 3
    if name in ("feature_choice", "jumprelu", "relu", "gated"):
        assert (other - own).abs().max() <= 1
        # Latents too that fire on more tokens than a random direction is positive on.
        assert own.amax() > (400 if name in ("relu", "gated") else 100)


def test_atoms_are_random_units_read_with_themselves_and_the_rest_is_kept(trained, planted):
    sae, inputs = trained("jumprelu"), planted(509, 1)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    copied = random_like(sae, inputs, seed=3)
    torch.testing.assert_close(copied.W_dec.norm(dim=-1), torch.ones(31))
    assert torch.equal(copied.W_enc, copied.W_dec)
    assert (copied.W_dec * sae.W_dec).sum(-1).abs().mean() < 0.35
    assert torch.equal(copied.b_dec, sae.b_dec)
    assert copied.in_scale == sae.in_scale
    # The trained dictionary is as it was, and explains far more.
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    x = planted(400, 7)
    assert fvu(x, sae(x)) < 0.5 * fvu(x, copied(x))
    assert torch.equal(random_like(sae, inputs, seed=3).W_dec, copied.W_dec)
    assert not torch.equal(random_like(sae, inputs, seed=4).W_dec, copied.W_dec)


def test_a_transcoder_reads_and_writes_unrelated_directions(planted):
    transcoder = Transcoder(17, 17, 31, ENCODERS["topk"](k=3), skip=True).eval()
    transcoder.W_skip.data.normal_()
    copied = random_like(transcoder, planted(50, 1))
    assert (copied.W_enc * copied.W_dec).sum(-1).abs().max() < 0.9
    assert torch.equal(copied.W_skip, transcoder.W_skip)


def test_what_it_cannot_match_is_refused(trained):
    with pytest.raises(ValueError, match="x: expected tokens"):
        random_like(trained("topk"), torch.empty(0, 17))

    class Other(Encoder):
        def forward(self, x, weights, grad=None):
            return ENCODERS["topk"](k=2)(x, weights)

        def prepare(self, n_latents):
            pass

    with pytest.raises(ValueError, match="whose l0 can be matched, got Other"):
        random_like(SAE(5, 7, Other()).eval(), torch.randn(11, 5))
