"""Toy models from files: ``config.json`` and ``model.safetensors`` with TransformerLens' names and shapes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .toy import ToyConfig, ToyTransformer, blank

NORMALIZATIONS = {None: "none", "LN": "layer", "RMS": "rms"}
DIRECTIONS = ("causal", "bidirectional")


def load_toy(directory: str | Path) -> ToyTransformer:
    """Load the model of a directory; missing biases and positional embeddings are zero.

    Besides sizes, ``config.json`` has: ``attention_dir`` (causal or bidirectional), ``normalization_type`` (null: none),
    ``attn_coeff`` (``ToyConfig.attention_share``), ``mask_blocked_layer0`` and ``mask_blocked_other`` (1: position ``t`` does
    not attend to ``s``), ``zero_attention_rows_layer0`` (positions that attend to nothing), ``vocab`` with a ``[pad]`` that is
    never attended to.

    Raises:
        ValueError: If a file is missing, or its layout differs.
    """
    values, weights = _read(Path(directory))
    config = _config(values, str(directory))
    model = blank(config)
    unread = model.load_state_dict(_state(weights, config), strict=False).unexpected_keys
    if unread:
        raise ValueError(f"{directory}: expected weights of the sizes in config.json, got also {', '.join(unread)}.")
    _mask(model, values)
    return model


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: expected a directory with config.json and model.safetensors, got none of {name}.")
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if values.get("layout") != "transformer_lens":
        raise ValueError(
            f"{directory}: expected config.json with layout: transformer_lens, got {values.get('layout')!r}. "
            "Models in transformers' own layout are loaded by load_model."
        )
    return values, load_file(directory / "model.safetensors")


def _config(values: dict[str, Any], where: str) -> ToyConfig:
    for key, choices in (("attention_dir", DIRECTIONS), ("normalization_type", NORMALIZATIONS)):
        if values.get(key) not in choices:
            raise ValueError(
                f"{where}: config.json: {key}: expected one of {', '.join(map(str, choices))}, got {values.get(key)!r}."
            )
    sizes = {key: values[key] for key in ("n_layers", "n_heads", "d_model", "d_head", "n_ctx", "d_vocab", "d_vocab_out")}
    vocabulary = values.get("vocab") or []
    return ToyConfig(
        **sizes,
        d_mlp=0 if values["attn_only"] else values["d_mlp"],
        activation=values["act_fn"],
        norm=NORMALIZATIONS[values["normalization_type"]],
        causal=values["attention_dir"] == "causal",
        pad_id=vocabulary.index("[pad]") if "[pad]" in vocabulary else None,
        attention_share=float(values.get("attn_coeff", 1.0)),
    )


def _state(weights: dict[str, Tensor], config: ToyConfig) -> dict[str, Tensor]:
    """Return the weights in native names and layouts: linear maps as (out, in), heads concatenated."""
    state = {"wte.weight": weights["embed.W_E"], "lm_head.weight": weights["unembed.W_U"].T}
    loose = {
        "pos_embed.W_pos": "wpe.weight",
        "unembed.b_U": "lm_head.bias",
        "ln_final.w": "ln_f.weight",
        "ln_final.b": "ln_f.bias",
    }
    for layer in range(config.n_layers):
        theirs, ours = f"blocks.{layer}", f"h.{layer}"
        for kind in "QKV":
            state[f"{ours}.attn.{kind.lower()}_proj.weight"] = weights[f"{theirs}.attn.W_{kind}"].transpose(1, 2).flatten(0, 1)
            if f"{theirs}.attn.b_{kind}" in weights:
                state[f"{ours}.attn.{kind.lower()}_proj.bias"] = weights[f"{theirs}.attn.b_{kind}"].flatten()
        state[f"{ours}.attn.o_proj.weight"] = weights[f"{theirs}.attn.W_O"].flatten(0, 1).T
        if config.d_mlp:
            state[f"{ours}.mlp.up_proj.weight"] = weights[f"{theirs}.mlp.W_in"].T
            state[f"{ours}.mlp.down_proj.weight"] = weights[f"{theirs}.mlp.W_out"].T
        loose |= {f"{theirs}.attn.b_O": f"{ours}.attn.o_proj.bias"}
        loose |= {f"{theirs}.mlp.b_in": f"{ours}.mlp.up_proj.bias", f"{theirs}.mlp.b_out": f"{ours}.mlp.down_proj.bias"}
        for norm in (1, 2):
            loose |= {f"{theirs}.ln{norm}.w": f"{ours}.ln_{norm}.weight", f"{theirs}.ln{norm}.b": f"{ours}.ln_{norm}.bias"}
    return state | {ours: weights[theirs] for theirs, ours in loose.items() if theirs in weights}


def _mask(model: ToyTransformer, values: dict[str, Any]) -> None:
    for layer in range(model.config.n_layers):
        key = "mask_blocked_layer0" if layer == 0 else "mask_blocked_other"
        if key in values:
            model.attention(layer).blocked.copy_(torch.tensor(values[key]).bool())
    model.attention(0).silent[values.get("zero_attention_rows_layer0", [])] = True
