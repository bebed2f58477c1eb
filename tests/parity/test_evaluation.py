"""Our reconstruction figures against SAELens's and dictionary_learning's own evaluation of the same dictionary and tokens.

Where definitions agree the figures do; docs/report.md says where they do not, and why.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sparsary.eval.metrics.reconstruction import Reconstruction
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment, .venv-peers: make peers"),
]

D, LATENTS, TOKENS, K = 13, 67, 301, 5

# Their name -> ours, where the definitions are the same.
SAME = {
    "saelens": {
        "l0": lambda r: r["l0_mean"],
        "cossim": lambda r: r["cosine"],
        "l2_ratio": lambda r: r["l2_ratio"],
        "relative_reconstruction_bias": lambda r: r["relative_reconstruction_bias"],
        # Since its version 6.19 streamed like ours; what it calls legacy is a mean of ratios.
        "explained_variance": lambda r: 1 - r["fvu"],
    },
    "dictionary_learning": {
        "l0": lambda r: r["l0_mean"],
        "cossim": lambda r: r["cosine"],
        "l2_ratio": lambda r: r["l2_ratio"],
        "relative_reconstruction_bias": lambda r: r["relative_reconstruction_bias"],
        "frac_alive": lambda r: 1 - r["dead_fraction"],
        # Blind to a constant offset: not 1 - fvu.
        "frac_variance_explained": lambda r: r["ev_residual_variance"],
    },
}


@pytest.mark.parametrize("library", SAME)
def test_the_same_definitions_give_the_same_figures(library, tmp_path):
    torch.manual_seed(3)
    sae = SAE(D, LATENTS, build_encoder({"name": "topk", "k": K})).double().eval()
    with torch.no_grad():
        sae.W_enc.copy_(F.normalize(sae.W_dec + 0.1 * torch.randn(LATENTS, D), dim=-1))
        sae.b_dec.copy_(torch.randn(D))
    x = torch.randn(TOKENS, D).double() + 1.0
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    given, out = tmp_path / "given.safetensors", tmp_path / "out.json"
    save_file({name: t.contiguous() for name, t in weights.items()} | {"x": x, "k": torch.tensor(K)}, given)
    command = [str(PEERS_PYTHON), str(ROOT / "tests/parity/reference_evaluation.py"), library, str(given), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = json.loads(out.read_text())
    measured = Reconstruction(D, LATENTS, torch.device("cpu"))
    with torch.no_grad():
        code = sae.encode(x)
        measured.update(x, sae.decode(code), code)
    ours = measured.report()
    for name, figure in SAME[library].items():
        assert figure(ours) == pytest.approx(theirs[name], rel=1e-6), name
