"""dictionary_learning and sparsify load what we write, and give our outputs. The other direction needs no peers."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.sae.formats import write_dictionary
from sparsary.transcoders import Transcoder

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
TOKENS, D, LATENTS = 29, 14, 36
HOOK = "gpt_neox.layers.1:out"
ABOUT = {"model": {"id": "EleutherAI/pythia-70m-deduped"}, "text": {"context_length": 128}}
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
    "threshold": {"name": "threshold"},
    "group_max": {"name": "group_max", "k": 4},
}
KEPT = ("topk", "gradient_topk", "group_max")


def filled(d):
    """Random weights and scales; thresholds are those of a few batches."""
    with torch.no_grad():
        for name, parameter in d.named_parameters():
            if "log" not in name:
                parameter.normal_(std=0.5)
        d.renormalize()
        if isinstance(d, Transcoder):
            d.in_centre.normal_()
        elif isinstance(getattr(d.encoder, "threshold", None), torch.Tensor):
            d.encoder.threshold.uniform_(0, 1)
    d.in_scale.fill_(1.7)
    d.out_scale.fill_(1.7 if isinstance(d, SAE) else 0.6)
    for _ in range(3):
        d.encode(torch.randn(23, D), torch.randn(23, D))
    return d.eval()


def autoencoders(names):
    """Each family, with its bias subtracted from inputs and without."""
    for name in names:
        for subtracts in (True, False):
            d = SAE(D, LATENTS, build_encoder(SPECS[name]), apply_b_dec_to_input=subtracts)
            yield f"{name}-{subtracts}", filled(d), ABOUT | {"hook": HOOK}


def transcoders():
    about = ABOUT | {"hooks_in": ["gpt_neox.layers.1.mlp:in"], "hooks_out": ["gpt_neox.layers.1.mlp:out"]}
    for name in KEPT:
        for skip in (False, True):
            yield f"{name}-transcoder-{skip}", filled(Transcoder(D, D, LATENTS, build_encoder(SPECS[name]), skip)), about


CASES = {
    "dictionary_learning": lambda: [*autoencoders([name for name in SPECS if name != "group_max"])],
    "sparsify": lambda: [*autoencoders(KEPT), *transcoders()],
}
# Where in an exported folder the library finds the dictionary.
INSIDE = {
    "dictionary_learning": lambda case: "",
    "sparsify": lambda case: "layers.1.mlp" if "transcoder" in case else "layers.1",
}


@pytest.mark.parity
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment, .venv-peers: make peers")
@pytest.mark.parametrize("library", CASES)
def test_the_library_gives_our_outputs_for_what_we_write(library, tmp_path):
    torch.manual_seed(0)
    x, ours, folders = torch.randn(TOKENS, D) + 0.5, {}, {}
    for case, d, about in CASES[library]():
        write_dictionary(d, tmp_path / case, library, about)
        folders[case] = tmp_path / case / INSIDE[library](case)
        save_file({"x": x}, folders[case] / "given.safetensors")
        code = d.encode(x)
        ours[case] = (code.to_dense(LATENTS) != 0, d.decode(code, x).detach())
        assert 0 < ours[case][0].float().mean() < 0.7, case
    script = ROOT / "tests" / "parity" / f"reference_formats_{library}.py"
    command = [str(PEERS_PYTHON), str(script), "run", *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    for case, (fires, y) in ours.items():
        theirs = load_file(folders[case] / "theirs.safetensors")
        torch.testing.assert_close(theirs["y"], y, rtol=1e-5, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")
        assert torch.equal(theirs["code"] != 0, fires), case
