"""LISTA: against the dense iteration, against ISTA's known solution, and its thresholds."""

import json

import pytest
import torch
import torch.nn.functional as F

import sparsary
from sparsary.sae import ENCODERS, SAE
from sparsary.sae.encoder import Weights
from sparsary.sae.encoders.lista import Lista
from sparsary.transcoders.transcoder import Transcoder

TOKENS, D, LATENTS, K = 23, 7, 31, 4
FORMS = [(budget, select) for budget in ("batch", "token") for select in ("hard", "soft")]


def made(budget="batch", select="hard", steps=2, eta=0.3, seed=2, k=K):
    torch.manual_seed(seed)
    sae = SAE(D, LATENTS, Lista(k, steps, eta, budget, select)).double()
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(LATENTS, D))
        sae.b_enc.copy_(0.1 * torch.randn(LATENTS))
        sae.b_dec.copy_(0.3 * torch.randn(D))
    return sae


def dense_selection(h, budget, select, level=None):
    """The code of dense pre-activations; the threshold is a constant."""
    if level is not None:
        cut = level
        kept = h > cut
    elif budget == "token":
        kept = torch.zeros_like(h, dtype=torch.bool).scatter(1, h.topk(K, dim=1).indices, True)
        cut = h.detach().topk(K + 1, dim=1).values[:, -1:]
    else:
        ranked = h.detach().flatten().sort(descending=True).values
        kept = h > (ranked[K * TOKENS - 1] + ranked[K * TOKENS]) / 2
        cut = ranked[K * TOKENS]
    values = h - torch.as_tensor(cut).clamp_min(0) if select == "soft" else h
    return (values * kept).relu()


def dense_code(sae, x, levels=None):
    """The code of the formulas, all of it by dense products and autograd."""
    encoder, centred = sae.encoder, x - sae.b_dec
    form = encoder.budget, encoder.select
    given = [None] * (encoder.steps + 1) if levels is None else list(levels)
    h = F.linear(centred, sae.W_enc, sae.b_enc)
    z = dense_selection(h, *form, given[0])
    for step in range(1, encoder.steps + 1):
        error = centred - z @ sae.W_dec
        h = (
            z + encoder.eta * F.linear(error, sae.W_enc, sae.b_enc)
            if form[1] == "soft"
            else h + encoder.eta * error @ sae.W_enc.T
        )
        z = dense_selection(h, *form, given[step])
    return z


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("budget", "select"), FORMS)
def test_code_and_gradients_are_those_of_the_dense_iteration(budget, select, steps):
    sae, x = made(budget, select, steps), torch.randn(TOKENS, D, dtype=torch.float64)
    sent, found = torch.randn(TOKENS, LATENTS, dtype=torch.float64), []
    for code in (sae.encode(x).to_dense(LATENTS), dense_code(sae, x)):
        sae.zero_grad()
        (code * sent).sum().backward()
        found.append((code.detach(), {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}))
    (code, grads), (wanted, wanted_grads) = found
    torch.testing.assert_close(code, wanted, rtol=1e-12, atol=1e-12)
    assert (code > 0).sum() <= K * TOKENS
    assert grads.keys() == wanted_grads.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, wanted_grads[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Without the path through the code of the steps before, the decoder would get no gradient at all.
    assert grads["W_dec"].abs().max() > 1e-3


@pytest.mark.parametrize("select", ["hard", "soft"])
def test_gradcheck_of_weights_and_inputs_with_fixed_thresholds(select):
    sae, x = made(select=select), torch.randn(TOKENS, D, dtype=torch.float64)
    sae.encode(x)
    sae.eval()

    def run(x, W_enc, b_enc, W_dec):
        return sae.encoder(x, Weights(W_enc, b_enc, W_dec)).values

    inputs = [each.detach().clone().requires_grad_(True) for each in (x, sae.W_enc, sae.b_enc, sae.W_dec)]
    assert len(run(*inputs)) > TOKENS
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_steps_of_no_length_are_the_plain_selections():
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    for budget, name in (("batch", "batch_topk"), ("token", "topk")):
        sae = made(budget, eta=0.0)
        plain = SAE(D, LATENTS, ENCODERS[name](k=K)).double()
        plain.load_state_dict({key: t for key, t in sae.state_dict().items() if not key.startswith("encoder.")}, strict=False)
        torch.testing.assert_close(sae.encode(x).to_dense(LATENTS), plain.encode(x).to_dense(LATENTS))
        assert not torch.allclose(made(budget).encode(x).to_dense(LATENTS), plain.encode(x).to_dense(LATENTS))


def test_soft_steps_are_ista_and_arrive_at_the_lasso():
    """At the solution every active atom correlates with the error by the penalty, and every other atom by no more."""
    torch.manual_seed(0)
    width, n, penalty = 13, 17, 0.2
    sae = SAE(width, n, Lista(3, steps=100, eta=0.6, select="soft")).double().eval().requires_grad_(False)
    # Atoms that overlap little, so that a hundred steps are enough.
    sae.W_dec.add_(2 * torch.cat([torch.eye(width), torch.randn(n - width, width) / 3]))
    sae.renormalize()
    sae.copy_atoms_to_encoder()
    sae.encoder.levels.fill_(0.6 * penalty)
    sae.encoder.batches.fill_(1)
    x = torch.randn(19, width, dtype=torch.float64)
    z = sae.encode(x).to_dense(n)
    correlation = (x - z @ sae.W_dec) @ sae.W_dec.T
    assert (correlation <= penalty + 0.005).all()
    torch.testing.assert_close(correlation[z > 0], torch.full_like(correlation[z > 0], penalty), rtol=0, atol=0.005)
    assert 19 < (z > 0).sum() < 19 * n / 2


def test_a_bias_is_the_penalty_of_crate():
    """One step from z: relu(z + eta D (x - D z) - eta penalty), the ISTA step of CRATE's feed-forward block."""
    torch.manual_seed(0)
    sae = SAE(D, LATENTS, Lista(K, steps=1, eta=0.1, select="soft")).double().eval()
    with torch.no_grad():
        sae.b_enc.fill_(-0.1)
    sae.encoder.levels[:] = torch.tensor([0.5, 0.0])
    sae.encoder.batches.fill_(1)
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    z = (x @ sae.W_dec.T - 0.1 - 0.5).relu()
    step = z + 0.1 * (x @ sae.W_dec.T - z @ sae.W_dec @ sae.W_dec.T) - 0.1 * 0.1
    torch.testing.assert_close(sae.encode(x).to_dense(LATENTS), step.relu())


@pytest.mark.parametrize("select", ["hard", "soft"])
def test_calibrated_thresholds_keep_k_latents_after_every_selection(select):
    sae = made(select=select, steps=2)
    rows = torch.randn(40 * TOKENS, D, dtype=torch.float64)
    sae.encode(rows[:TOKENS])
    with torch.no_grad():
        assert sae.calibrate(list(rows.split(92)))
    assert sae.training
    sae.eval()
    levels = sae.encoder.levels.double()
    assert len(set(levels.tolist())) == 3
    torch.testing.assert_close(sae.encode(rows).to_dense(LATENTS), dense_code(sae, rows, levels), rtol=1e-9, atol=1e-9)
    for steps in range(3):
        sae.encoder.steps = steps
        # Thresholds are float32, and so may drop or keep one score more.
        assert abs(int((sae.encode(rows).values > 0).sum()) - K * len(rows)) <= 2
    with pytest.raises(ValueError, match="expected tokens to calibrate the threshold on, got none"):
        sae.calibrate([])


def test_running_thresholds_are_the_mean_of_those_of_the_batches():
    sae, seen = made(steps=1).train(), []
    for _ in range(3):
        x = torch.randn(TOKENS, D, dtype=torch.float64)
        found = sae.encode(x)
        seen.append(float(found.values[found.values > 0].min().detach()))
    assert float(sae.encoder.levels[1]) == pytest.approx(sum(seen) / 3, rel=1e-5)
    assert int(sae.encoder.batches) == 3


def test_nested_dictionaries_are_prefixes_of_the_last_code():
    x = torch.randn(TOKENS, D)
    plain, nested = SAE(D, LATENTS, Lista(K)), SAE(D, LATENTS, Lista(K, shares=[0.25, 0.5, 1.0]))
    nested.load_state_dict(plain.state_dict())
    code = nested.encode(x)
    assert code.requests.prefixes == (8, 16, 31)
    assert torch.equal(code.to_dense(LATENTS), plain.encode(x).to_dense(LATENTS))
    assert not plain.encode(x).requests.prefixes
    assert not nested.eval().encode(x).requests.prefixes


def test_a_budget_per_token_needs_no_threshold():
    sae, x = made("token"), torch.randn(TOKENS, D, dtype=torch.float64)
    assert not sae.calibrate([x])
    assert not dict(sae.encoder.named_buffers())
    assert torch.equal(sae.encode(x).values, sae.eval().encode(x).values)
    assert (sae.encode(x).l0() <= K).all()
    with pytest.raises(ValueError, match="no threshold is known before the first training batch"):
        made().eval().encode(x)


def test_a_batch_of_atoms_that_overlap_is_explained_better_than_by_one_selection(planted, train_on_planted):
    found = {}
    for name, arguments in (("lista", {"k": 3}), ("batch_topk", {"k": 3})):
        torch.manual_seed(0)
        sae = train_on_planted(SAE(17, 29, ENCODERS[name](**arguments)), 120).requires_grad_(False)
        sae.calibrate([planted(512, 50 + i) for i in range(8)])
        x = planted(2000, 7)
        sae.eval()
        assert float(sae.encode(x).l0().double().mean()) == pytest.approx(3, abs=0.2)
        found[name] = float((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    assert found["lista"] < 0.9 * found["batch_topk"]


def test_k_falls_during_a_run_and_the_last_is_kept(tmp_path):
    """Calibrated for the k it ends with."""
    torch.manual_seed(1)
    rows = torch.randn(4000, 11)
    for name in ("topk", "batch_topk", "lista"):
        recipe = {
            "dictionary": {"n_latents": 29, "encoder": {"name": name, "k": 6}},
            "tokens": 4000,
            "batch_tokens": 100,
            "schedules": {"k": [[0, 6], [0.5, 2]]},
        }
        folder = sparsary.train(recipe, rows, out_dir=str(tmp_path / name))
        saved = json.loads((folder / "dictionary.json").read_text(encoding="utf-8"))
        assert saved["dictionary"]["encoder"]["k"] == 2
        l0 = sparsary.load(folder).encode(rows).l0().double().mean()
        assert float(l0) == pytest.approx(2, abs=0.05)


def test_what_reconstructs_another_activation_cannot_have_it():
    with pytest.raises(ValueError, match=r"dictionary\.kind: expected sae with encoder lista, because every step subtracts"):
        Transcoder(D, D, LATENTS, Lista(K))
    recipe = {"dictionary": {"kind": "transcoder", "n_latents": 29, "encoder": {"name": "lista", "k": 6}}, "tokens": 4000}
    with pytest.raises(ValueError, match=r"dictionary\.kind: expected sae with encoder lista"):
        sparsary.train(recipe, [(torch.randn(50, 5), torch.randn(50, 4))], out_dir="nowhere")


def test_arguments_out_of_range_are_named():
    for arguments, wanted in (
        ({"k": 0}, "k: expected at least 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"eta": -1}, "eta"),
        ({"shares": [0.5]}, "shares: expected ascending shares"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Lista(**({"k": 3} | arguments))
