"""Our transcoders' outputs against published libraries' and published formulas, with the same weights on both sides.

SAELens and sparsify run in the peers' environment through reference_transcoders.py. circuit-tracer's single-layer and
cross-layer formulas are written out here in NumPy, float64. Ours have scales and centres besides, which are folded into the
weights that the others get: that the outputs agree is a test of the folding too.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae.encoders import build_encoder
from sparsary.sae.encoders.jumprelu import PACE
from sparsary.sae.metrics import fvu
from sparsary.transcoders import CrossLayerTranscoder, Transcoder

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
needs_peers = pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment, .venv-peers: make peers")

TOKENS, D, LATENTS, K = 29, 13, 67, 5
RELU, TOPK, JUMPRELU = {"name": "relu"}, {"name": "topk", "k": K}, {"name": "jumprelu", "target_l0": 5}


def made(spec, skip, d_out):
    """A transcoder in float64 with scales and centre, and its weights without them."""
    torch.manual_seed(7)
    transcoder = Transcoder(D, d_out, LATENTS, build_encoder(spec), skip).double().eval()
    with torch.no_grad():
        for weights in (transcoder.W_enc, transcoder.b_enc, transcoder.W_dec, transcoder.b_dec, transcoder.in_centre):
            weights.copy_(torch.randn(weights.shape))
        if skip:
            transcoder.W_skip.copy_(torch.randn(d_out, D))
        transcoder.in_scale.fill_(1.7)
        transcoder.out_scale.fill_(0.4)
        inside, out = float(transcoder.in_scale), float(transcoder.out_scale)
        # y_hat = out (W_dec^T f(W_enc (x / in - c) + b_enc) + W_skip (x / in - c) + b_dec)
        folded = {
            "W_enc": transcoder.W_enc / inside,
            "b_enc": transcoder.b_enc - transcoder.W_enc @ transcoder.in_centre,
            "W_dec": transcoder.W_dec * out,
            "b_dec": transcoder.b_dec * out,
        }
        # Every library whose cases have no skip ignores it.
        W_skip = transcoder.W_skip if skip else torch.zeros(d_out, D).double()
        folded["W_skip"] = W_skip * out / inside
        folded["b_dec"] = folded["b_dec"] - out * W_skip @ transcoder.in_centre
        folded["threshold"] = torch.full((LATENTS,), 0.8, dtype=torch.float64)
        if spec["name"] == "jumprelu":
            transcoder.encoder.log_threshold.copy_(folded["threshold"].log() / PACE)
    return transcoder, folded


def ask(library, given, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "given.safetensors")
    command = [str(PEERS_PYTHON), str(ROOT / "tests/parity/reference_transcoders.py"), library]
    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [*command, str(tmp_path / "given.safetensors"), str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return load_file(tmp_path / "out.safetensors")


@pytest.mark.parity
@needs_peers
@pytest.mark.parametrize(
    ("case", "spec", "skip"),
    [
        ("Transcoder", RELU, False),
        ("SkipTranscoder", RELU, True),
        ("JumpReLUTranscoder", JUMPRELU, False),
        ("JumpReLUSkipTranscoder", JUMPRELU, True),
    ],
)
def test_saelens_transcoders_give_the_same(case, spec, skip, tmp_path):
    transcoder, folded = made(spec, skip, 11)
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    found = ask("saelens", folded | {"x": x}, tmp_path)
    torch.testing.assert_close(transcoder.encode(x).to_dense(LATENTS), found[f"{case}/code"], rtol=0, atol=1e-10)
    torch.testing.assert_close(transcoder(x), found[f"{case}/y_hat"], rtol=0, atol=1e-10)


@pytest.mark.parity
@needs_peers
@pytest.mark.parametrize(("case", "skip"), [("topk", False), ("topk_skip", True)])
def test_sparsify_transcoders_give_the_same(case, skip, tmp_path):
    transcoder, folded = made(TOPK, skip, D)
    x, y = torch.randn(2, TOKENS, D, dtype=torch.float64)
    found = ask("sparsify", folded | {"x": x, "y": y, "k": torch.tensor(K)}, tmp_path)
    torch.testing.assert_close(transcoder.encode(x).to_dense(LATENTS), found[f"{case}/code"], rtol=0, atol=1e-5)
    torch.testing.assert_close(transcoder(x), found[f"{case}/y_hat"], rtol=0, atol=1e-5)
    torch.testing.assert_close(fvu(y, transcoder(x)), found[f"{case}/fvu"], rtol=1e-5, atol=0)


def gate(p, threshold=None, k=None):
    """relu, jumprelu or topk of pre-activations; topk without a relu behind it."""
    if k is not None:
        least = np.sort(p, axis=1)[:, -k][:, None]
        return np.where(p >= least, p, 0)
    return np.maximum(p, 0) if threshold is None else p * (p > threshold)


@pytest.mark.parametrize(("spec", "skip"), [(RELU, True), (JUMPRELU, True), (TOPK, False), (TOPK, True)])
def test_circuit_tracer_s_single_layer_formula_gives_the_same(spec, skip):
    transcoder, folded = made(spec, skip, D)
    x = torch.randn(TOKENS, D, dtype=torch.float64)
    w = {name: tensor.detach().numpy() for name, tensor in folded.items()}
    p = x.numpy() @ w["W_enc"].T + w["b_enc"]
    a = gate(p, w["threshold"] if spec is JUMPRELU else None, K if spec is TOPK else None)
    # K largest of 67 are positive here, so that the relu we have and they lack does nothing.
    assert spec is not TOPK or (a[a != 0] > 0).all()
    y = a @ w["W_dec"] + w["b_dec"] + x.numpy() @ w["W_skip"].T
    np.testing.assert_allclose(transcoder(x).detach().numpy(), y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", [RELU, JUMPRELU, TOPK])
def test_circuit_tracer_s_cross_layer_formula_gives_the_same(spec):
    torch.manual_seed(7)
    layers, here = 3, 19
    clt = CrossLayerTranscoder(layers, layers * D, layers * D, layers * here, build_encoder(spec)).double().eval()
    with torch.no_grad():
        for weights in (*clt.b_enc, clt.b_dec, clt.in_centre):
            weights.copy_(torch.randn(weights.shape))
        for scale in (clt.in_scale, clt.out_scale):
            scale.copy_((torch.rand(layers).double() + 0.5).repeat_interleave(D))
        for encoder in clt.encoders:
            if spec is JUMPRELU:
                encoder.log_threshold.fill_(float(np.log(0.8)) / PACE)
    x = torch.randn(TOKENS, layers * D, dtype=torch.float64)
    expected = np.zeros((TOKENS, layers, D))
    inside, out = clt.in_scale[::D].numpy(), clt.out_scale[::D].numpy()
    for s, (site, block) in enumerate(zip(clt.sites, clt.blocks, strict=True)):
        W_enc, b_enc, W_dec = (t.detach().numpy() for t in (block.weights.W_enc, block.weights.b_enc, block.weights.W_dec))
        # As their files have it: W_enc_s (F, D), b_enc_s (F), W_dec_s (F, L - s, D), b_dec_s (D).
        b_enc = b_enc - W_enc @ clt.in_centre[site.reads].numpy()
        W_dec = W_dec.reshape(here, layers - s, D) * out[s:, None]
        a = gate(
            x[:, site.reads].numpy() @ (W_enc / inside[s]).T + b_enc,
            0.8 if spec is JUMPRELU else None,
            K if spec is TOPK else None,
        )
        for t in range(s, layers):
            expected[:, t] += a @ W_dec[:, t - s]
        expected[:, s] += clt.b_dec[site.writes].detach().numpy() * out[s]
    np.testing.assert_allclose(clt(x).detach().numpy(), expected.reshape(TOKENS, -1), rtol=0, atol=1e-10)
