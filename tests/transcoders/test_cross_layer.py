"""Cross-layer transcoders against their definition, per-layer ones, and themselves site by site."""

import pytest
import torch

from sparsary.sae import ENCODERS, load_dictionary
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats.conversion import from_dictionary, to_dictionary
from sparsary.sae.metrics import Moments
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.initialize import initialize
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.transcoders import CrossLayerTranscoder, Transcoder

TOKENS, LAYERS, D_IN, D_OUT, HERE = 13, 3, 5, 7, 17
VARIANTS = {
    "topk": ({"name": "topk", "k": 2}, False),
    "joint": ({"name": "topk", "k": 2}, True),
    "jumprelu": ({"name": "jumprelu", "target_l0": 3, "bandwidth": 0.3}, False),
    "relu": ({"name": "relu", "sparsity": 0.1, "target_l0": 3}, False),
    "relu_joint": ({"name": "relu", "sparsity": 0.1, "target_l0": 3}, True),
    "jumprelu_joint": ({"name": "jumprelu", "penalty": "tanh", "target_l0": 3, "bandwidth": 0.3}, True),
}


@pytest.fixture(params=VARIANTS)
def clt(request):
    return made(*VARIANTS[request.param])


def made(spec, joint, skip=False):
    torch.manual_seed(3)
    clt = CrossLayerTranscoder(LAYERS, LAYERS * D_IN, LAYERS * D_OUT, LAYERS * HERE, build_encoder(spec), joint, skip)
    with torch.no_grad():
        for weights in (*clt.b_enc, clt.b_dec, clt.in_centre):
            weights.copy_(0.3 * torch.randn(weights.shape))
        for scale in (clt.in_scale, clt.out_scale):
            scale.copy_(torch.rand(LAYERS).add(0.5).repeat_interleave(scale.shape[0] // LAYERS))
        # Last, so that all else is the same with and without.
        for weights in clt.W_skip or ():
            weights.normal_()
    for _ in range(4):
        clt.encode(torch.randn(10, LAYERS * D_IN))
    return clt.eval()


def dense(clt, x, code):
    """The definition, layer by layer and target by target."""
    values = code.to_dense(LAYERS * HERE).view(len(x), LAYERS, HERE)
    out = []
    for m in range(LAYERS):
        y = clt.b_dec[m * D_OUT : (m + 1) * D_OUT]
        for layer in range(m + 1):
            first = (m - layer) * D_OUT
            y = y + values[:, layer] @ clt.W_dec[layer][:, first : first + D_OUT]
        out.append(y)
    return torch.cat(out, 1) * clt.out_scale


def test_the_output_is_the_definition_s(clt):
    x = torch.randn(TOKENS, LAYERS * D_IN)
    code = clt.encode(x)
    assert code.l0().sum() > TOKENS
    torch.testing.assert_close(clt(x), dense(clt, x, code))
    torch.testing.assert_close(clt(x), (code.to_dense(LAYERS * HERE) @ clt.atoms + clt.b_dec) * clt.out_scale)


def test_a_skip_reaches_its_own_layer_alone(tmp_path, assert_same_tensors):
    plain, clt = (made(*VARIANTS["topk"], skip) for skip in (False, True))
    x = torch.randn(TOKENS, LAYERS * D_IN)
    inputs, codes = x / clt.in_scale - clt.in_centre, []
    for i, (skipped, scale) in enumerate(zip(clt.W_skip, clt.out_scale.view(LAYERS, D_OUT), strict=True)):
        here, there = slice(i * D_IN, (i + 1) * D_IN), slice(i * D_OUT, (i + 1) * D_OUT)
        expected = plain(x)[:, there] + inputs[:, here] @ skipped.T * scale
        torch.testing.assert_close(clt(x)[:, there], expected)
        codes.append(clt.encode_at(i, x[:, here]))
        torch.testing.assert_close(clt.decode_at(i, codes, x[:, here]), expected)
    for call in (lambda: clt.decode(clt.encode(x)), lambda: clt.decode_at(0, codes), clt.bypass):
        with pytest.raises(ValueError, match="expected the raw input, because this transcoder has a skip path"):
            call()
    clt.save(tmp_path, {})
    assert_same_tensors(load_dictionary(tmp_path), clt)
    # In the form that other libraries' files are read into, skips read raw inputs.
    torch.testing.assert_close(to_dictionary(from_dictionary(clt))(x), clt(x))
    assert "skip" not in plain.arguments()


def test_a_layer_s_latents_read_that_layer_alone(clt):
    x = torch.randn(TOKENS, LAYERS * D_IN)
    other = x.clone()
    other[:, D_IN : 2 * D_IN] = torch.randn(TOKENS, D_IN)
    changed = (clt.encode(x).to_dense(LAYERS * HERE) != clt.encode(other).to_dense(LAYERS * HERE)).any(0).view(LAYERS, HERE)
    assert changed.any(1).tolist() == [False, True, False]
    moved = (clt(x) != clt(other)).any(0).view(LAYERS, D_OUT).any(1)
    assert moved.tolist() == [False, True, True]


def test_site_by_site_it_is_the_same(clt):
    x = torch.randn(TOKENS, LAYERS * D_IN)
    whole, codes = clt(x), []
    for layer in range(LAYERS):
        codes.append(clt.encode_at(layer, x[:, layer * D_IN : (layer + 1) * D_IN]))
        part = whole[:, layer * D_OUT : (layer + 1) * D_OUT]
        torch.testing.assert_close(clt.decode_at(layer, codes), part)
    with pytest.raises(ValueError, match=rf"x: expected \(tokens, {D_IN}\)"):
        clt.encode_at(0, x)


def test_gradients_equal_the_dense_route(clt):
    clt.double().train()
    x, target = torch.randn(TOKENS, LAYERS * D_IN).double(), torch.randn(TOKENS, LAYERS * D_OUT).double()
    state, gradients = {name: t.clone() for name, t in clt.state_dict().items()}, []
    for plain in (False, True):
        clt.load_state_dict(state)
        clt.zero_grad()
        code = clt.encode(x)
        ((dense(clt, x, code) if plain else clt.decode(code)) - target).pow(2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in clt.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() >= {f"W_dec.{i}" for i in range(LAYERS)}
    for name, sparse in gradients[0].items():
        torch.testing.assert_close(sparse, gradients[1][name], rtol=1e-6, atol=1e-8, msg=name)


def test_joint_selection_keeps_the_strongest_of_all_layers_together():
    clt = made(*VARIANTS["joint"]).train()
    with torch.no_grad():
        for layer in range(LAYERS):
            clt.W_enc[layer].mul_(layer + 1)
    x = torch.randn(TOKENS, LAYERS * D_IN)
    code = clt.encode(x)
    inside = clt.normalised(x)
    scores = torch.cat([inside[:, b.reads] @ b.weights.W_enc.T + b.weights.b_enc for b in clt.blocks], 1)
    best = scores.flatten().topk(TOKENS * 2 * LAYERS)
    expected = torch.zeros(scores.numel()).scatter(0, best.indices, best.values.relu()).view(scores.shape)
    torch.testing.assert_close(code.to_dense(LAYERS * HERE), expected)
    # Whatever is guessed of the next batch's level.
    level = float(best.values.detach()[-1])
    for guess in (None, -100.0, level - 1e-4, level + 0.5, 100.0):
        clt._cut = guess
        torch.testing.assert_close(clt.encode(x).to_dense(LAYERS * HERE), expected)
    per_layer = (expected.view(TOKENS, LAYERS, HERE) > 0).sum((0, 2))
    assert per_layer[2] > per_layer[0]


def test_joint_selection_has_the_same_l0_by_its_threshold_once_calibrated():
    clt = made(*VARIANTS["joint"])
    batches = [torch.randn(401, LAYERS * D_IN) for _ in range(5)]
    assert clt.calibrate(iter(batches))
    l0 = torch.cat([clt.encode(x).l0() for x in batches]).float().mean()
    assert float(l0) == pytest.approx(2 * LAYERS, rel=0.01)
    with pytest.raises(ValueError, match="expected tokens to calibrate"):
        clt.calibrate(iter([]))
    assert not made(*VARIANTS["topk"]).calibrate(iter(batches))


def test_a_joint_one_that_was_never_trained_says_so():
    clt = CrossLayerTranscoder(2, 4, 6, 8, ENCODERS["topk"](k=1), joint=True).eval()
    with pytest.raises(ValueError, match="no threshold is known before the first training batch"):
        clt.encode(torch.randn(3, 4))


def test_without_decoders_to_later_layers_it_is_a_stack_of_transcoders():
    clt = made(*VARIANTS["topk"])
    alone = []
    with torch.no_grad():
        for i, (site, block) in enumerate(zip(clt.sites, clt.blocks, strict=True)):
            clt.W_dec[i][:, D_OUT:] = 0
            transcoder = Transcoder(D_IN, D_OUT, HERE, ENCODERS["topk"](k=2))
            transcoder.W_enc.copy_(block.weights.W_enc)
            transcoder.b_enc.copy_(block.weights.b_enc)
            transcoder.W_dec.copy_(block.weights.W_dec[:, :D_OUT])
            transcoder.b_dec.copy_(clt.b_dec[site.writes])
            transcoder.in_centre.copy_(clt.in_centre[site.reads])
            transcoder.in_scale.copy_(clt.in_scale[site.reads][0])
            transcoder.out_scale.copy_(clt.out_scale[site.writes][0])
            alone.append(transcoder)
    x = torch.randn(TOKENS, LAYERS * D_IN)
    apart = [transcoder(x[:, site.reads]) for transcoder, site in zip(alone, clt.sites, strict=True)]
    torch.testing.assert_close(clt(x), torch.cat(apart, 1))


def test_saved_then_loaded_is_bit_equal(clt, tmp_path, assert_same_tensors):
    x = torch.randn(TOKENS, LAYERS * D_IN)
    clt.save(tmp_path / "d")
    again = load_dictionary(tmp_path / "d")
    assert again.arguments() == clt.arguments()
    assert_same_tensors(again, clt)
    torch.testing.assert_close(again(x), clt(x))


def test_a_latent_is_one_contiguous_row_of_unit_norm(clt):
    for layer, W_dec in enumerate(clt.W_dec):
        assert W_dec.shape == (HERE, (LAYERS - layer) * D_OUT)
        assert W_dec.is_contiguous()
    clt.renormalize()
    if clt.encoder.unit_atoms:
        torch.testing.assert_close(clt.atoms.norm(dim=-1), torch.ones(LAYERS * HERE))


def test_a_schedule_moves_every_layer_s_encoder():
    clt = made(*VARIANTS["topk"])
    clt.encoder.k = 4
    assert clt.encode(torch.randn(TOKENS, LAYERS * D_IN)).entries_per_token().tolist() == [4 * LAYERS] * TOKENS


def test_every_layer_counts_alike_in_the_loss():
    """A layer whose outputs are a thousand times larger does not drown the others: the loss is the mean of the fvus."""
    clt = made(*VARIANTS["topk"])
    y = torch.randn(4001, LAYERS, D_OUT) * torch.tensor([1.0, 1000.0, 0.01])[:, None]
    y, x = y.flatten(1), torch.randn(4001, LAYERS * D_IN)
    targets = Moments(LAYERS * D_OUT)
    targets.update(y)
    unused = LatentUsage(torch.zeros(LAYERS * HERE, dtype=torch.bool), torch.zeros(LAYERS * HERE, dtype=torch.float64))
    with torch.no_grad():
        clt.out_scale.fill_(1.0)
        for W_dec in clt.W_dec:
            W_dec.zero_()
        clt.b_dec.copy_(y.mean(0))
        clt.b_dec[D_OUT : 2 * D_OUT] = y.mean(0)[D_OUT : 2 * D_OUT]
    loss, _ = Objective(clt, clt.error_scale(targets), AuxSettings(0.0, 3))(ActivationBatch(x, y), unused)
    assert float(loss.detach()) == pytest.approx(1.0, rel=1e-3)
    with torch.no_grad():
        clt.b_dec[2 * D_OUT :] += y[:, 2 * D_OUT :].std(0)
    loss, _ = Objective(clt, clt.error_scale(targets), AuxSettings(0.0, 3))(ActivationBatch(x, y), unused)
    assert float(loss.detach()) == pytest.approx(4 / 3, rel=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_and_its_dead_latents_come_back(variant):
    torch.manual_seed(4)
    spec, joint = VARIANTS[variant]
    clt = CrossLayerTranscoder(LAYERS, LAYERS * D_IN, LAYERS * D_OUT, LAYERS * HERE, build_encoder(spec), joint)
    first = torch.randn(4000, D_IN)
    x = torch.cat([first, first + 0.3 * torch.randn(4000, D_IN), torch.randn(4000, D_IN)], 1)
    y = torch.cat([x[:, :D_IN].relu() @ torch.randn(D_IN, D_OUT), x[:, D_IN:].relu() @ torch.randn(2 * D_IN, 2 * D_OUT)], 1)
    inputs, targets = Moments(LAYERS * D_IN), Moments(LAYERS * D_OUT)
    inputs.update(x)
    targets.update(y)
    initialize(clt, ActivationBatch(x, y), inputs, targets, "scale", "data")
    objective = Objective(clt, clt.error_scale(targets), AuxSettings(1 / 32, 3))
    optimizer = torch.optim.Adam(clt.parameters(), 3e-3)
    with torch.no_grad():
        clt.W_enc[1][:5] *= 0.01
        clt.b_enc[1][:5] = -20 * (not joint)
    dead = torch.zeros(LAYERS * HERE, dtype=torch.bool)
    dead[HERE : HERE + 5] = True
    usage, losses = LatentUsage(dead, torch.zeros(LAYERS * HERE, dtype=torch.float64)), []
    for step in range(150):
        rows = torch.arange(step * 101, step * 101 + 101) % 4000
        loss, terms = objective(ActivationBatch(x[rows], y[rows]), usage)
        loss.backward()
        if step == 0:
            assert terms.named["aux"] > 0
            assert clt.W_enc[1].grad[:5].abs().sum() > 0 or clt.W_dec[1].grad[:5].abs().sum() >= 0
        clt.project_grad()
        optimizer.step()
        optimizer.zero_grad()
        clt.renormalize()
        losses.append(float(terms.named["fvu"]))
    # Penalised codes begin with most latents on and are thinned out meanwhile.
    assert sum(losses[-20:]) < (0.7 if "k" in spec else 0.95) * sum(losses[5:25])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 7}, r"dictionary\.d_in: expected a multiple of the 2 layers, got 7"),
        ({"n_latents": 9}, r"dictionary\.n_latents: expected a multiple of the 2 layers, got 9"),
        ({"encoder": {"name": "gated"}}, r"encoder\.name: expected one of topk, jumprelu, relu for a cross-layer transcoder"),
        (
            {"encoder": {"name": "gated"}, "joint": True},
            r"expected one of topk, jumprelu, relu for choosing from all layers together, got 'gated'",
        ),
        (
            {"encoder": {"name": "jumprelu", "target_l0": 3}, "joint": True},
            r"encoder\.penalty: expected l0 or tanh with joint",
        ),
        ({"encoder": {"name": "topk", "k": 5}}, r"encoder\.k: expected at most n_latents = 4, got 5"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    arguments = {"n_layers": 2, "d_in": 4, "d_out": 6, "n_latents": 8, "encoder": {"name": "topk", "k": 1}} | change
    with pytest.raises(ValueError, match=message):
        CrossLayerTranscoder(**arguments | {"encoder": build_encoder(arguments["encoder"])})


# Penalties.


@pytest.mark.parametrize("encoder", [{"name": "relu", "sparsity": 1.0}, {"name": "jumprelu", "penalty": "l0"}], ids=str)
def test_a_latent_costs_the_same_in_every_layer(encoder):
    """Its row is longer the earlier its layer is: it writes to more layers."""
    torch.manual_seed(3)
    clt = CrossLayerTranscoder(LAYERS, LAYERS * D_IN, LAYERS * D_OUT, LAYERS * HERE, build_encoder(encoder)).double()
    x = torch.randn(64, LAYERS * D_IN).double()
    penalty = clt.encode(x).requests.penalties["sparsity"]
    code = clt.encode(x)
    if encoder["name"] == "jumprelu":
        per_layer = code.firings(clt.n_latents).view(LAYERS, HERE).sum(1) / len(x)
        assert float(penalty.detach()) == pytest.approx(float(per_layer.sum()) / (LAYERS * D_OUT))
        return
    for layer in range(LAYERS):
        slope = torch.autograd.grad(penalty, clt.b_enc[layer], retain_graph=True)[0]
        rate = code.firings(clt.n_latents).view(LAYERS, HERE)[layer] / len(x) * clt.W_dec[layer].norm(dim=1)
        torch.testing.assert_close(slope[rate > 0] / rate[rate > 0], torch.full_like(rate[rate > 0], 1 / (LAYERS * D_OUT)))


@pytest.mark.parametrize("joint", [False, True])
def test_one_weight_is_steered_by_the_l0_of_all_layers_or_one_by_each_layer_s(joint):
    spec = {"name": "relu", "sparsity": 0.3, "target_l0": 4}
    clt = made(spec, joint).train()
    with torch.no_grad():
        for layer, bias in enumerate(clt.b_enc):
            bias.fill_(0.5 - layer)
    for _ in range(5):
        clt.encode(torch.randn(50, LAYERS * D_IN))
    factors = [float(encoder.penalty.factor) for encoder in clt.encoders]
    assert (len(set(factors)) == 1) == joint
    # Told of the mean, and what the batch itself pays is the mean's answer too.
    x = torch.randn(50, LAYERS * D_IN)
    code = clt.encode(x)
    norms = torch.cat([W_dec.norm(dim=1) for W_dec in clt.W_dec])
    l0 = code.firings(clt.n_latents).view(LAYERS, HERE).sum(1) / len(x)
    paid = (code.to_dense(clt.n_latents) * norms).sum(0).view(LAYERS, HERE).sum(1) / (len(x) * D_OUT)
    ratios = (l0.mean().expand(LAYERS) if joint else l0) / 4
    expected = (0.3 * torch.tensor(factors) * ratios.clamp(0.5, 2) * paid).mean()
    torch.testing.assert_close(code.requests.penalties["sparsity"], expected)


@pytest.mark.parametrize("variant", ["relu", "relu_joint", "jumprelu", "jumprelu_joint"])
def test_calibration_meets_the_target_in_every_layer_or_on_their_mean(variant):
    spec, joint = VARIANTS[variant]
    clt, x = made(spec, joint), torch.randn(4001, LAYERS * D_IN)
    with torch.no_grad():
        for layer, bias in enumerate(clt.b_enc):
            bias.add_(0.4 * layer)
    assert clt.calibrate(iter(x.split(1000)))
    l0 = clt.encode(x).firings(clt.n_latents).view(LAYERS, HERE).sum(1) / len(x)
    assert float(l0.mean()) == pytest.approx(3, rel=1e-2)
    assert bool(((l0 - 3).abs() < 0.05).all()) != joint


def test_dead_latents_of_every_layer_are_brought_back_to_their_thresholds():
    clt = made({"name": "jumprelu", "target_l0": 3, "bandwidth": 0.3}, False).train()
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.log_threshold[2] = 1.0
    dead = torch.zeros(LAYERS * HERE, dtype=torch.bool)
    dead[2::HERE] = True
    objective = Objective(clt, torch.ones(LAYERS * D_OUT), AuxSettings(0.0, 3))
    loss, terms = objective(
        ActivationBatch(torch.randn(50, LAYERS * D_IN), torch.randn(50, LAYERS * D_OUT)), LatentUsage(dead, dead.double())
    )
    loss.backward()
    assert terms.named["pre_act"] > 0
    for encoder in clt.encoders:
        assert encoder.log_threshold.grad[2] > 0
