"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``.

The dictionaries were trained on activations scaled to a mean norm of ``sqrt(d)``; the configuration records the data set's mean
norms. The single threshold is compared with the norm of what a latent writes, in units of raw outputs, while weights are in
normalized units. Source: He et al. 2024, arXiv:2410.20526, and the code that reads the release in OpenMOSS's
Language-Model-SAEs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Format, Read, ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles
from .origin import origin, reading_before_norm, with_origin

CONFIG = "hyperparams.json"
WEIGHTS = ("checkpoints/final.safetensors", "checkpoints/pruned.safetensors")
KEYS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
# Default model: releases for it do not name it.
MODEL = "meta-llama/Llama-3.1-8B"
UNSCALED = ("inference", "none", None)


class LlamaScope(Format):
    name = "llama_scope"
    title = "Llama Scope"

    def detect(self, source: SourceFiles) -> str | None:
        found = [name for name in WEIGHTS if source.has(name)]
        return f"{CONFIG} and {found[0]}" if source.has(CONFIG) and found else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        config = source.config(CONFIG)
        weights = next((name for name in WEIGHTS if source.has(name)), WEIGHTS[0])
        where, tensors = source.path(weights), source.tensors(weights)
        kind = kind_of(where, config)
        n = _dictionary(where, config, tensors, kind)
        scale_in, scale_out = scales(where, config, n.d_in, n.d_out)
        n = n.noting(
            *scale_words(scale_in, scale_out),
            scale_in=scale_in,
            scale_out=scale_out,
            gate=_activation_fn(where, config, options, scale_out),
            row_norm="constant_norm" if config.get("norm_activation") == "token-wise" else None,
        )
        n, reads = reading_before_norm(n, config["hook_point_in"], options.model or MODEL)
        model = config.get("model_name") or MODEL
        provenance, warnings = origin(self.name, config, model, [reads], [config["hook_point_out"]], options)
        return with_origin(n, provenance, warnings, "decoder transposed", f"the model taken to be {model}")

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError("llama_scope: read-only format, the layout of one release. Use --to saelens.")


def kind_of(where: object, config: Mapping[str, Any]) -> str:
    """Return "sae" if the input and output hooks are equal, else "transcoder".

    Raises:
        ValueError: If a hook is missing, or the configuration requires an unsupported GLU encoder.
    """
    require_keys(where, config, ("hook_point_in", "hook_point_out"))
    if config.get("use_glu_encoder"):
        raise ValueError(
            f"{where}: use_glu_encoder: expected false, got true: encoders with a gated linear unit are not supported. It "
            "cannot be loaded."
        )
    for key in ("hook_point_in", "hook_point_out"):
        if not isinstance(config[key], str):
            raise ValueError(f"{where}: {key}: expected a hook's name, got {config[key]!r}.")
    return "sae" if config["hook_point_in"] == config["hook_point_out"] else "transcoder"


def _dictionary(where: object, config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str) -> CanonicalSAE:
    """Build the dictionary in the file's normalized units, before activation function and scales are set."""
    if config.get("use_decoder_bias") is False and "decoder.bias" not in tensors and "decoder.weight" in tensors:
        bias = torch.zeros(len(tensors["decoder.weight"]), dtype=tensors["decoder.weight"].dtype)
        tensors = {**tensors, "decoder.bias": bias}
    require_keys(where, tensors, KEYS)
    unknown = sorted(set(tensors) - set(KEYS))
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(KEYS)}, got also {', '.join(unknown)}.")
    d_model, d_sae = config.get("d_model"), config.get("d_sae")
    for key, size in (("d_model", d_model), ("d_sae", d_sae)):
        if size is not None and not isinstance(size, int):
            raise ValueError(f"{where}: {key}: expected a whole number, got {size!r}.")
    require_shape(where, "encoder.weight", tuple(tensors["encoder.weight"].shape), (d_sae, d_model))
    require_shape(where, "decoder.weight", tuple(tensors["decoder.weight"].shape), (d_model, d_sae))
    centred = config.get("apply_decoder_bias_to_pre_encoder", False)
    return CanonicalSAE(
        kind=kind,
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["decoder.weight"].T,
        b_out=tensors["decoder.bias"],
        b_in=tensors["decoder.bias"] if centred else None,
        gate=ActivationFn("relu"),
    )


def scales(where: object, config: Mapping[str, Any], d_in: int, d_out: int) -> tuple[float, float]:
    """Return the factor that multiplies inputs and the factor that divides outputs.

    Raises:
        ValueError: If the normalization needs values that are not in the file, or mean norms are missing.
    """
    how = config.get("norm_activation", "dataset-wise")
    if how in UNSCALED or (how == "token-wise" and config["hook_point_in"] == config["hook_point_out"]):
        return 1.0, 1.0
    if how != "dataset-wise":
        raise ValueError(
            f"{where}: norm_activation: expected dataset-wise, inference or, for an SAE, token-wise, got {how!r}, which "
            "scales outputs by norms that inference does not know. It cannot be loaded."
        )
    means = config.get("dataset_average_activation_norm")
    if not isinstance(means, Mapping) or not {"in", "out"} <= means.keys():
        raise ValueError(
            f"{where}: dataset_average_activation_norm: expected the mean norms in and out, got {means!r}. Weights are in "
            "units of these norms. Add them to the configuration."
        )
    return scale_of(where, "in", means["in"], d_in), scale_of(where, "out", means["out"], d_out)


def scale_of(where: object, name: str, norm: Any, width: int) -> float:
    """Return the factor that scales activations of mean norm ``norm`` to ``sqrt(width)``."""
    if not isinstance(norm, (int, float)) or isinstance(norm, bool) or not 0 < norm < float("inf"):
        raise ValueError(f"{where}: dataset_average_activation_norm: {name}: expected a number above 0, got {norm!r}.")
    return width**0.5 / norm


def _activation_fn(where: object, config: Mapping[str, Any], options: ReadOptions, scale_out: float) -> ActivationFn:
    """Return the activation function, in the units of the weights."""
    name, by_norm = config.get("act_fn"), config.get("sparsity_include_decoder_norm", True)
    if name == "relu":
        return ActivationFn("relu")
    if name == "topk":
        return ActivationFn("topk", k=config.get("top_k") if options.k is None else options.k, by_norm=by_norm)
    if name != "jumprelu":
        raise ValueError(f"{where}: act_fn: expected jumprelu, topk or relu, got {name!r}.")
    if not by_norm:
        raise ValueError(
            f"{where}: sparsity_include_decoder_norm: expected true with jumprelu, got {by_norm!r}. No release has this, and "
            "the units of its threshold are not known. It cannot be loaded."
        )
    level = config.get("jump_relu_threshold") if options.threshold is None else options.threshold
    if not isinstance(level, (int, float)) or isinstance(level, bool):
        raise ValueError(
            f"{where}: jump_relu_threshold: expected a number, got {level!r}. Give it as threshold=NUMBER, or "
            "--threshold NUMBER."
        )
    # The threshold applies to p times the raw decoder norm; decoder norms in the file are scale_out times larger.
    return ActivationFn("threshold", threshold=torch.tensor(level * scale_out), by_norm=True)


def scale_words(scale_in: float, scale_out: float) -> tuple[str, ...]:
    """Return a note on the scales, or none if both are 1."""
    same = scale_in == scale_out == 1.0
    return () if same else (f"inputs times {scale_in:.6g}, outputs divided by {scale_out:.6g}",)
