"""Dictionaries written by SAELens, and its outputs for them; or its outputs for dictionaries that we wrote.

    .venv-peers/bin/python tests/parity/reference_formats_saelens.py golden tests/golden/formats/saelens
    .venv-peers/bin/python tests/parity/reference_formats_saelens.py run DIRECTORY...

``golden`` makes the folders that tests/sae/formats/test_saelens.py loads: random weights that nobody trained, with biases
that are not zero and norms that are not one, in every architecture and normalisation. ``run`` loads each directory, reads
``x`` from its ``given.safetensors`` and writes ``code`` and ``y`` into its ``theirs.safetensors``.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file

D, LATENTS, D_OUT, TOKENS = 8, 24, 5, 11
SCALE = 0.37
ABOUT = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post", "context_size": 128, "prepend_bos": True}
OUT = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
NORMS = ("none", "constant_norm_rescale", "layer_norm")
RESCALED = {"k": 5, "rescale_acts_by_decoder_norm": True}
# case -> architecture and configuration.
AUTOENCODERS = {
    "standard": ("standard", {}),
    "topk": ("topk", {"k": 5}),
    "topk_rescaled": ("topk", RESCALED),
    "abstopk": ("abstopk", {"k": 5}),
    "jumprelu": ("jumprelu", {}),
    "gated": ("gated", {}),
    "matching_pursuit": ("matching_pursuit", {"residual_threshold": 0.9}),
}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
# From the middle of a training: weights in scaled units, the scale beside them.
TRAINING = {
    "standard_training": ("standard", {}),
    "topk_training": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "jumprelu_training": ("jumprelu", {}),
    "gated_training": ("gated", {}),
    "matching_pursuit_training": ("matching_pursuit", {"residual_threshold": 0.9, "decoder_init_norm": 1.0}),
    "batchtopk_training": ("batchtopk", {"k": 5.0, "rescale_acts_by_decoder_norm": True}),
    "batchtopk_plain_training": ("batchtopk", {"k": 5.0, "rescale_acts_by_decoder_norm": False}),
    "matryoshka_training": ("matryoshka_batchtopk", {"k": 5.0, "matryoshka_widths": [6, 24]}),
}
# Flat configurations: fields beside those that all have.
HOOK = "blocks.3.hook_resid_pre"
LEGACY = {
    "legacy_bare": {"hook_point": HOOK, "hook_point_layer": 3},
    "legacy_flags": {"hook_name": HOOK, "normalize_activations": False, "apply_b_dec_to_input": False, "prepend_bos": False},
    "legacy_topk": {
        "hook_name": HOOK,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "finetuning_scaling_factor": False,
    },
    "legacy_topk_renamed": {
        "hook_name": HOOK,
        "activation_fn": "topk",
        "activation_fn_kwargs": {"k": 4},
        "architecture": "standard",
    },
    "legacy_jumprelu": {"hook_name": HOOK, "architecture": "jumprelu", "activation_fn_str": "relu"},
    "legacy_layer_norm": {"hook_name": HOOK, "normalize_activations": "layer_norm"},
}


def inputs() -> torch.Tensor:
    torch.manual_seed(3)
    return 1.5 * torch.randn(TOKENS, D) + torch.randn(D)


@torch.no_grad()
def filled(sae, seed):
    """Random weights in place of initial ones."""
    torch.manual_seed(seed)
    for name, parameter in sae.named_parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape))
        if name == "threshold":
            parameter.abs_()
    pursuit = sae.cfg.architecture() == "matching_pursuit"
    # Pursuits of long atoms overshoot.
    lengths = 0.8 + 0.3 * torch.rand(len(sae.W_dec), 1) if pursuit else 0.5 + torch.rand(len(sae.W_dec), 1)
    sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1) * lengths)
    for name, buffer in sae.named_buffers():
        if name == "topk_threshold":
            buffer.fill_(0.4)
    return sae.eval()


@torch.no_grad()
def keep(directory, sae, x, dtype=torch.float32):
    code = sae.encode(x.to(dtype))
    code = code.to_dense() if code.is_sparse else code
    save_file({"x": x, "code": code.contiguous(), "y": sae(x.to(dtype)).contiguous()}, directory / "expected.safetensors")


def golden(out: Path) -> None:
    x = inputs()
    cases = {
        f"{case}-{norm}": (architecture, {**config, "normalize_activations": norm})
        for case, (architecture, config) in AUTOENCODERS.items()
        for norm in NORMS
    }
    for case in ("standard", "jumprelu", "gated", "matching_pursuit"):
        architecture, config = AUTOENCODERS[case]
        cases[f"{case}-not_subtracted"] = (architecture, {**config, "apply_b_dec_to_input": False})
    for name in TRANSCODERS:
        for norm in NORMS[:1] if "jumprelu" in name else NORMS:
            config = {"d_out": D_OUT, "apply_b_dec_to_input": False, "normalize_activations": norm}
            cases[f"{name}-{norm}"] = (name, config)
    cases["jumprelu-bfloat16"] = ("jumprelu", {"dtype": "bfloat16"})
    for number, (case, (architecture, config)) in enumerate(cases.items()):
        build, configuration = get_sae_class(architecture)
        sae = filled(build(configuration(d_in=D, d_sae=LATENTS, **config)), number)
        for key, value in (ABOUT | (OUT if "transcoder" in case else {})).items():
            sae.cfg.metadata[key] = value
        sae.save_model(out / case)
        keep(out / case, sae, x, torch.bfloat16 if "bfloat16" in case else torch.float32)
    for number, (case, (architecture, config)) in enumerate(TRAINING.items()):
        training(out / case, architecture, config | {"normalize_activations": "expected_average_only_in"}, 100 + number, x)
    whitened = {"normalize_activations": "covariance_whitening"}
    training(out / "standard_whitened", "standard", whitened, 200, x)
    training(out / "gated_whitened", "gated", whitened | {"apply_b_dec_to_input": False}, 201, x)
    for number, (case, fields) in enumerate(LEGACY.items()):
        legacy(out / case, fields, 300 + number, x)
    about = {"library": "sae_lens", "version": sae_lens.__version__, "torch": torch.__version__, "seed": 3}
    about |= {"command": ".venv-peers/bin/python " + " ".join(sys.argv), "sizes": [D, LATENTS, D_OUT, TOKENS]}
    (out / "header.json").write_text(json.dumps(about, indent=2) + "\n")


def legacy(directory, fields, seed, x):
    """A flat configuration as versions 2 to 5 wrote it; version 6 still reads it, and its outputs are kept."""
    architecture = fields.get("architecture", "standard")
    build, configuration = get_sae_class(architecture)
    filled(build(configuration(d_in=D, d_sae=LATENTS)), seed).save_model(directory)
    flat = {"d_in": D, "d_sae": LATENTS, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small"}
    flat |= {"hook_layer": 3, "hook_head_index": None, "context_size": 128, "dataset_path": "none", **fields}
    (directory / "cfg.json").write_text(json.dumps(flat))
    keep(directory, SAE.load_from_disk(directory), x)


def training(directory, architecture, config, seed, x):
    """A checkpoint as training leaves it, and what its final export, folded by SAELens itself, makes of raw inputs."""
    build, configuration = get_sae_training_class(architecture)
    sae = filled(build(configuration(d_in=D, d_sae=LATENTS, **config)), seed)
    sae.save_model(directory)
    torch.manual_seed(seed)
    if config["normalize_activations"] == "covariance_whitening":
        matrix = torch.randn(D, D)
        whitening = ActivationWhitening(mean=torch.randn(D), matrix=matrix, inverse_matrix=torch.linalg.inv(matrix))
        ActivationScaler(whitening=whitening).save(str(directory / "activation_scaler.json"))
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    else:
        ActivationScaler(scaling_factor=SCALE).save(str(directory / "activation_scaler.json"))
        sae.fold_activation_norm_scaling_factor(SCALE)
    final = directory / "final"
    sae.save_inference_model(str(final))
    keep(directory, SAE.load_from_disk(final), x)
    for file in final.iterdir():
        file.unlink()
    final.rmdir()


@torch.no_grad()
def run(directories) -> None:
    for directory in directories:
        sae = SAE.load_from_disk(directory).eval()
        x = load_file(directory / "given.safetensors")["x"].to(sae.dtype)
        if sae.cfg.reshape_activations == "hook_z":
            x = x.reshape(len(x), 2, -1)
        code = sae.encode(x)
        code = code.to_dense() if code.is_sparse else code
        save_file({"code": code.contiguous(), "y": sae(x).flatten(1).contiguous()}, directory / "theirs.safetensors")


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
