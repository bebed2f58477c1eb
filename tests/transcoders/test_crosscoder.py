"""Crosscoders against their definition and a plain formula; latents of planted atoms that one site alone has."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsary.sae import ENCODERS, load_dictionary
from sparsary.sae.checkpoint_files import write_dictionary_files
from sparsary.sae.encoders import build_encoder
from sparsary.sae.metrics import Moments
from sparsary.sae.sparse_grad import drop_ledger, keep_ledger
from sparsary.sae.sparse_ops import row_norms
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.initialize import initialize
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.transcoders import Crosscoder

TOKENS, WIDTHS, LATENTS = 13, (5, 3, 7), 29
D = sum(WIDTHS)


def made(spec, widths=WIDTHS, **options):
    torch.manual_seed(3)
    crosscoder = Crosscoder(widths, LATENTS, build_encoder(spec), **options)
    with torch.no_grad():
        if crosscoder.W_enc is not None:
            crosscoder.W_enc.add_(0.1 * torch.randn_like(crosscoder.W_enc))
            crosscoder.b_enc.copy_(0.1 * torch.randn(LATENTS))
        crosscoder.b_dec.copy_(0.3 * torch.randn(sum(widths)))
        for site, scale in zip(crosscoder.sites, (1.7, 0.4, 2.5), strict=False):
            crosscoder.in_scale[site.reads] = crosscoder.out_scale[site.writes] = scale
    # A few batches, so that what is measured in training is known.
    for _ in range(4):
        crosscoder.encode(torch.randn(10, sum(widths)), torch.randn(10, sum(widths)))
    return crosscoder.eval()


@pytest.fixture(params=sorted(ENCODERS))
def crosscoder(request, encoder_arguments):
    return made({"name": request.param, **encoder_arguments[request.param]})


def test_reconstructions_are_the_sum_of_each_site_s_rows(crosscoder):
    x = torch.randn(TOKENS, D)
    values = crosscoder.encode(x).to_dense(LATENTS)
    assert (values != 0).sum() > TOKENS
    for site, x_hat in enumerate(crosscoder(crosscoder.split(x))):
        expected = values @ crosscoder.decoder(site) + crosscoder.bias(site)
        torch.testing.assert_close(x_hat, expected, rtol=1e-4, atol=1e-5)


def test_it_is_the_plain_formula():
    x = [torch.randn(TOKENS, width) for width in WIDTHS]
    for centred in (True, False):
        crosscoder = made({"name": "topk", "k": 4}, apply_b_dec_to_input=centred)
        pre = crosscoder.b_enc.clone()
        for site, part in enumerate(x):
            centre = crosscoder.bias(site) if centred else 0.0
            pre = pre + (part - centre) @ crosscoder.reader(site).T
        best = pre.topk(4, dim=-1)
        z = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
        torch.testing.assert_close(crosscoder.encode(x).to_dense(LATENTS), z)
        for site, x_hat in enumerate(crosscoder(x)):
            torch.testing.assert_close(x_hat, z @ crosscoder.decoder(site) + crosscoder.bias(site))


def test_inputs_are_taken_and_given_back_in_any_form(crosscoder):
    x = torch.randn(2, TOKENS, D)
    y = crosscoder(x)
    listed = crosscoder(crosscoder.split(x))
    assert [part.shape for part in listed] == [(2, TOKENS, width) for width in WIDTHS]
    torch.testing.assert_close(torch.cat(listed, -1), y)
    arrays = crosscoder([part.double().numpy() for part in crosscoder.split(x)])
    torch.testing.assert_close(torch.cat(arrays, -1), y)
    code = crosscoder.encode(crosscoder.split(x))
    torch.testing.assert_close(crosscoder.decode(code, crosscoder.split(x)), y)


def test_sites_of_equal_width_may_be_stacked():
    crosscoder = made({"name": "topk", "k": 3}, widths=(4, 4, 4))
    for shape in ((TOKENS,), (2, TOKENS)):
        x = torch.randn(*shape, 3, 4)
        flat = crosscoder(x.flatten(-2))
        assert crosscoder(x).shape == x.shape
        torch.testing.assert_close(crosscoder(x).flatten(-2), flat)
    # Three tokens of all sites, not three sites.
    assert crosscoder(torch.randn(2, 3, 12)).shape == (2, 3, 12)
    # A list of rows is a matrix, as everywhere.
    assert crosscoder([[0.0] * 12] * 3).shape == (3, 12)


def test_wrong_sites_are_refused():
    crosscoder = made({"name": "topk", "k": 3})
    x = crosscoder.split(torch.randn(TOKENS, D))
    with pytest.raises(ValueError, match=r"x: expected 3 sites of widths 5, 3, 7, got 2 of 5, 3\. Give one tensor per site"):
        crosscoder.encode(x[:2])
    with pytest.raises(ValueError, match=r"expected 3 sites of widths 5, 3, 7, got 3 of 7, 3, 5"):
        crosscoder(x[::-1])
    with pytest.raises(ValueError, match=r"x: expected the same tokens at all sites, got shapes"):
        crosscoder([x[0], x[1], x[2][:4]])
    with pytest.raises(ValueError, match=rf"x: expected \(tokens, {D}\)"):
        crosscoder.encode(torch.randn(TOKENS, 5))
    with pytest.raises(ValueError, match="site: one code serves all 3 sites"):
        crosscoder.encode_at(0, x[0])
    with pytest.raises(ValueError, match=r"site: expected one of 0, 1, 2, or its number, got 'middle'"):
        crosscoder.decoder("middle")
    with pytest.raises(ValueError, match=r"site: expected one of 0, 1, 2, or its number, got 3"):
        crosscoder.bias(3)
    topk = build_encoder({"name": "topk", "k": 3})
    with pytest.raises(ValueError, match=r"dictionary\.widths: expected two or more sites of width 1 or more, got \[5\]"):
        Crosscoder([5], LATENTS, topk)
    with pytest.raises(ValueError, match=r"dictionary\.names: expected 2 names, one per site, all different"):
        Crosscoder([5, 3], LATENTS, topk, names=["a", "a"])
    with pytest.raises(ValueError, match=r"dictionary\.apply_b_dec_to_input: expected true with encoder lista"):
        Crosscoder([5, 3], LATENTS, build_encoder({"name": "lista", "k": 3}), apply_b_dec_to_input=False)


def test_one_code_decodes_at_every_site(crosscoder):
    x = torch.randn(TOKENS, D)
    code = crosscoder.encode(x)
    for site, expected in enumerate(crosscoder.split(crosscoder(x))):
        torch.testing.assert_close(crosscoder.decode_at(site, [code]), expected)


def test_it_comes_back_from_its_files(crosscoder, tmp_path, assert_same_tensors):
    crosscoder.names = ("a:out", "b:out", "c:in")
    crosscoder.save(tmp_path, {"hooks_in": ["a:out", "b:out", "c:in"], "hooks_out": ["a:out", "b:out", "c:in"]})
    loaded = load_dictionary(tmp_path)
    assert_same_tensors(loaded, crosscoder)
    assert (loaded.names, loaded.widths, loaded.arguments()) == (crosscoder.names, WIDTHS, crosscoder.arguments())
    x = torch.randn(TOKENS, D)
    torch.testing.assert_close(loaded(x), crosscoder(x))


def test_a_checkpoint_without_one_of_its_sites_is_refused(tmp_path):
    crosscoder = made({"name": "topk", "k": 3})
    tensors = crosscoder.state_dict()
    columns = {"W_dec": 1, "W_enc": 1, "b_dec": 0, "in_scale": 0, "out_scale": 0}
    for name, axis in columns.items():
        tensors[name] = tensors[name].narrow(axis, 0, sum(WIDTHS[:2])).contiguous()
    write_dictionary_files(tmp_path, tensors, crosscoder.config({}), None)
    with pytest.raises(
        ValueError, match=rf"W_dec: expected torch.float32 \({LATENTS}, {D}\), got torch.float32 \({LATENTS}, 8\)"
    ):
        load_dictionary(tmp_path)


def test_relative_norms_are_shares_of_the_sites():
    crosscoder = made({"name": "topk", "k": 3}, widths=(4, 4), names=["base", "tuned"])
    with torch.no_grad():
        crosscoder.W_dec.copy_(torch.zeros(LATENTS, 8))
        crosscoder.W_dec[0, 0], crosscoder.W_dec[1, 5] = 2.0, -3.0
        crosscoder.W_dec[2, 1], crosscoder.W_dec[2, 6] = 1.0, 3.0
    shares = crosscoder.relative_norms()
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75], [0.5, 0.5]])
    torch.testing.assert_close(shares[:4], expected)
    torch.testing.assert_close(crosscoder.decoder("tuned")[1], torch.tensor([0.0, -3.0 * 0.4, 0.0, 0.0]))
    torch.testing.assert_close(crosscoder.scales, torch.tensor([1.7, 0.4]))


def test_decoder_rows_keep_unit_norm_over_all_sites_together():
    crosscoder = made({"name": "topk", "k": 3})
    with torch.no_grad():
        crosscoder.W_dec.mul_(3.0)
    crosscoder.renormalize()
    torch.testing.assert_close(crosscoder.decoder_norms().pow(2).sum(1), torch.ones(LATENTS))


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_gradients_equal_those_of_the_plain_formula(name, encoder_arguments):
    crosscoder = made({"name": name, **encoder_arguments[name]}).double()
    if name != "feature_choice":
        crosscoder.train()
    x, grad = torch.randn(TOKENS, D, dtype=torch.double), torch.randn(TOKENS, D, dtype=torch.double)
    state, found = {key: tensor.clone() for key, tensor in crosscoder.state_dict().items()}, []
    for plain in (False, True):
        crosscoder.load_state_dict(state)
        crosscoder.zero_grad()
        code = crosscoder.encode(x, grad)
        if plain:
            y = code.to_dense(LATENTS) @ crosscoder.W_dec * crosscoder.out_scale + crosscoder.b_dec * crosscoder.out_scale
        else:
            y = crosscoder.decode(code)
        (y - x).pow(2).sum().backward()
        found.append({key: p.grad.clone() for key, p in crosscoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {"W_dec", "b_dec"}
    for key, sparse in found[0].items():
        torch.testing.assert_close(sparse, found[1][key], rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("spec", [{"name": "relu"}, {"name": "relu", "penalty_form": "log"}, {"name": "topk", "k": 4}])
def test_the_whole_loss_passes_gradcheck(spec):
    """With every latent active, no selection jumps within gradcheck's step."""
    crosscoder = Crosscoder([2, 3], 4, build_encoder(spec)).double().train()
    with torch.no_grad():
        crosscoder.b_enc.fill_(9.0)
        crosscoder.b_dec.normal_()
        crosscoder.in_scale.copy_(torch.tensor([1.7, 1.7, 0.4, 0.4, 0.4]))
        crosscoder.out_scale.copy_(crosscoder.in_scale)
    aux, usage = AuxSettings(0.0, 1), LatentUsage(torch.zeros(4, dtype=torch.bool), torch.zeros(4))
    x = 0.1 * torch.randn(3, 5, dtype=torch.double)
    objective = Objective(crosscoder, torch.linspace(1, 2, 5, dtype=torch.double), aux)
    names, tensors = zip(*((name, p.detach().requires_grad_()) for name, p in crosscoder.named_parameters()), strict=True)

    def loss(*weights):
        named = {f"dictionary.{name}": value for name, value in zip(names, weights, strict=True)}
        return torch.func.functional_call(objective, named, (ActivationBatch(x), usage))[0]

    assert torch.autograd.gradcheck(loss, tensors, atol=1e-6)


def test_norms_summed_over_sites_pass_gradcheck_with_a_ledger_and_without():
    W = torch.randn(4, D, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda W: row_norms(W, WIDTHS), (W,))
    plain = sum(part.norm(dim=-1) for part in W.split(list(WIDTHS), 1))
    torch.testing.assert_close(row_norms(W, WIDTHS), plain)
    (plain * torch.arange(4)).sum().backward()
    expected, W.grad = W.grad, None
    ledger = keep_ledger(W)
    for _ in range(2):
        (row_norms(W, WIDTHS) * torch.arange(4)).sum().backward()
    assert W.grad is None
    torch.testing.assert_close(ledger.whole, 2 * expected)
    drop_ledger(W)


@pytest.mark.parametrize("spec", [{"name": "relu"}, {"name": "jumprelu", "target_l0": 3, "penalty": "tanh"}])
def test_penalties_weight_values_by_the_sum_of_decoder_norms(spec):
    crosscoder = made(spec | {"sparsity": 1.0, "ramp": 0.0, "pre_act_loss": 0.0}).train()
    x = torch.randn(TOKENS, D)
    values = crosscoder.encode(x).to_dense(LATENTS)
    weighted = values * crosscoder.decoder_norms().sum(1)
    charged = weighted if spec["name"] == "relu" else (4.0 * weighted).tanh()
    expected = charged.sum() / (TOKENS * D)
    if spec["name"] == "jumprelu":
        # Its weight is steered toward the target.
        expected = expected * crosscoder.encoder.steering.factor * ((values != 0).sum() / (3 * TOKENS)).clamp(0.5, 2)
    torch.testing.assert_close(crosscoder.encode(x).requests.penalties["sparsity"], expected)


def test_the_loss_is_the_mean_of_the_sites_fvus():
    crosscoder = made({"name": "topk", "k": 3})
    x = torch.randn(101, D) * torch.tensor([3.0] * 5 + [0.2] * 3 + [1.0] * 7)
    moments = Moments(D)
    moments.update(x)
    variance = crosscoder.error_scale(moments)
    objective = Objective(crosscoder, variance, AuxSettings(0.0, 1))
    usage = LatentUsage(torch.zeros(LATENTS, dtype=torch.bool), torch.zeros(LATENTS))
    loss, _ = objective(ActivationBatch(x), usage)
    fvus = []
    for part, guess in zip(crosscoder.split(x), crosscoder(crosscoder.split(x)), strict=True):
        fvus.append((part - guess).pow(2).sum() / (part - part.mean(0)).pow(2).sum())
    torch.testing.assert_close(loss, torch.stack(fvus).mean())


def test_scales_are_measured_at_each_site():
    crosscoder = Crosscoder(WIDTHS, LATENTS, build_encoder({"name": "topk", "k": 3}))
    x = torch.randn(501, D) * torch.tensor([30.0] * 5 + [0.2] * 3 + [1.0] * 7) + 5.0
    moments = Moments(D)
    moments.update(x)
    batch = ActivationBatch(x)
    initialize(crosscoder, batch, moments, moments, "scale", "data")
    torch.testing.assert_close(crosscoder.scales, torch.tensor([30.0, 0.2, 1.0]), rtol=0.1, atol=0.0)
    inside = crosscoder.normalised(x).detach()
    for part in crosscoder.split(inside):
        assert float(part.var(0).mean()) == pytest.approx(1.0, rel=0.02)


SHARED, ALONE, WIDTH = 12, 6, 20


def planted(tokens, seed, directions):
    """Atoms of both sites, then of each site alone, on independent tokens; the other site has none of a lone atom."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(tokens, SHARED + 2 * ALONE, generator=generator) < 0.06
    values = fires * (0.7 + torch.rand(fires.shape, generator=generator))
    x = values @ directions + 0.01 * torch.randn(tokens, 2 * WIDTH, generator=generator)
    return x, values


def test_atoms_that_one_site_alone_has_are_found_by_relative_norms():
    generator = torch.Generator().manual_seed(7)
    directions = F.normalize(torch.randn(SHARED + 2 * ALONE, 2, WIDTH, generator=generator), dim=-1)
    directions[SHARED : SHARED + ALONE, 1] = 0
    directions[SHARED + ALONE :, 0] = 0
    directions = directions.flatten(1)
    crosscoder = Crosscoder([WIDTH, WIDTH], 32, build_encoder({"name": "topk", "k": 2}), names=["base", "tuned"])
    first, _ = planted(4096, 0, directions)
    moments = Moments(2 * WIDTH)
    moments.update(first)
    initialize(crosscoder, ActivationBatch(first), moments, moments, "scale", "data")
    objective = Objective(crosscoder, crosscoder.error_scale(moments), AuxSettings(1 / 8, 8))
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / 600)))
    silent = torch.zeros(32)
    crosscoder.train()
    for step in range(600):
        x, _ = planted(256, step + 1, directions)
        loss, terms = objective(ActivationBatch(x), LatentUsage(silent > 20, torch.zeros(32)))
        silent = torch.where(terms.firings > 0, 0, silent + 1)
        loss.backward()
        crosscoder.project_grad()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        crosscoder.renormalize()
    crosscoder.eval()
    x, truth = planted(8192, 99_999, directions)
    values = crosscoder.encode(x).to_dense(32).detach()
    fires = values.gt(0).float().mean(0) > 0.005
    # A latent stands for the planted atom that it correlates with most.
    together = np.corrcoef(values[:, fires].T, truth.T)[: int(fires.sum()), int(fires.sum()) :]
    atom, tuned = torch.from_numpy(together).argmax(1), crosscoder.relative_norms()[fires, 1].detach()
    exclusive = (tuned < 0.1) | (tuned > 0.9)
    assert (atom[exclusive] >= SHARED).float().mean() >= 0.95
    assert len(set(atom[exclusive].tolist()) - set(range(SHARED))) / (2 * ALONE) >= 0.95
    assert bool((tuned > 0.5).eq(atom >= SHARED + ALONE)[exclusive].all())
    assert float((tuned[atom < SHARED] - 0.5).abs().median()) < 0.02
