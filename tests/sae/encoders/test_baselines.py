"""What is special about the baselines, and about matching pursuit as an encoder."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.sae.encoder import Weights, pre_activations
from sparsary.sae.encoders.gated import Gated
from sparsary.sae.encoders.jumprelu import PACE, THINNING, Jump, JumpReLU
from sparsary.sae.encoders.matching_pursuit import MatchingPursuit
from sparsary.sae.encoders.matryoshka import Matryoshka
from sparsary.sae.encoders.relu import ReLU
from sparsary.sae.losses import normalized_mse
from sparsary.sae.penalised import FASTEST, GAIN, PUSH, SparsityPenalty
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.activations.tensor_stream import TensorStream
from sparsary.training.calibrate import finish
from sparsary.training.objective import AuxSettings, LatentUsage, Objective

TOKENS, D, LATENTS = 31, 5, 13


def weights(n_latents=LATENTS, d=D):
    torch.manual_seed(1)
    return Weights(torch.randn(n_latents, d), torch.randn(n_latents), torch.randn(n_latents, d))


def prepared(encoder, n_latents=LATENTS):
    encoder.prepare(n_latents)
    return encoder


def loss_and_terms(sae, x):
    """Loss of one batch without auxiliary loss, in units of an fvu with variance 7."""
    objective = Objective(sae, 7.0, AuxSettings(0.0, 3))
    usage = LatentUsage(torch.zeros(sae.n_latents, dtype=torch.bool), torch.zeros(sae.n_latents, dtype=torch.float64))
    return objective(ActivationBatch(x), usage)


# ReLU.


def test_relu_keeps_every_positive_pre_activation():
    w, x = weights(), torch.randn(TOKENS, D)
    torch.testing.assert_close(prepared(ReLU())(x, w).to_dense(LATENTS), pre_activations(x, w).relu())


def test_relu_charges_values_times_norms():
    """Two latents with atoms of norm 5 and 2: 0.1 x (3 x 5 + 1 x 2 + 4 x 5) / (2 tokens x 2 dimensions)."""
    w = Weights(torch.eye(2), torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    code = prepared(ReLU(sparsity=0.1), 2)(torch.tensor([[3.0, 1.0], [4.0, -9.0]]), w)
    assert float(code.requests.penalties["sparsity"]) == pytest.approx(0.1 * 37 / 4)
    assert not prepared(ReLU(), 2).eval()(torch.ones(1, 2), w).requests.penalties


def test_rescaling_a_latent_changes_neither_penalty_nor_reconstruction():
    sae, x = SAE(D, LATENTS, ReLU()), torch.randn(TOKENS, D)
    with torch.no_grad():
        sae.b_enc.normal_()
    scales = torch.rand(LATENTS) * 5 + 0.2
    before, penalty = sae(x), sae.encode(x).requests.penalties["sparsity"]
    with torch.no_grad():
        sae.W_dec.mul_(scales[:, None])
        sae.W_enc.div_(scales[:, None])
        sae.b_enc.div_(scales)
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.encode(x).requests.penalties["sparsity"], penalty)


def test_the_penalty_is_in_the_loss_and_its_gradient_reaches_the_atoms():
    sae, x = SAE(D, LATENTS, ReLU(sparsity=0.3)), torch.randn(TOKENS, D)
    loss, terms = loss_and_terms(sae, x)
    code = sae.encode(x)
    by_hand = 0.3 * (code.to_dense(LATENTS) * sae.W_dec.norm(dim=-1)).sum() / (TOKENS * D)
    torch.testing.assert_close(terms.named["sparsity"], by_hand.detach())
    torch.testing.assert_close(loss, (sae.decode(code) - x).pow(2).sum(-1).mean() / 7 + by_hand)
    sae.encode(x).requests.penalties["sparsity"].backward()
    assert sae.W_dec.grad.abs().sum() > 0


def test_free_atoms_are_neither_renormalised_nor_projected():
    sae, x = SAE(D, LATENTS, ReLU()), torch.randn(TOKENS, D)
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    loss_and_terms(sae, x)[0].backward()
    before = sae.W_dec.grad.clone()
    sae.project_grad()
    sae.renormalize()
    assert torch.equal(sae.W_dec.grad, before)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((LATENTS,), 3.0))


def test_folding_norms_keeps_outputs():
    sae, x = SAE(D, LATENTS, ReLU()), torch.randn(TOKENS, D)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(LATENTS, 1) * 5 + 0.2)
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    sae.eval()
    before, norms, values = sae(x), sae.W_dec.norm(dim=-1), sae.encode(x).to_dense(LATENTS)
    sae.fold_norms()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(LATENTS))
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.encode(x).to_dense(LATENTS), values * norms)


STEERED = {
    "relu": lambda target=None, sparsity=0.1: ReLU(sparsity, target),
    "gated": lambda target=None, sparsity=0.1: Gated(sparsity, target),
    "tanh": lambda target=None, sparsity=0.1: JumpReLU(target, sparsity, penalty="tanh", start=3.0),
    "l0": lambda target=None, sparsity=0.1: JumpReLU(target, sparsity, penalty="l0", start=3.0),
}


@pytest.mark.parametrize("name", STEERED)
def test_the_controller_raises_the_weight_above_the_target_and_lowers_it_below(name):
    w, x = weights(), torch.randn(TOKENS, D)
    free = prepared(STEERED[name]())
    l0 = float(free(x, w).l0().double().mean())
    assert 3 < l0 < 10
    plain = float(free(x, w).requests.penalties["sparsity"].detach())
    for target, direction in ((l0 / 1.5, 1), (l0 * 1.2, -1), (l0, 0), (1, 1)):
        encoder = prepared(STEERED[name](target))
        if isinstance(encoder, JumpReLU):
            encoder.started.fill_(1)
        penalties = [float(encoder(x, w).requests.penalties["sparsity"].detach()) for _ in range(3)]
        # Up by a hundredth per batch at most; the batch itself answers at once, within a factor of two.
        ratio = min(l0 / target, 2.0)
        step = min(ratio**GAIN, FASTEST)
        assert float(encoder.controllers[0].factor) == pytest.approx(step**3, rel=1e-5)
        assert (penalties[2] > penalties[0]) - (penalties[2] < penalties[0]) == direction
        assert penalties[1] / penalties[0] == pytest.approx(step, rel=1e-5)
        assert penalties[0] == pytest.approx(plain * ratio**PUSH, rel=1e-5)


@pytest.mark.parametrize("name", STEERED)
def test_the_weight_rises_over_the_ramp_and_stays(name):
    w, x = weights(), torch.randn(TOKENS, D)
    encoder = prepared(STEERED[name]())
    encoder.ramp, found = 0.2, []
    for encoder.progress in (0.0, 0.05, 0.1, 0.2, 0.7, 1.0):
        found.append(float(encoder(x, w).requests.penalties["sparsity"].detach()))
    assert [each / found[-1] for each in found] == pytest.approx([0.0, 0.25, 0.5, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("target", [2, 3.5, 4])
@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu", "tanh"])
def test_calibration_brings_the_target_l0_about(name, target):
    encoder = JumpReLU(target) if name == "jumprelu" else STEERED[name](target)
    sae, x = SAE(D, LATENTS, encoder), torch.randn(3001, D)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
        if name == "gated":
            encoder.b_mag.normal_(std=0.3)
            encoder.r_mag.normal_(std=0.3)
        if isinstance(encoder, JumpReLU):
            encoder.log_threshold.copy_(torch.rand(LATENTS).log() / PACE)
            encoder.started.fill_(1)
    sae.eval()
    assert abs(float(sae.encode(x).l0().double().mean()) - target) > 0.05 * target
    assert sae.calibrate(iter(x.split(500)))
    assert float(sae.encode(x).l0().double().mean()) == pytest.approx(target, rel=1e-3)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    sae.calibrate(iter(x.split(700)))
    for key, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["relu", "gated", "tanh"])
def test_calibration_leaves_what_has_no_target_alone(name):
    sae = SAE(D, LATENTS, STEERED[name]())
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    assert not sae.calibrate([torch.randn(50, D)])
    assert all(torch.equal(tensor, before[key]) for key, tensor in sae.state_dict().items())


@pytest.mark.parametrize("cls", [ReLU, Gated])
def test_the_controller_rests_in_eval_and_without_a_target(cls):
    w, x = weights(), torch.randn(TOKENS, D)
    steered = prepared(cls(target_l0=1))
    steered(x, w)
    factor = steered.penalty.factor.clone()
    steered.eval()(x, w)
    assert torch.equal(steered.penalty.factor, factor)
    free = prepared(cls())
    free(x, w)
    assert float(free.penalty.factor) == 1.0


@pytest.mark.parametrize("start", [1.0, 3.0, 10.0])
def test_the_controller_keeps_up_with_a_weight_that_has_to_fall(start):
    """A plant whose l0 falls with the root of the weight, and whose needed weight halves over the last fifth."""
    controller, steps, paid, l0 = SparsityPenalty(), 500, 0.01, []
    for step in range(steps):
        need = 3.0 * min(1.0, 1 - 0.5 * (step - 0.8 * steps) / (0.2 * steps))
        l0.append(min(16 * (need / paid) ** 0.5, 500.0))
        push = controller.steer(torch.tensor(l0[-1]), 16, rests=step < 50)
        paid = max(start * min(1.0, step / 50), 0.01) * float(controller.factor) * float(push)
    assert l0[250] == pytest.approx(16, rel=0.02)
    assert l0[-1] == pytest.approx(16, rel=0.08)


def test_the_controller_reaches_its_target(planted):
    sae = SAE(17, 29, ReLU(sparsity=0.3, target_l0=4))
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    for step in range(300):
        loss_and_terms(sae, planted(53, step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    l0 = float(sae.encode(planted(2048, 999)).l0().double().mean())
    assert l0 == pytest.approx(4, rel=0.15)


# JumpReLU.


def test_jump_forward_and_the_paper_s_pseudo_derivatives():
    """theta 0.5, bandwidth 0.2: the window is 0.4 to 0.6; entries just below the threshold are silent but in the window."""
    a = torch.tensor([0.3, 0.45, 0.5, 0.55, 0.7, -0.1], dtype=torch.float64, requires_grad=True)
    theta = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    values, fires = Jump.apply(a, theta, 0.2)
    assert values.tolist() == [0, 0, 0, 0.55, 0.7, 0]
    assert fires.tolist() == [0, 0, 0, 1, 1, 0]
    to_values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    da, dtheta = torch.autograd.grad(values, (a, theta), to_values, retain_graph=True)
    assert da.tolist() == [0, 0, 0, 4, 5, 0]
    # - theta / bandwidth, times what comes in.
    assert dtheta.tolist() == pytest.approx([0, -5.0, -7.5, -10.0, 0, 0])
    da, dtheta = torch.autograd.grad(fires, (a, theta), to_values)
    assert da.tolist() == [0] * 6
    # - 1 / bandwidth, times what comes in.
    assert dtheta.tolist() == pytest.approx([0, -10.0, -15.0, -20.0, 0, 0])


def test_jumprelu_starts_at_a_multiple_of_the_target_l0():
    w, x = weights(), torch.randn(TOKENS, D)
    for target, start in ((1, 1.0), (2.5, 1.0), (4, 1.0), (2, 2.5)):
        encoder = prepared(JumpReLU(target_l0=target, start=start))
        encoder.progress = 0.0
        code = encoder(x, w)
        # The value at the level itself does not exceed it.
        assert int(code.l0().sum()) == pytest.approx(round(target * start * TOKENS), abs=1)
        assert len(encoder.thresholds().unique()) == 1
        assert float(code.requests.penalties["sparsity"].detach()) == pytest.approx((start - 1) ** 2, abs=0.05)
        before = encoder.thresholds().detach().clone()
        encoder.progress = THINNING
        code = encoder(3 * x, w)
        assert torch.equal(encoder.thresholds(), before)
        l0 = float(code.l0().double().mean())
        assert float(code.requests.penalties["sparsity"].detach()) == pytest.approx((l0 / target - 1) ** 2, rel=1e-4)


def test_jumprelu_is_thinned_out_first_and_left_alone_afterwards():
    w, x = weights(), torch.randn(200, D)
    encoder, found = prepared(JumpReLU(target_l0=1, start=5.0)), []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        encoder.progress = share * THINNING * 0.9999
        found.append(float(encoder(x, w).l0().double().mean()))
    assert found == pytest.approx([5 - 4 * share for share in (0.0, 0.25, 0.5, 0.75, 1.0)], rel=0.02)
    before = encoder.thresholds().detach().clone()
    # Fewer than are wanted are no reason to lower them.
    encoder.progress = 0.0
    encoder(x, w)
    torch.testing.assert_close(encoder.thresholds(), before)
    encoder.progress = 0.5
    encoder(2 * x, w)
    torch.testing.assert_close(encoder.thresholds(), before)


def test_jumprelu_starts_above_zero_where_less_is_positive_than_asked_for():
    w, x = weights(), torch.randn(TOKENS, D)
    encoder = prepared(JumpReLU(target_l0=4))
    encoder.progress = 0.0
    encoder(x, w)
    torch.testing.assert_close(encoder.thresholds(), torch.full((LATENTS,), 1e-3))


def test_jumprelu_without_a_target_needs_another_penalty_and_starts_low():
    with pytest.raises(ValueError, match=r"encoder\.target_l0: expected a number with penalty square, got none"):
        JumpReLU()
    encoder = prepared(JumpReLU(penalty="tanh"))
    encoder(torch.randn(TOKENS, D), weights())
    torch.testing.assert_close(encoder.thresholds(), torch.full((LATENTS,), 0.05), rtol=1e-2, atol=0)


def test_jumprelu_charges_by_number_or_by_tanh():
    w, x = weights(), torch.randn(TOKENS, D)
    for penalty in ("l0", "tanh"):
        encoder = prepared(JumpReLU(sparsity=0.7, penalty=penalty, steepness=1.5))
        code = encoder(x, w)
        cells = (
            (code.to_dense(LATENTS) * w.W_dec.norm(dim=-1) * 1.5).tanh() if penalty == "tanh" else code.to_dense(LATENTS) > 0
        )
        by_hand = (0.7 * cells.double().sum() / (TOKENS * D)).detach()
        assert float(code.requests.penalties["sparsity"].detach()) == pytest.approx(float(by_hand), rel=1e-5)


def test_the_tanh_charge_s_gradients_in_float64():
    """For pre-activations and norms; thresholds have pseudo-derivatives, by which firing more costs more."""
    w, x = weights(), torch.randn(TOKENS, D).double()
    encoder = prepared(JumpReLU(sparsity=0.7, penalty="tanh", bandwidth=1e-4)).double()

    def charge(W_enc, b_enc, W_dec):
        return encoder(x, Weights(W_enc, b_enc, W_dec)).requests.penalties["sparsity"]

    assert torch.autograd.gradcheck(charge, [each.double().requires_grad_(True) for each in (w.W_enc, w.b_enc, w.W_dec)])
    encoder.bandwidth = 1.0
    charge(w.W_enc.double(), w.b_enc.double(), w.W_dec.double()).backward()
    assert (encoder.log_threshold.grad < 0).any()
    assert (encoder.log_threshold.grad <= 0).all()


def test_a_dead_jumprelu_latent_comes_back():
    """Its threshold is far above all it sees: nothing but the term on dead latents reaches it."""
    torch.manual_seed(7)
    for weight, returns in ((0.03, True), (0.0, False)):
        sae = SAE(8, 12, JumpReLU(2, pre_act_loss=weight, start=1.0))
        sae.encode(torch.randn(256, 8))
        with torch.no_grad():
            sae.encoder.log_threshold[:4] = torch.tensor(8.0).log() / PACE
        dead = torch.zeros(12, dtype=torch.bool)
        dead[:4] = True
        objective, usage = Objective(sae, 8.0, AuxSettings(1 / 32, 4)), LatentUsage(dead, torch.zeros(12).double())
        optimizer, fired = torch.optim.Adam(sae.parameters(), 3e-3), 0
        for step in range(150):
            loss, terms = objective(ActivationBatch(torch.randn(256, 8)), usage)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                # Down; where nothing else reaches them.
                assert bool((sae.encoder.log_threshold.grad[:4] > 0).all()) == returns
            optimizer.step()
            sae.renormalize()
            fired += int(terms.firings[:4].sum())
        assert (fired > 0) == returns


def test_jumprelu_in_eval_keeps_what_exceeds_the_threshold_unchanged():
    w, x = weights(), torch.randn(TOKENS, D)
    encoder = prepared(JumpReLU(target_l0=3)).eval()
    with torch.no_grad():
        encoder.log_threshold.copy_(torch.linspace(-0.3, 0.08, LATENTS))
    a, theta = pre_activations(x, w), encoder.thresholds()
    code = encoder(x, w)
    torch.testing.assert_close(code.to_dense(LATENTS), a * (a > theta))
    assert (code.values > 0).all()
    assert not code.requests.penalties
    torch.testing.assert_close(theta, torch.linspace(-0.3, 0.08, LATENTS).mul(PACE).exp())


def test_jumprelu_penalty_is_the_squared_distance_from_the_target():
    w, x = weights(), torch.randn(TOKENS, D)
    encoder = prepared(JumpReLU(target_l0=2, sparsity=3.0, start=1.0))
    encoder(x, w)
    with torch.no_grad():
        encoder.log_threshold.sub_(0.1)
    code = encoder(x, w)
    l0 = float(code.l0().double().mean())
    assert l0 > 3
    assert float(code.requests.penalties["sparsity"].detach()) == pytest.approx(3.0 * (l0 / 2 - 1) ** 2, rel=1e-5)


def test_jumprelu_thresholds_hear_of_every_entry_in_the_window():
    """Against the formula on the dense matrix: the code leaves out what is far below the threshold, and nothing else."""
    w, x = weights(), torch.randn(TOKENS, D)
    encoder = prepared(JumpReLU(target_l0=3, sparsity=0.7, bandwidth=0.5, start=1.0))
    encoder(x, w)
    with torch.no_grad():
        encoder.log_threshold.add_(torch.linspace(-0.05, 0.02, LATENTS))
    code = encoder(x, w)
    downstream = torch.randn(TOKENS, LATENTS)
    ((code.to_dense(LATENTS) * downstream).sum() + code.requests.penalties["sparsity"]).backward()
    a, theta = pre_activations(x, w), encoder.thresholds().detach()
    window = ((a - theta).abs() < 0.25).float() / 0.5
    below = window * (a <= theta)
    assert below.sum() > 5
    l0 = float((a > theta).sum() / TOKENS)
    of_l0 = 0.7 * 2 * (l0 / 3 - 1) / (3 * TOKENS)
    expected = -(window * (theta * downstream + of_l0)).sum(0) * theta * PACE
    torch.testing.assert_close(encoder.log_threshold.grad, expected, rtol=1e-4, atol=1e-5)


# Gated.


def gated(train=True):
    encoder = prepared(Gated(sparsity=0.2)).train(train)
    with torch.no_grad():
        encoder.r_mag.normal_(std=0.5)
        encoder.b_mag.normal_()
    return encoder


def test_gated_is_jumprelu_with_rescaled_weights():
    """With ``a = exp(r) (W x) + b_mag`` the gate opens where ``a`` exceeds ``b_mag - exp(r) b_enc``."""
    w, x = weights(), torch.randn(TOKENS, D)
    encoder = gated()
    scale = encoder.r_mag.exp()
    a = (x @ w.W_enc.T) * scale + encoder.b_mag
    theta = encoder.b_mag - scale * w.b_enc
    expected = a * (a > theta.clamp_min(0))
    assert ((theta > 0.2).sum(), (theta < -0.2).sum()) > (2, 2)
    for mode in (True, False):
        torch.testing.assert_close(encoder.train(mode)(x, w).to_dense(LATENTS), expected)


def test_gated_penalty_is_the_open_gates():
    w, x = weights(), torch.randn(TOKENS, D)
    code = gated()(x, w)
    expected = 0.2 * pre_activations(x, w).relu().sum() / (TOKENS * D)
    torch.testing.assert_close(code.requests.penalties["sparsity"], expected)
    torch.testing.assert_close(code.requests.frozen.to_dense(LATENTS), pre_activations(x, w).relu())
    assert gated(train=False)(x, w).requests.frozen is None


def test_the_frozen_term_trains_the_gate_and_moves_neither_atoms_nor_the_decoder_s_bias():
    sae, x = SAE(D, LATENTS, gated()), torch.randn(TOKENS, D)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    objective = Objective(sae, 7.0, AuxSettings(0.0, 3))
    usage = LatentUsage(torch.zeros(LATENTS, dtype=torch.bool), torch.zeros(LATENTS, dtype=torch.float64))
    code = sae.encode(x)
    terms = objective.extra(ActivationBatch(x), code, x, sae.decode(code), usage)
    gate = pre_activations(x - sae.b_dec, sae.weights).relu()
    by_hand = (gate @ sae.W_dec + sae.b_dec - x).pow(2).sum(-1).mean() / 7
    torch.testing.assert_close(terms["frozen"], by_hand)
    terms["frozen"].backward()
    assert sae.W_dec.grad is None
    assert sae.W_enc.grad.abs().sum() > 0
    # b_dec is also what the encoder's input is centred by; that is all it hears of.
    torch.testing.assert_close(sae.b_dec.grad, -sae.b_enc.grad @ sae.W_enc.detach())
    # Without the detachment there would be more.
    torch.testing.assert_close(objective(ActivationBatch(x), usage)[1].named["frozen"], by_hand.detach())


# Matryoshka.


def matryoshka(shares=(0.25, 0.5, 1.0)):
    sae = SAE(D, LATENTS, Matryoshka(3, list(shares)))
    with torch.no_grad():
        sae.b_dec.normal_()
    sae.in_scale.fill_(1.3)
    sae.out_scale.fill_(1.3)
    return sae


def test_prefix_widths_are_rounded_shares_of_the_dictionary():
    assert prepared(Matryoshka(3, [0.25, 0.5, 1.0])).prefixes() == (3, 6, 13)
    assert prepared(Matryoshka(3), 1024).prefixes() == (64, 128, 256, 512, 1024)
    assert prepared(Matryoshka(1, [0.01, 1.0])).prefixes() == (1, 13)


def test_the_loss_is_the_mean_over_prefixes_of_what_each_reconstructs_alone():
    sae, x = matryoshka(), torch.randn(TOKENS, D)
    loss, terms = loss_and_terms(sae, x)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    dense = sae.encode(x).to_dense(LATENTS)
    guesses = [(dense[:, :width] @ sae.W_dec[:width] + sae.b_dec) * 1.3 for width in (3, 6, 13)]
    errors = [normalized_mse(x, guess, torch.tensor(7.0)) for guess in guesses]
    by_hand = sum(errors) / 3
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(terms.named["fvu"], errors[-1].detach())
    assert len({float(error.detach()) for error in errors}) == 3
    by_hand.backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_one_prefix_is_batch_topk():
    sae, x = matryoshka((1.0,)), torch.randn(TOKENS, D)
    plain = SAE(D, LATENTS, ENCODERS["batch_topk"](k=3))
    plain.load_state_dict(sae.state_dict())
    torch.testing.assert_close(loss_and_terms(sae, x)[0], loss_and_terms(plain, x)[0])
    assert not plain.encode(x).requests.prefixes


def test_evaluation_knows_no_prefixes():
    sae, x = matryoshka(), torch.randn(TOKENS, D)
    sae.encode(x)
    assert sae.eval().encode(x).requests.prefixes == ()


@pytest.mark.parametrize("shares", [[], [0.5], [0.5, 0.25, 1.0], [0.5, 0.5, 1.0], [0.0, 1.0], [-0.1, 1.0], [0.5, 1.0, 2.0]])
def test_wrong_shares_are_refused(shares):
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.shares: expected ascending shares above 0, the last one 1"):
        Matryoshka(3, shares)


# Matching pursuit.


def test_a_tied_dictionary_has_one_matrix_in_memory_and_on_disk(tmp_path, assert_same_tensors):
    sae = SAE(D, LATENTS, MatchingPursuit(3))
    assert sae.W_enc is None
    assert sae.b_enc is None
    assert sae.weights.W_enc is sae.W_dec
    assert {name for name, _ in sae.named_parameters()} == {"W_dec", "b_dec"}
    sae.save(tmp_path / "d")
    saved = load_file(tmp_path / "d" / "dictionary.safetensors")
    assert [name for name, tensor in saved.items() if tensor.ndim == 2] == ["W_dec"]
    again = load_dictionary(tmp_path / "d")
    assert again.W_enc is None
    assert_same_tensors(again, sae)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_norms_of_a_pursuit_are_free_if_asked_for(tmp_path, unit_norm):
    sae = SAE(D, LATENTS, MatchingPursuit(3, unit_norm=unit_norm))
    assert sae.arguments()["encoder"] == {"name": "matching_pursuit", "k": 3, "tolerance": 0.0} | (
        {} if unit_norm else {"unit_norm": False}
    )
    with torch.no_grad():
        sae.W_dec.mul_(0.8)
    sae.renormalize()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((LATENTS,), 1.0 if unit_norm else 0.8))
    # At the end of training too: the norms belong to the function.
    x, stream = torch.randn(TOKENS, D), TensorStream([torch.randn(TOKENS, D)], 1)
    before = sae(x).detach()
    finish(sae, stream, TOKENS, TOKENS)
    torch.testing.assert_close(sae(x).detach(), before)
    sae.save(tmp_path / "d")
    assert load_dictionary(tmp_path / "d").encoder.unit_norm == unit_norm


def test_more_steps_at_inference_lower_the_error():
    sae, x = SAE(D, 101, MatchingPursuit(2)).eval(), torch.randn(TOKENS, D)
    errors = []
    for k in (1, 2, 3, 5, 8, 40):
        sae.encoder.k = k
        with torch.no_grad():
            errors.append((sae(x) - x).pow(2).sum(-1))
    for more, less in zip(errors[1:], errors[:-1], strict=True):
        assert (more <= less * (1 + 1e-5) + 1e-10).all()
    means = [float(error.mean()) for error in errors]
    assert all(more < less for more, less in zip(means[1:], means[:-1], strict=True))
    assert means[-1] < 0.05 * means[0]


def test_a_tolerance_at_inference_gives_every_token_the_steps_it_needs():
    torch.manual_seed(4)
    sae = SAE(17, 53, MatchingPursuit(3)).eval()
    x = torch.randn(TOKENS, 53).relu().pow(3) @ sae.W_dec.detach() / 9
    sae.encoder.k = 200
    for tolerance in (0.5, 0.3, 0.1):
        sae.encoder.tolerance = tolerance
        with torch.no_grad():
            code = sae.encode(x)
            error = (sae.decode(code) - x).norm(dim=-1) / x.norm(dim=-1)
        steps = code.where(code.values > 0).entries_per_token()
        assert (error <= tolerance).all()
        assert len(steps.unique()) > 2
        assert int(steps.max()) < 200
        # One step fewer would not have done.
        one_less = copy.deepcopy(sae)
        one_less.encoder.tolerance = 0.0
        for token in (0, 7, 20):
            one_less.encoder.k = int(steps[token]) - 1
            row = x[token : token + 1]
            with torch.no_grad():
                assert (one_less(row) - row).norm() / row.norm() > tolerance


def test_one_step_is_topk_with_one_latent():
    pursuit, plain = SAE(D, LATENTS, MatchingPursuit(1)), SAE(D, LATENTS, ENCODERS["topk"](k=1))
    with torch.no_grad():
        plain.W_dec.copy_(pursuit.W_dec)
        plain.copy_atoms_to_encoder()
    x = torch.randn(TOKENS, D)
    torch.testing.assert_close(pursuit(x), plain(x))


def test_outside_an_sae_the_rows_of_the_encoder_are_pursued_at_norm_1():
    w, x = weights(), torch.randn(TOKENS, D)
    code = prepared(MatchingPursuit(4))(x, w)
    unit = F.normalize(w.W_enc, dim=-1)
    same = prepared(MatchingPursuit(4))(x, Weights(unit, None, unit))
    assert torch.equal(code.latents, same.latents)
    torch.testing.assert_close(code.values, same.values)
