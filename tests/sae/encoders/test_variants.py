"""Multi-TopK, signed TopK in training, and the concave penalties of ReLU."""

import math

import pytest
import torch

from sparsary.sae import ENCODERS, SAE
from sparsary.sae.encoder import Weights
from sparsary.sae.encoders.relu import charge
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.objective import AuxSettings, LatentUsage, Objective

TOKENS, D, LATENTS = 23, 7, 31


def made(name, **arguments):
    torch.manual_seed(2)
    sae = SAE(D, LATENTS, ENCODERS[name](**arguments)).double()
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(LATENTS, D))
        sae.b_enc.copy_(0.1 * torch.randn(LATENTS))
        sae.b_dec.copy_(0.3 * torch.randn(D))
    return sae, torch.randn(TOKENS, D, dtype=torch.float64)


def loss_and_terms(sae, x):
    usage = LatentUsage(torch.zeros(LATENTS, dtype=torch.bool), torch.zeros(LATENTS, dtype=torch.float64))
    return Objective(sae, 7.0, AuxSettings(0.0, 3))(ActivationBatch(x), usage)


def dense_topk(sae, x, k, by=lambda h: h):
    h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    return h * torch.zeros_like(h).scatter(1, by(h).topk(k, dim=1).indices, 1.0)


# Multi-TopK.


def test_the_loss_is_that_at_k_and_an_eighth_of_that_at_four_k():
    sae, x = made("multi_topk", k=3)
    found = []
    for dense in (False, True):
        sae.zero_grad()
        if dense:
            errors = [(dense_topk(sae, x, k).relu() @ sae.W_dec + sae.b_dec - x).pow(2).sum() / (7 * TOKENS) for k in (3, 12)]
            loss = errors[0] + errors[1] / 8
        else:
            loss, terms = loss_and_terms(sae, x)
            assert float(terms.named["l0"]) <= 3
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in sae.named_parameters()}))
    torch.testing.assert_close(found[0][0].double(), found[1][0])
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_after_training_and_without_weight_it_is_topk():
    sae, x = made("multi_topk", k=3)
    plain, _ = made("topk", k=3)
    wanted = plain.encode(x).to_dense(LATENTS)
    assert torch.equal(sae.encode(x).to_dense(LATENTS), wanted)
    assert sae.encode(x).requests.wider is not None
    assert torch.equal(sae.eval().encode(x).to_dense(LATENTS), wanted)
    assert sae.encode(x).requests.wider is None
    assert made("multi_topk", k=3, weight=0)[0].encode(x).requests.wider is None


def test_more_latents_than_there_are_take_all():
    sae, x = made("multi_topk", k=LATENTS - 2)
    code = sae.encode(x).requests.wider.code
    assert (code.entries_per_token() == LATENTS).all()


def test_more_latents_after_training_go_on_lowering_the_error(planted):
    """TopK at four times the k of its training against Multi-TopK."""
    fvus = {}
    for name in ("topk", "multi_topk"):
        torch.manual_seed(0)
        sae = SAE(17, 29, ENCODERS[name](k=2))
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for step in range(60):
            x = planted(128, step)
            code = sae.encode(x)
            loss = (sae.decode(code) - x).pow(2).sum(-1).mean()
            if code.requests.wider is not None:
                loss = loss + code.requests.wider.weight * (sae.decode(code.requests.wider.code) - x).pow(2).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sae.renormalize()
        sae.eval().encoder.k = 8
        x = planted(2000, 999)
        fvus[name] = float(((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).detach())
    assert fvus["multi_topk"] < 0.9 * fvus["topk"]


# Signed TopK.


@pytest.mark.parametrize("by", ["value", "size"])
def test_signed_values_train_as_the_dense_ones_do(by):
    sae, x = made("signed_topk", k=4, by=by)
    sent, found = torch.randn(TOKENS, LATENTS, dtype=torch.float64), []
    for code in (sae.encode(x).to_dense(LATENTS), dense_topk(sae, x, 4, torch.abs if by == "size" else lambda h: h)):
        sae.zero_grad()
        (code * sent).sum().backward()
        found.append([code.detach(), *(p.grad.clone() for p in (sae.W_enc, sae.b_enc, sae.b_dec))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert ((found[0][0] < 0).sum() > TOKENS) == (by == "size")
    assert (found[0][0] != 0).sum() == 4 * TOKENS


def test_one_signed_latent_is_enough_for_a_direction_and_its_opposite():
    """Data on three lines through zero, three latents: with signs they explain all, without them one half."""
    torch.manual_seed(0)
    lines = torch.linalg.qr(torch.randn(D, 3)).Q.T.contiguous()
    x = lines[torch.arange(60) % 3] * torch.ones(60).where(torch.arange(60) < 30, -1)[:, None]
    for name, arguments, left in (("signed_topk", {"by": "size"}, 0.0), ("topk", {}, 0.5)):
        sae = SAE(D, 3, ENCODERS[name](k=1, **arguments)).requires_grad_(False)
        sae.W_dec.copy_(lines)
        sae.copy_atoms_to_encoder()
        assert float((sae(x) - x).pow(2).sum() / x.pow(2).sum()) == pytest.approx(left, abs=1e-6)


# Penalties of ReLU.

FORMS = {
    "l1": lambda m: m,
    "log": lambda m: (1 + m / 0.1).log() / math.log(11),
    "sqrt": lambda m: (m + 0.1) ** 0.5 - 0.1**0.5,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_penalty_and_its_gradients_are_those_of_the_formula(form):
    sae, x = made("relu", sparsity=0.3, ramp=0.0, penalty_form=form)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(LATENTS, 1) + 0.5)
    dense = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    by_hand = 0.3 * FORMS[form](dense * sae.W_dec.norm(dim=-1)).sum() / (TOKENS * D)
    own = sae.encode(x).requests.penalties["sparsity"]
    torch.testing.assert_close(own.double(), by_hand)
    weights = [sae.W_enc, sae.b_enc, sae.W_dec]
    for one, other in zip(*(torch.autograd.grad(each, weights) for each in (own, by_hand)), strict=True):
        torch.testing.assert_close(one, other)

    def run(W_enc, b_enc, W_dec):
        return sae.encoder(x, Weights(W_enc, b_enc, W_dec)).requests.penalties["sparsity"]

    assert torch.autograd.gradcheck(run, [each.detach().clone().requires_grad_(True) for each in weights], fast_mode=True)


def test_concave_penalties_charge_splitting_a_value_and_no_latent_nothing():
    for form in ("log", "sqrt"):
        whole, halves, nothing = (float(charge(torch.tensor(m), form).sum()) for m in ([1.0], [0.5, 0.5], [0.0]))
        assert nothing == 0
        assert halves > 1.1 * whole
    assert float(charge(torch.tensor([1.0]), "log")) == pytest.approx(1.0)


# Random prefixes of Matryoshka.


def test_widths_are_drawn_anew_for_every_batch_and_again_by_a_resumed_run():
    encoder = ENCODERS["matryoshka"](k=3, shares=[0.1, 0.5, 1.0], sampled=4)
    encoder.prepare(1000)
    found = []
    for step in range(200):
        encoder.progress = step / 199
        widths = encoder.prefixes()
        assert widths == encoder.prefixes()
        assert (len(widths), widths[0], widths[-1]) == (6, 100, 1000)
        assert list(widths) == sorted(widths)
        found.append(widths[1:-1])
    assert len(set(found)) == 200
    # Uniform in the logarithm: a tenfold range has its middle at its geometric mean.
    below = sum(width < 316 for widths in found for width in widths) / 800
    assert below == pytest.approx(0.5, abs=0.06)
    plain = ENCODERS["matryoshka"](k=3, shares=[0.1, 0.5, 1.0])
    plain.prepare(1000)
    assert plain.prefixes() == (100, 500, 1000)
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.shares: expected two or more with sampled = 2"):
        ENCODERS["matryoshka"](k=3, shares=[1.0], sampled=2)


def test_the_loss_is_the_mean_over_the_drawn_prefixes():
    sae, x = made("matryoshka", k=3, shares=[0.2, 1.0], sampled=2)
    sae.encoder.progress = 0.25
    loss, _ = loss_and_terms(sae, x)
    dense = sae.encode(x).to_dense(LATENTS)
    widths = sae.encoder.prefixes()
    assert len(widths) == 4
    by_hand = [(dense[:, :n] @ sae.W_dec[:n] + sae.b_dec - x).pow(2).sum() / (7 * TOKENS) for n in widths]
    torch.testing.assert_close(loss.double(), torch.stack(by_hand).mean())
