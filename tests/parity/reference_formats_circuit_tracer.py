"""Transcoders written by circuit-tracer, and its outputs for them; or its outputs for transcoders that we wrote.

    .venv-peers/bin/python tests/parity/reference_formats_circuit_tracer.py golden tests/golden/formats/circuit_tracer
    .venv-peers/bin/python tests/parity/reference_formats_circuit_tracer.py run DIRECTORY...

``golden`` makes the folders that tests/sae/formats/test_circuit_tracer.py loads: random weights that nobody trained. Those of
Gemma Scope are written after its layout and read by circuit-tracer's loaders of it. ``run`` loads each directory, reads ``x``
(layers, tokens, width) from its ``given.safetensors`` and writes ``code`` and ``y`` into its ``theirs.safetensors``.
"""

import argparse
import json
import logging
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.transcoder import cross_layer_transcoder as across
from circuit_tracer.transcoder import single_layer_transcoder as single
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from safetensors.torch import load_file, save_file

LAYERS, D, LATENTS, TOKENS, K = 3, 8, 24, 11, 20
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
ABOUT = {"model_name": "gpt2", "scan": "golden", **HOOKS}
CPU = torch.device("cpu")
# case -> gate, whether it has a skip path, dtype.
SETS = {
    "set_relu": ("relu", False, torch.float32),
    "set_jumprelu": ("jumprelu", False, torch.float32),
    # So many that some of them are negative.
    "set_topk": ("topk", False, torch.float32),
    "set_skip": ("relu", True, torch.float32),
    "set_jumprelu_skip": ("jumprelu", True, torch.float32),
    "set_bfloat16": ("jumprelu", False, torch.bfloat16),
}
ACROSS = {
    "across_relu": ("relu", torch.float32),
    "across_jumprelu": ("jump_relu", torch.float32),
    "across_bfloat16": ("jump_relu", torch.bfloat16),
}


def inputs() -> torch.Tensor:
    torch.manual_seed(5)
    return 1.5 * torch.randn(LAYERS, TOKENS, D) + torch.randn(LAYERS, 1, D)


@torch.no_grad()
def filled(module):
    """Random weights in place of zeros, thresholds around the middle of what is positive."""
    for name, parameter in module.named_parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape))
        if "threshold" in name:
            parameter.abs_().mul_(2)
    return module.eval()


@torch.no_grad()
def keep(directory: Path, module, x: torch.Tensor, dtype: torch.dtype) -> None:
    results = {"code": module.encode(x.to(dtype)), "y": output(module, x.to(dtype))}
    save_file(
        {"x": x} | {name: value.detach().contiguous() for name, value in results.items()}, directory / "expected.safetensors"
    )


def output(module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, single.TranscoderSet):
        return torch.stack([transcoder(x[i]) for i, transcoder in enumerate(module)])
    return module(x)


def golden(out: Path) -> None:
    x = inputs()
    for number, (case, (gate, skip, dtype)) in enumerate(SETS.items()):
        torch.manual_seed(number)
        functions = {"relu": lambda: torch.nn.functional.relu, "topk": lambda: TopK(K)}
        functions["jumprelu"] = lambda dtype=dtype: JumpReLU(torch.zeros(LATENTS, dtype=dtype), 0.1)
        members = {
            i: filled(single.SingleLayerTranscoder(D, LATENTS, functions[gate](), i, skip, device=CPU, dtype=dtype))
            for i in range(LAYERS)
        }
        module = single.TranscoderSet(members, **HOOKS)
        module.to_safetensors(str(out / case))
        config = {**ABOUT, "model_kind": "transcoder_set"} | ({"activation": "topk", "k": K} if gate == "topk" else {})
        (out / case / "config.yaml").write_text(yaml.safe_dump(config))
        keep(out / case, module, x, dtype)
    for number, (case, (gate, dtype)) in enumerate(ACROSS.items()):
        torch.manual_seed(100 + number)
        module = filled(across.CrossLayerTranscoder(LAYERS, LATENTS, D, gate, lazy_decoder=False, device=CPU, dtype=dtype))
        module.to_safetensors(str(out / case))
        (out / case / "config.yaml").write_text(yaml.safe_dump({**ABOUT, "model_kind": "cross_layer_transcoder"}))
        keep(out / case, module, x, dtype)
    gemma_scope(out, x)
    about = {"library": "circuit-tracer", "version": version("circuit-tracer"), "torch": torch.__version__, "seed": 5}
    about |= {"command": ".venv-peers/bin/python " + " ".join(sys.argv), "sizes": [LAYERS, D, LATENTS, TOKENS, K]}
    (out / "header.json").write_text(json.dumps(about, indent=2) + "\n")


def parameters(*targets: int) -> dict[str, torch.Tensor]:
    """One layer of Gemma Scope; ``targets`` are the layers it writes to, if several."""
    sizes = {"w_enc": (D, LATENTS), "w_dec": (LATENTS, *targets, D), "b_enc": (LATENTS,), "b_dec": (D,)}
    return {name: 0.5 * torch.randn(size) for name, size in sizes.items()} | {"threshold": torch.randn(LATENTS).abs()}


def gemma_scope(out: Path, x: torch.Tensor) -> None:
    torch.manual_seed(200)
    # The first release's transcoders read behind an RMS norm: so do these, of rows that are normed.
    normed = torch.nn.functional.normalize(x, dim=-1) * D**0.5
    first = out / "gemma_scope_1" / "gemma-scope-2b-pt-transcoders" / "layer_4" / "width_16k" / "average_l0_6"
    second = out / "gemma_scope_2" / "gemma-scope-2-1b-pt" / "transcoder" / "layer_4_width_16k_l0_small_affine"
    cross = out / "gemma_scope_2_across" / "gemma-scope-2-1b-pt" / "clt" / "width_16k_l0_small"
    for folder in (first, second, cross):
        folder.mkdir(parents=True)
    named = {key.replace("w_", "W_"): value.numpy() for key, value in parameters().items()}
    np.savez(first / "params.npz", **named)
    keep(first, single.load_gemma_scope_transcoder(str(first / "params.npz"), 0, CPU), normed[0], torch.float32)
    save_file(parameters() | {"affine_skip_connection": torch.randn(D, D)}, second / "params.safetensors")
    module = single.load_gemma_scope_2_transcoder(str(second / "params.safetensors"), 0, CPU)
    keep(second, module, x[0], torch.float32)
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": True}
    hooks = {"hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output"}
    hooks |= {"hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output"}
    (second / "config.json").write_text(json.dumps(config | hooks))
    paths = {i: str(cross / f"params_layer_{i}.safetensors") for i in range(LAYERS)}
    for i, path in paths.items():
        tensors = parameters(LAYERS)
        tensors["w_dec"][:, :i] = 0
        save_file(tensors, path)
    # Their loader stops one layer before the last number it is given.
    module = across.load_gemma_scope_2_clt(paths | {LAYERS: ""}, device=CPU, dtype=torch.float32)
    keep(cross, module, x, torch.float32)
    gemma_scope_crosscoder(out, x)


def gemma_scope_crosscoder(out: Path, x: torch.Tensor) -> None:
    """A weakly causal crosscoder: files as of a cross-layer transcoder, which circuit-tracer reads alike."""
    torch.manual_seed(300)
    folder = out / "gemma_scope_2_crosscoder" / "gemma-scope-2-1b-pt" / "crosscoder" / "layer_7_13_22_width_16k_l0_medium"
    folder.mkdir(parents=True)
    paths = {i: str(folder / f"params_layer_{i}.safetensors") for i in range(LAYERS)}
    for i, path in paths.items():
        tensors = parameters(LAYERS)
        tensors["w_dec"][:, :i] = 0
        save_file(tensors, path)
    module = across.load_gemma_scope_2_clt(paths | {LAYERS: ""}, device=CPU, dtype=torch.float32)
    keep(folder, module, x, torch.float32)


@torch.no_grad()
def run(directories) -> None:
    for directory in directories:
        config = yaml.safe_load((directory / "config.yaml").read_text())
        x = load_file(directory / "given.safetensors")["x"]
        hooks = {key: config[key] for key in HOOKS}
        if config["model_kind"] == "cross_layer_transcoder":
            module = across.load_clt(str(directory), **hooks, device=CPU, dtype=x.dtype)
        else:
            paths = {i: str(directory / f"layer_{i}.safetensors") for i in range(len(x))}
            module = single.load_transcoder_set(paths, config["scan"], device=CPU, dtype=x.dtype, **hooks)
            for transcoder in module if config.get("activation") == "topk" else ():
                # Its repository does so by the configuration; the version that is installed does not yet.
                transcoder.activation_function = TopK(config["k"])
        save_file(
            {"code": module.encode(x).contiguous(), "y": output(module, x).contiguous()}, directory / "theirs.safetensors"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("golden", "run"))
    parser.add_argument("directories", nargs="+", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    if arguments.what == "golden":
        golden(arguments.directories[0])
    else:
        run(arguments.directories)


if __name__ == "__main__":
    main()
