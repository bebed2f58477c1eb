"""Transcoders over the registry of encoders: the contract of every dictionary, between two spaces and with a skip."""

import pytest
import torch
from torch import nn

from sparsary.sae import ENCODERS, load_dictionary
from sparsary.sae.metrics import Moments
from sparsary.training.activations.stream import ActivationBatch
from sparsary.training.initialize import initialize
from sparsary.training.objective import AuxSettings, LatentUsage, Objective
from sparsary.transcoders import Transcoder

TOKENS, D_IN, D_OUT, LATENTS = 13, 11, 7, 29
BATCH = 10
TRAINED = sorted(name for name, encoder in ENCODERS.items() if not encoder.for_saes)


@pytest.fixture(params=[False, True], ids=["plain", "skip"])
def skip(request):
    return request.param


@pytest.fixture(params=TRAINED)
def transcoder(request, skip, encoder_arguments):
    return made(request.param, skip, encoder_arguments)


def made(name, skip, encoder_arguments):
    torch.manual_seed(3)
    transcoder = Transcoder(D_IN, D_OUT, LATENTS, ENCODERS[name](**encoder_arguments[name]), skip)
    with torch.no_grad():
        for weights in (transcoder.b_enc, transcoder.W_skip, transcoder.b_dec, transcoder.in_centre):
            if weights is not None:
                weights.copy_(0.3 * torch.randn(weights.shape))
        transcoder.in_scale.fill_(1.7)
        transcoder.out_scale.fill_(0.6)
    for _ in range(4):
        transcoder.encode(torch.randn(BATCH, D_IN), torch.randn(BATCH, D_OUT))
    return transcoder.eval()


def dense(transcoder, x, code):
    """The definition, written out."""
    inside = x / transcoder.in_scale - transcoder.in_centre
    skipped = 0 if transcoder.W_skip is None else inside @ transcoder.W_skip.T
    return (code.to_dense(LATENTS) @ transcoder.W_dec + skipped + transcoder.b_dec) * transcoder.out_scale


def test_the_output_is_the_definition_s(transcoder):
    x = torch.randn(TOKENS, D_IN)
    code = transcoder.encode(x)
    assert code.l0().sum() > 0
    torch.testing.assert_close(transcoder.decode(code, x), dense(transcoder, x, code))
    torch.testing.assert_close(transcoder(x), dense(transcoder, x, code))
    torch.testing.assert_close(transcoder.decode_at(0, [transcoder.encode_at(0, x)], x), transcoder(x))


def test_gradients_equal_the_dense_route(transcoder):
    transcoder.double().train()
    x, target = torch.randn(TOKENS, D_IN, dtype=torch.float64), torch.randn(TOKENS, D_OUT, dtype=torch.float64)
    grad, gradients = torch.randn(TOKENS, D_OUT, dtype=torch.float64), []
    state = {name: tensor.clone() for name, tensor in transcoder.state_dict().items()}
    for plain in (False, True):
        transcoder.load_state_dict(state)
        transcoder.zero_grad()
        code = transcoder.encode(x, grad)
        y_hat = dense(transcoder, x, code) if plain else transcoder.decode(code, x)
        ((y_hat - target) ** 2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in transcoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() >= {"W_enc", "W_dec", "b_dec"}
    for name, sparse in gradients[0].items():
        torch.testing.assert_close(sparse, gradients[1][name], rtol=1e-6, atol=1e-8, msg=name)
    assert ("W_skip" in gradients[0]) == (transcoder.W_skip is not None)


def test_a_code_does_not_depend_on_batch_mates(transcoder):
    x = torch.randn(TOKENS, D_IN)
    alone = torch.cat([transcoder(row[None]) for row in x])
    torch.testing.assert_close(transcoder(x), alone, rtol=1e-5, atol=1e-5)


def test_saved_then_loaded_is_bit_equal(transcoder, tmp_path, assert_same_tensors):
    x = torch.randn(TOKENS, D_IN)
    transcoder.save(tmp_path / "d")
    again = load_dictionary(tmp_path / "d")
    assert again.arguments() == transcoder.arguments()
    assert_same_tensors(again, transcoder)
    torch.testing.assert_close(again(x), transcoder(x))


@pytest.mark.parametrize("name", TRAINED)
def test_every_encoder_learns_a_map_in_a_few_hundred_steps(name, skip, encoder_arguments):
    losses = learned(name, "data", skip, encoder_arguments, 200)
    # Where a penalty steers the l0 the error rises again on the way to it.
    assert sum(losses[-20:]) / 20 < 0.6


def test_random_atoms_learn_as_well(encoder_arguments):
    losses = learned("topk", "random", False, encoder_arguments, 200)
    assert sum(losses[-20:]) < 0.4 * sum(losses[:20])


def learned(name, atoms, skip, encoder_arguments, steps):
    """Losses of training on the outputs of a small MLP."""
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(D_IN, 23), nn.ReLU(), nn.Linear(23, D_OUT)).requires_grad_(False)
    x = 3 * torch.randn(4096, D_IN) + 2
    y = mlp(x)
    transcoder = Transcoder(D_IN, D_OUT, LATENTS, ENCODERS[name](**encoder_arguments[name]), skip)
    inputs, targets = Moments(D_IN), Moments(D_OUT)
    inputs.update(x)
    targets.update(y)
    initialize(transcoder, ActivationBatch(x, y), inputs, targets, "scale", atoms)
    objective = Objective(transcoder, transcoder.error_scale(targets), AuxSettings(1 / 32, 3))
    optimizer = torch.optim.Adam(transcoder.parameters(), 3e-3)
    usage, losses = LatentUsage(torch.zeros(LATENTS, dtype=torch.bool), torch.zeros(LATENTS, dtype=torch.float64)), []
    for step in range(steps):
        rows = torch.arange(step * 101, step * 101 + 101) % 4096
        loss, terms = objective(ActivationBatch(x[rows], y[rows], torch.ones(101, D_OUT)), usage)
        loss.backward()
        transcoder.project_grad()
        optimizer.step()
        optimizer.zero_grad()
        transcoder.renormalize()
        losses.append(float(terms.named["fvu"]))
    return losses


def test_the_weights_of_a_relu_mlp_are_a_transcoder_without_error():
    mlp = nn.Sequential(nn.Linear(D_IN, LATENTS), nn.ReLU(), nn.Linear(LATENTS, D_OUT))
    transcoder = Transcoder(D_IN, D_OUT, LATENTS, ENCODERS["relu"](sparsity=0.0))
    with torch.no_grad():
        for own, weights in (
            (transcoder.W_enc, mlp[0].weight),
            (transcoder.b_enc, mlp[0].bias),
            (transcoder.W_dec, mlp[2].weight.T),
            (transcoder.b_dec, mlp[2].bias),
        ):
            own.copy_(weights)
    x = torch.randn(TOKENS, D_IN)
    torch.testing.assert_close(transcoder.eval()(x), mlp(x))


def test_a_skip_without_latents_to_speak_of_is_least_squares():
    torch.manual_seed(1)
    x = torch.randn(2048, D_IN) @ torch.randn(D_IN, D_IN) + 1
    y = x @ torch.randn(D_IN, D_OUT) + 0.5 * torch.randn(2048, D_OUT)
    inputs, targets = Moments(D_IN), Moments(D_OUT)
    inputs.update(x)
    targets.update(y)
    transcoder = Transcoder(D_IN, D_OUT, 1, ENCODERS["topk"](k=1), skip=True)
    initialize(transcoder, ActivationBatch(x, y), inputs, targets, "scale", "random")
    with torch.no_grad():
        transcoder.b_enc.fill_(-1e6)
    optimizer = torch.optim.LBFGS([transcoder.W_skip, transcoder.b_dec], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (transcoder(x) - y).pow(2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    design = torch.cat([x, torch.ones(2048, 1)], 1).double()
    best = design @ torch.linalg.lstsq(design, y.double()).solution
    torch.testing.assert_close(transcoder(x).double(), best, rtol=1e-3, atol=1e-3)


def test_a_skip_needs_the_input_to_decode(encoder_arguments):
    transcoder = made("topk", True, encoder_arguments)
    code = transcoder.encode(torch.randn(TOKENS, D_IN))
    with pytest.raises(ValueError, match=r"x: expected the raw input, because this transcoder has a skip path"):
        transcoder.decode(code)
    with pytest.raises(ValueError, match="skip path"):
        transcoder.pursue(torch.randn(TOKENS, D_OUT), 2, "matching_pursuit")


def test_units_do_not_matter(encoder_arguments):
    """Inputs and targets in other units give the same code and the reconstruction in those units."""
    x, y = torch.randn(2000, D_IN) + 4, torch.randn(2000, D_OUT) - 3
    outputs, codes = [], []
    for a, b in ((1.0, 1.0), (100.0, 0.01)):
        torch.manual_seed(2)
        inputs, targets = Moments(D_IN), Moments(D_OUT)
        inputs.update(a * x)
        targets.update(b * y)
        transcoder = Transcoder(D_IN, D_OUT, LATENTS, ENCODERS["topk"](k=3))
        initialize(transcoder, ActivationBatch(a * x, b * y), inputs, targets, "scale", "data")
        codes.append(transcoder.encode(a * x).to_dense(LATENTS))
        outputs.append(transcoder(a * x) / b)
    torch.testing.assert_close(codes[0], codes[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


def test_constant_targets_are_refused():
    x = torch.randn(50, D_IN)
    inputs, targets = Moments(D_IN), Moments(D_OUT)
    inputs.update(x)
    targets.update(torch.ones(50, D_OUT))
    transcoder = Transcoder(D_IN, D_OUT, LATENTS, ENCODERS["topk"](k=3))
    with pytest.raises(ValueError, match=r"targets: expected variance above 0"):
        initialize(transcoder, ActivationBatch(x, torch.ones(50, D_OUT)), inputs, targets, "scale", "data")
