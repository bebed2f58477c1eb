"""What every encoder in the registry must do. A new variant is picked up by its name alone."""

import copy
import functools

import pytest
import torch

from sparsary.sae import ENCODERS, SAE, load_dictionary
from sparsary.sae.encoder import Weights
from sparsary.sae.encoders import build_encoder, encoder_spec
from sparsary.sae.sparse_code import SparseCode
from sparsary.sae.sparse_ops import decode

TOKENS, D, LATENTS = 13, 11, 29

# Enough for every latent to have a match.
BATCH = 10


def test_every_encoder_has_arguments_to_be_tested_with(encoder_arguments):
    assert encoder_arguments.keys() == ENCODERS.keys()


@pytest.fixture(scope="module")
def warmed_up(encoder_arguments):
    """Return a function that makes an encoder's SAE once."""
    return functools.cache(lambda name: warm_up(name, encoder_arguments[name]))


@pytest.fixture(params=sorted(ENCODERS))
def sae(request, warmed_up):
    sae = copy.deepcopy(warmed_up(request.param))
    # What a test draws does not depend on whether it is the first.
    torch.manual_seed(4)
    return sae


def warm_up(name, arguments):
    torch.manual_seed(3)
    sae = SAE(D, LATENTS, ENCODERS[name](**arguments))
    with torch.no_grad():
        if sae.W_enc is not None:
            sae.W_enc.add_(0.1 * torch.randn(LATENTS, D))
            sae.b_enc.copy_(0.1 * torch.randn(LATENTS))
        sae.b_dec.copy_(torch.randn(D))
        sae.in_scale.fill_(1.7)
        sae.out_scale.fill_(1.7)
    # A few batches, so that what is measured in training is known.
    for _ in range(4):
        sae.encode(torch.randn(BATCH, D), torch.randn(BATCH, D))
    return sae.eval()


# Inputs on which shortcuts break: ties, silence, everything negative, the same token twice.
INPUTS = {
    "random": lambda: torch.randn(TOKENS, D),
    "zero rows": lambda: torch.zeros(TOKENS, D),
    "duplicate rows": lambda: torch.randn(1, D).expand(TOKENS, D).clone(),
    "one token": lambda: torch.randn(1, D),
    "no token": lambda: torch.randn(0, D),
    "large": lambda: 1e4 * torch.randn(TOKENS, D),
}


@pytest.fixture(params=sorted(INPUTS))
def x(request):
    torch.manual_seed(5)
    return INPUTS[request.param]()


def test_values_are_not_negative_and_latents_are_in_range(sae, x):
    code = sae.encode(x)
    assert code.n_tokens == x.shape[0]
    assert sae.encoder.signed or (code.values >= 0).all()
    assert ((code.latents >= 0) & (code.latents < LATENTS)).all()
    assert code.l0().sum() == (code.values != 0).sum() == code.firings(LATENTS).sum()


def test_decode_equals_the_dense_product(sae, x):
    code = sae.encode(x)
    dense = (code.to_dense(LATENTS) @ sae.W_dec + sae.b_dec) * sae.out_scale
    # Large terms may cancel, and leave the rounding of their sum.
    terms = (code.to_dense(LATENTS) @ sae.W_dec.abs()).detach().amax() if len(x) else 0.0
    torch.testing.assert_close(sae.decode(code), dense, rtol=1e-5, atol=max(1e-4, 1e-6 * float(terms)))


def test_gradients_equal_the_dense_route(sae, x):
    if x.shape[0] >= sae.encoder.smallest_batch:
        sae.train()
    # In float64: sums that cancel leave little of a float32.
    sae, x = sae.double(), x.double()
    target, grad = torch.randn_like(x), torch.randn_like(x)
    gradients = []
    for dense in (False, True):
        sae.zero_grad()
        code = sae.encode(x, grad)
        y_hat = (code.to_dense(LATENTS) @ sae.W_dec + sae.b_dec) * sae.out_scale if dense else sae.decode(code)
        ((y_hat - target) ** 2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None})
    for name, sparse in gradients[0].items():
        scale = gradients[1][name].abs().max().clamp_min(1.0)
        torch.testing.assert_close(sparse / scale, gradients[1][name] / scale, rtol=1e-4, atol=1e-5)


def test_code_does_not_depend_on_batch_mates_in_eval(sae):
    x = torch.randn(TOKENS, D)
    together = sae.encode(x).to_dense(LATENTS)
    alone = torch.cat([sae.encode(row.unsqueeze(0)).to_dense(LATENTS) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_permuting_latents_permutes_the_code(sae):
    x = torch.randn(TOKENS, D)
    before = sae.encode(x).to_dense(LATENTS)
    order = torch.randperm(LATENTS)
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            if tensor.shape[:1] == (LATENTS,):
                tensor.copy_(tensor[order].clone())
    torch.testing.assert_close(sae.encode(x).to_dense(LATENTS), before[:, order])


def test_saved_then_loaded_is_bit_equal(sae, tmp_path, assert_same_tensors):
    x = torch.randn(TOKENS, D)
    sae.save(tmp_path / "d")
    again = load_dictionary(tmp_path / "d")
    assert not again.training
    assert again.arguments() == sae.arguments()
    assert_same_tensors(again, sae)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)


def test_spec_rebuilds_the_encoder(sae, encoder_arguments):
    spec = encoder_spec(sae.encoder)
    assert spec == {"name": spec["name"], **encoder_arguments[spec["name"]]}
    assert encoder_spec(build_encoder(spec)) == spec


def test_eval_then_train_restores_everything(sae):
    sae.train()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.eval()
    sae(torch.randn(TOKENS, D))
    sae.train()
    assert all(module.training for module in sae.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_gradcheck_of_every_weight(sae, monkeypatch):
    cpu, calls = pytest.importorskip("sparsary.sae.kernels.cpu").CpuKernels, []
    spread = cpu.spread
    monkeypatch.setattr(cpu, "spread", lambda *arguments: (calls.append(1), spread(*arguments))[1])
    sae.double().train()
    x, grad = torch.randn(TOKENS, D, dtype=torch.float64), torch.randn(TOKENS, D, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in sae.encoder.state_dict().items()}

    def run(W_dec, W_enc=None, b_enc=None):
        # Every evaluation sees the same buffers.
        sae.encoder.load_state_dict(state)
        code = sae.encoder(x, Weights(W_dec if W_enc is None else W_enc, b_enc, W_dec), grad)
        return code.values, decode(code, W_dec), *code.requests.penalties.values()

    weights = [w for w in (sae.W_dec, sae.W_enc, sae.b_enc) if w is not None]
    inputs = [weight.detach().clone().requires_grad_(True) for weight in weights]
    # Along random directions, for every output: number by number it takes a hundred times as long.
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert calls


def test_too_many_latents_asked_for_names_key_value_and_range():
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.k: expected at most n_latents = 4, got 5"):
        SAE(D, 4, ENCODERS["topk"](k=5))
    with pytest.raises(ValueError, match=r"dictionary\.encoder\.k: expected at least 1, got 0"):
        ENCODERS["topk"](k=0)


def test_wrong_width_is_an_error_that_says_what_to_do(sae):
    with pytest.raises(ValueError, match=r"x: expected \(tokens, 11\), got \(6, 10\)"):
        sae.encode(torch.randn(2, 3, D - 1))


def test_repeated_latents_add_up():
    code = SparseCode(torch.tensor([2, 2, 0]), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2]))
    atoms = torch.eye(3)
    assert code.to_dense(3).tolist() == [[0, 0, 3], [4, 0, 0]]
    assert torch.equal(decode(code, atoms), code.to_dense(3))


def test_rows_without_entries_decode_to_nothing():
    code = SparseCode(torch.tensor([1]), torch.tensor([5.0]), torch.tensor([0, 0, 1]))
    assert code.entries_per_token().tolist() == [0, 1, 0]
    assert code.l0().tolist() == [0, 1, 0]
    assert decode(code, torch.eye(2)).tolist() == [[0, 0], [0, 5], [0, 0]]


def test_crowded_codes_decode_by_the_dense_product(monkeypatch):
    latents, values = torch.stack([torch.randperm(29)[:11] for _ in range(7)]), torch.rand(7, 11)
    code = SparseCode.from_rows(latents, values.requires_grad_(True))
    atoms = torch.randn(29, 5, requires_grad=True)
    sparse = torch.autograd.grad(decode(code, atoms).pow(2).sum(), [values, atoms])
    monkeypatch.setattr("sparsary.sae.sparse_ops.dense_share", lambda rows: 11 / 29)
    monkeypatch.setattr("sparsary.sae.sparse_ops.DENSE_ENTRIES", 77)
    monkeypatch.setattr("sparsary.sae.sparse_ops.backend", None)
    for a, b in zip(torch.autograd.grad(decode(code, atoms).pow(2).sum(), [values, atoms]), sparse, strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr("sparsary.sae.sparse_ops.DENSE_ENTRIES", 78)
    with pytest.raises(TypeError):
        decode(code, atoms)


def test_gradients_reach_inputs_that_were_made_of_something(sae):
    """A step of the input does to the reconstruction what its gradient says, beside a gradient for the bias on both sides."""
    sae.double()
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    while sae.encode(x).values.abs().min() < 1e-4:
        x = torch.randn(TOKENS, D, dtype=torch.float64)
    sent = torch.randn(TOKENS, D, dtype=torch.float64)
    x.requires_grad_(True)
    (sae(x) * sent).sum().backward()
    for tensor in (x, sae.b_dec):
        step, found = 1e-6 * torch.randn_like(tensor), []
        for move in (step, -2 * step):
            with torch.no_grad():
                tensor.add_(move)
                found.append((sae(x) * sent).sum())
        with torch.no_grad():
            tensor.add_(step)
        torch.testing.assert_close(found[0] - found[1], 2 * (tensor.grad * step).sum(), rtol=1e-3, atol=1e-9)
