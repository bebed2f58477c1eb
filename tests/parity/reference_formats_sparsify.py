"""Dictionaries written by sparsify, and its outputs for them; or its outputs for dictionaries that we wrote.

    .venv-peers/bin/python tests/parity/reference_formats_sparsify.py golden tests/golden/formats/sparsify
    .venv-peers/bin/python tests/parity/reference_formats_sparsify.py run DIRECTORY...

``golden`` makes the folders that tests/sae/formats/test_sparsify.py loads: random weights, biases that are not zero, norms
that are not one. ``run`` loads each directory, reads ``x`` from ``given.safetensors`` and writes ``code`` and ``y`` into
``theirs.safetensors``.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

# Its kernels need a GPU. Read when it is imported.
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

D, LATENTS, TOKENS = 8, 24, 11
# case -> configuration; the folder in it is named after the module.
CASES = {
    "topk/layers.3": {"k": 5},
    "groupmax/layers.3": {"k": 6, "activation": "groupmax"},
    "transcoder/layers.3.mlp": {"k": 5, "transcode": True},
    "skip/layers.3.mlp": {"k": 5, "transcode": True, "skip_connection": True},
    "groupmax_skip/layers.3.mlp": {"k": 6, "transcode": True, "skip_connection": True, "activation": "groupmax"},
    "expanded/layers.3": {"k": 5, "num_latents": 0, "expansion_factor": 3},
    "bfloat16/layers.3": {"k": 5},
    "several/layers.1": {"k": 5},
    "several/layers.2": {"k": 4},
    "several/layers.10": {"k": 3},
    "seeds/layers.1/seed0": {"k": 5},
    "seeds/layers.1/seed1": {"k": 5},
}


@torch.no_grad()
def outputs(coder, x):
    acts, latents, _ = coder.encode(x)
    y = coder.decode(acts, latents)
    if coder.W_skip is not None:
        y = y + x @ coder.W_skip.mT
    return {"code": torch.zeros(len(x), coder.num_latents, dtype=acts.dtype).scatter_(1, latents, acts), "y": y.contiguous()}


@torch.no_grad()
def golden(out: Path) -> None:
    torch.manual_seed(3)
    x = 1.5 * torch.randn(TOKENS, D) + torch.randn(D)
    for number, (case, fields) in enumerate(CASES.items()):
        torch.manual_seed(number)
        dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
        coder = SparseCoder(D, SparseCoderConfig(**{"num_latents": LATENTS, **fields}), dtype=dtype)
        for parameter in coder.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
        coder.save_to_disk(out / case)
        save_file({"x": x, **outputs(coder, x.to(dtype))}, out / case / "expected.safetensors")
        run = {"model": "EleutherAI/pythia-70m-deduped", "ctx_len": 128, "sae": coder.cfg.to_dict()}
        (out / case.split("/")[0] / "config.json").write_text(json.dumps(run))
    about = {"library": "eai-sparsify", "version": version("eai-sparsify"), "torch": torch.__version__, "seed": 3}
    about |= {"command": ".venv-peers/bin/python " + " ".join(sys.argv), "sizes": [D, LATENTS, TOKENS]}
    (out / "header.json").write_text(json.dumps(about, indent=2) + "\n")


def run(directories) -> None:
    for directory in directories:
        coder = SparseCoder.load_from_disk(directory)
        save_file(outputs(coder, load_file(directory / "given.safetensors")["x"]), directory / "theirs.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("golden", "run"))
    parser.add_argument("directories", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "golden":
        golden(arguments.directories[0])
    else:
        run(arguments.directories)


if __name__ == "__main__":
    main()
