"""circuit-tracer loads what we write, and gives our outputs. The other direction: tests/sae/formats/test_circuit_tracer.py."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import write_dictionaries, write_dictionary
from sparsary.transcoders import CrossLayerTranscoder, Transcoder

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
LAYERS, TOKENS, D, LATENTS = 3, 29, 14, 37
SPECS = {
    "relu": {"name": "relu"},
    "jumprelu": {"name": "jumprelu", "target_l0": 4},
    "batch_topk": {"name": "batch_topk", "k": 4},
    "matryoshka": {"name": "matryoshka", "k": 4},
    "mutual_choice": {"name": "mutual_choice", "k": 4},
    "feature_choice": {"name": "feature_choice", "k": 4},
    "threshold": {"name": "threshold"},
}


@torch.no_grad()
def filled(d):
    """Random weights, scales and centres; thresholds are those of a few batches."""
    for name, parameter in d.named_parameters():
        if "log" not in name:
            parameter.normal_()
    d.renormalize()
    for name, buffer in d.named_buffers():
        if name == "in_centre":
            buffer.normal_()
        elif name.endswith("threshold") and buffer.ndim:
            buffer.uniform_(0, 2)
    per_layer = d.in_scale.ndim > 0
    for scale, values in ((d.in_scale, [1.7, 0.4, 2.2]), (d.out_scale, [0.6, 3.1, 1.3])):
        scale.copy_(torch.tensor(values).repeat_interleave(D) if per_layer else torch.tensor(values[0]))
    for _ in range(3):
        d.encode(torch.randn(23, d.d_in), torch.randn(23, d.d_out))
    return d.eval()


TOPK = {"name": "topk", "k": 22}


def about(layers):
    hooks = {f"hooks_{side}": [f"transformer.h.{i}.mlp:{side}" for i in layers] for side in ("in", "out")}
    return {"model": {"id": "openai-community/gpt2"}, **hooks}


@torch.no_grad()
def written(case, folder, x):
    """Write a case; our outputs (layers, tokens, width), and where which latents fire."""
    name, kind = case.split("-")
    if kind == "across" or kind == "joint":
        d = CrossLayerTranscoder(
            LAYERS, LAYERS * D, LAYERS * D, LAYERS * LATENTS, build_encoder(SPECS.get(name, TOPK)), kind == "joint"
        )
        write_dictionary(filled(d), folder, "circuit_tracer", about(range(LAYERS)))
        beside = x.transpose(0, 1).flatten(1)
        y, code = d(beside), d.encode(beside).to_dense(d.n_latents)
        return y.unflatten(1, (LAYERS, D)).transpose(0, 1), code.unflatten(1, (LAYERS, LATENTS)).transpose(0, 1) != 0
    members = {str(i): filled(Transcoder(D, D, LATENTS, build_encoder(SPECS[name]), kind == "skip")) for i in range(LAYERS)}
    write_dictionaries(members, folder, "circuit_tracer", {key: about([key]) for key in members})
    y = torch.stack([d(x[int(i)]) for i, d in members.items()])
    return y, torch.stack([d.encode(x[int(i)]).to_dense(LATENTS) for i, d in members.items()]) != 0


@pytest.mark.parity
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment, .venv-peers: make peers")
def test_circuit_tracer_gives_our_outputs_for_what_we_write(tmp_path):
    torch.manual_seed(0)
    x, ours = torch.randn(LAYERS, TOKENS, D) + 0.5, {}
    cases = [f"{name}-{kind}" for name in SPECS for kind in ("plain", "skip")]
    for case in [*cases, "relu-across", "jumprelu-across", "threshold-across", "topk-joint"]:
        ours[case] = written(case, tmp_path / case, x)
        save_file({"x": x}, tmp_path / case / "given.safetensors")
        assert 0 < ours[case][1].float().mean() < 0.7, case
    script = ROOT / "tests" / "parity" / "reference_formats_circuit_tracer.py"
    command = [str(PEERS_PYTHON), str(script), "run", *(str(tmp_path / case) for case in ours)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    for case, (y, fires) in ours.items():
        theirs = load_file(tmp_path / case / "theirs.safetensors")
        torch.testing.assert_close(theirs["y"], y, rtol=1e-5, atol=1e-4, msg=lambda text, case=case: f"{case}: {text}")
        assert torch.equal(theirs["code"] != 0, fires), case
