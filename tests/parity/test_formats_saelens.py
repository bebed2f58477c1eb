"""SAELens loads what we write, and gives our outputs. The other direction needs no peers: tests/sae/formats/test_saelens.py."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import write_dictionary
from sparsary.sae.row_norm import ROW_NORMS
from sparsary.transcoders import Transcoder

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
TOKENS, D, D_OUT, LATENTS = 29, 14, 5, 37
SPECS = {
    "topk": {"name": "topk", "k": 4},
    "gradient_topk": {"name": "gradient_topk", "k": 4, "beta": 2.0},
    "mutual_choice": {"name": "mutual_choice", "k": 4},
    "feature_choice": {"name": "feature_choice", "k": 4},
    "batch_topk": {"name": "batch_topk", "k": 4},
    "matryoshka": {"name": "matryoshka", "k": 4},
    "relu": {"name": "relu"},
    "jumprelu": {"name": "jumprelu", "target_l0": 4},
    "gated": {"name": "gated"},
    "matching_pursuit": {"name": "matching_pursuit", "k": 6},
    "signed_topk": {"name": "signed_topk", "k": 4, "by": "size"},
    "threshold": {"name": "threshold"},
    "residual_pursuit": {"name": "residual_pursuit", "max_steps": 9, "residual_norm": 0.7, "stop_on_repeat": True},
}


def filled(d, row_norm):
    """Random weights, and scales unless a row norm is in their place; thresholds are those of a few batches."""
    with torch.no_grad():
        for name, parameter in d.named_parameters():
            if "log" not in name:
                parameter.normal_(std=0.5)
        d.renormalize()
        if d.encoder.tied:
            torch.nn.functional.normalize(d.W_dec, dim=1, out=d.W_dec.data)
        if isinstance(d, Transcoder):
            d.in_centre.normal_()
        elif hasattr(d.encoder, "threshold") and isinstance(d.encoder.threshold, torch.Tensor):
            d.encoder.threshold.uniform_(0, 1)
    if row_norm is None:
        d.in_scale.fill_(1.7)
        d.out_scale.fill_(1.7 if isinstance(d, SAE) else 0.6)
    for _ in range(3):
        d.encode(torch.randn(23, D), torch.randn(23, d.d_out))
    return d.eval()


def cases():
    for name, spec in SPECS.items():
        for row_norm in (None, *ROW_NORMS):
            yield f"{name}-{row_norm}", lambda s=spec, r=row_norm: SAE(D, LATENTS, build_encoder(s), row_norm=r), row_norm
        if "pursuit" not in name:
            built = lambda s=spec: SAE(D, LATENTS, build_encoder(s), apply_b_dec_to_input=False)  # noqa: E731
            yield f"{name}-not_subtracted", built, None
    for name in ("relu", "jumprelu", "mutual_choice", "threshold"):
        for skip in (False, True):
            built = lambda n=name, s=skip: Transcoder(D, D_OUT, LATENTS, build_encoder(SPECS[n]), s)  # noqa: E731
            yield f"{name}-transcoder-{skip}", built, None
    yield "heads", lambda: SAE(D, LATENTS, build_encoder(SPECS["topk"])), None


@pytest.mark.parity
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment, .venv-peers: make peers")
def test_saelens_gives_our_outputs_for_what_we_write(tmp_path):
    torch.manual_seed(0)
    x, ours = torch.randn(TOKENS, D) + 0.5, {}
    for case, build, row_norm in cases():
        d = filled(build(), row_norm)
        hook = "transformer.h.1.attn.c_proj:in" if case == "heads" else "transformer.h.1:out"
        about = {"model": {"id": "openai-community/gpt2"}, "hooks_in": [hook], "hooks_out": ["transformer.h.1.mlp:out"]}
        write_dictionary(d, tmp_path / case, "saelens", about | ({"hook": hook} if isinstance(d, SAE) else {}))
        # SAELens does not centre: the model that it runs is.
        seen = x - x.mean(1, keepdim=True) if row_norm == "centred" else x
        save_file({"x": seen}, tmp_path / case / "given.safetensors")
        code = d.encode(seen)
        ours[case] = (code.to_dense(LATENTS) != 0, d.decode(code, seen).detach())
        assert 0 < ours[case][0].float().mean() < 0.7, case
    script = ROOT / "tests" / "parity" / "reference_formats_saelens.py"
    command = [str(PEERS_PYTHON), str(script), "run", *(str(tmp_path / case) for case in ours)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    for case, (fires, y) in ours.items():
        theirs = load_file(tmp_path / case / "theirs.safetensors")
        torch.testing.assert_close(theirs["y"], y, rtol=1e-5, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")
        assert torch.equal(theirs["code"] != 0, fires), case
