"""Writer of circuit-tracer's per-layer and cross-layer transcoders.

circuit-tracer has no scales, no input biases, and only two activation functions, ReLU and JumpReLU. Anything else is folded,
or refused with the reason.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..extras import needs
from ..files import write_tensors, write_text
from .canonical import CanonicalCrossLayer, CanonicalSAE
from .folding import fold_all, fold_b_in, fold_layers, fold_norms
from .hooks import behind_norm, layer_of, to_transformer_lens
from .origin import exported_model

CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"
RANKED = (
    "version 0.5.0 reads it as relu, with many times as many latents. Write thresholds that as many exceed: convert with "
    "--calibrate TOKENS, or thresholds={hook: number}"
)
REFUSED = {
    "gated": "it has no gate with separate weights, and no threshold is equivalent",
    "pursuit": "it encodes by one matrix product, a pursuit by several steps",
    "group_max": "there is no equivalent. Use --to sparsify",
    "abs_topk": "its topk ranks by value, not by absolute value. Keep sparsary's format",
    "topk": RANKED,
    "topk_raw": RANKED,
}


def write_transcoders(members: Sequence[CanonicalSAE], directory: Path) -> None:
    """Write a set of transcoders, one for each layer from 0.

    Raises:
        ValueError: If layers are missing, hooks differ between layers, or circuit-tracer cannot represent a transcoder.
    """
    layers = in_order(members)
    prepared = [_transcoder(n, i) for i, n in enumerate(layers)]
    config = configuration(layers, "transcoder_set")
    if len({n.gate.name for n in prepared}) > 1 or len({n.n_latents for n in prepared}) > 1:
        raise ValueError("circuit_tracer: expected the same gate and number of latents in every layer, got different ones.")
    directory.mkdir(parents=True, exist_ok=True)
    for i, n in enumerate(prepared):
        write_tensors(directory / f"layer_{i}.safetensors", tensors_of(n), {})
    write_yaml(directory / CONFIG, config)


def write_across_layers(n: CanonicalCrossLayer, directory: Path) -> None:
    """Write a cross-layer transcoder.

    Raises:
        ValueError: If circuit-tracer cannot represent it.
    """
    for layer in n.layers:
        if layer.gate.name not in ("relu", "threshold"):
            raise ValueError(
                f"circuit_tracer: expected relu or jumprelu in a cross-layer transcoder, got {layer.gate.name}, which no "
                "threshold can replace. Train with jumprelu, or with joint: true, which uses a threshold in eval mode."
            )
        if layer.W_skip is not None or layer.row_norm is not None:
            raise ValueError("circuit_tracer: expected a cross-layer transcoder without skip path and row_norm, got one with.")
        require_square(layer, layer.b_out.shape[0])
    hooks = zip(*(n.provenance.get(key) or [None] * len(n.layers) for key in ("hooks_in", "hooks_out")), strict=True)
    about = [{**n.provenance, "hooks_in": [reads], "hooks_out": [writes]} for reads, writes in hooks]
    if len(about) != len(n.layers):
        raise ValueError(f"circuit_tracer: expected the hooks of {len(n.layers)} layers, got {len(about)}.")
    placed = [replace(layer, provenance=own) for layer, own in zip(n.layers, about, strict=True)]
    config = configuration(in_order(placed), "cross_layer_transcoder")
    directory.mkdir(parents=True, exist_ok=True)
    for i, layer in enumerate(fold_layers(n).layers):
        assert layer.W_enc is not None
        assert layer.b_enc is not None
        encoder = {f"W_enc_{i}": layer.W_enc, f"b_enc_{i}": layer.b_enc, f"b_dec_{i}": layer.b_out}
        encoder |= {} if layer.gate.threshold is None else {f"threshold_{i}": full(layer)}
        decoder = {f"W_dec_{i}": layer.W_dec.unflatten(1, (len(n.layers) - i, -1))}
        write_tensors(directory / f"W_enc_{i}.safetensors", encoder, {})
        write_tensors(directory / f"W_dec_{i}.safetensors", decoder, {})
    write_yaml(directory / CONFIG, config)


def in_order(members: Sequence[CanonicalSAE]) -> list[CanonicalSAE]:
    """Return the members of a set, sorted by layer.

    Raises:
        ValueError: If a layer is unknown, duplicated, or missing.
    """
    numbers = [layer_of((n.provenance.get("hooks_out") or [None])[0]) for n in members]
    if sorted(numbers, key=str) != sorted(range(len(members)), key=str):
        raise ValueError(
            f"circuit_tracer: expected a transcoder for each layer from 0, got layers {', '.join(map(str, numbers))}. "
            "Attribution graphs need every layer: train a grid over layers."
        )
    return [n for _, n in sorted(zip(numbers, members, strict=True), key=lambda pair: pair[0] or 0)]


def _transcoder(n: CanonicalSAE, layer: int) -> CanonicalSAE:
    """Return an equivalent form that circuit-tracer supports, with everything folded into the weights."""
    if n.kind != "transcoder":
        raise ValueError(f"circuit_tracer: expected transcoders, got an autoencoder at layer {layer}. Use --to saelens.")
    if n.gate.name in REFUSED:
        raise ValueError(f"circuit_tracer: cannot represent {n.gate.name}: {REFUSED[n.gate.name]}.")
    require_square(n, n.d_out)
    if n.row_norm is not None:
        if n.row_norm != "constant_norm" or _places(n)[0] is None or n.scaled or n.W_skip is not None:
            raise ValueError(
                f"circuit_tracer: row_norm: expected null, or the model's own norm in front of the hook, got {n.row_norm}."
            )
        # The written hook is then the normalized activations, so the encoder needs no norm.
        n = replace(n, row_norm=None)
    n = fold_all(n)
    return fold_b_in(fold_norms(n) if n.gate.by_norm else n)


def require_square(n: CanonicalSAE, d_out: int) -> None:
    """Raise ``ValueError`` unless input and output widths are equal, as circuit-tracer requires."""
    if n.d_in != d_out:
        raise ValueError(f"circuit_tracer: expected d_out = d_in = {n.d_in}, as the format has one width, got d_out = {d_out}.")


def tensors_of(n: CanonicalSAE) -> dict[str, Tensor]:
    """Return one layer's tensors under circuit-tracer's names."""
    assert n.W_enc is not None
    assert n.b_enc is not None
    found = {"W_enc": n.W_enc, "b_enc": n.b_enc, "W_dec": n.W_dec, "b_dec": n.b_out}
    found |= {} if n.W_skip is None else {"W_skip": n.W_skip}
    return found | ({} if n.gate.threshold is None else {THRESHOLD: full(n)})


def full(n: CanonicalSAE) -> Tensor:
    """Return per-latent thresholds, clamped at 0: with a negative one, circuit-tracer would keep negative values."""
    assert n.gate.threshold is not None
    return n.gate.threshold.reshape(-1).expand(n.n_latents).clamp_min(0)


def configuration(layers: Sequence[CanonicalSAE], kind: str) -> dict[str, Any]:
    """Return the content of ``config.yaml``; ``scan`` is kept from an original circuit-tracer configuration.

    Raises:
        ValueError: If hooks are unknown, or differ in site between layers.
    """
    found = {_places(n) for n in layers}
    reads, writes = next(iter(found))
    if len(found) > 1 or reads is None or writes is None:
        raise ValueError(
            "circuit_tracer: expected the same hooks in every layer, with names in TransformerLens, "
            f"got {'; '.join(' -> '.join(map(str, pair)) for pair in sorted(found, key=str))}."
        )
    first = layers[0].provenance
    source = first.get("source") or {}
    kept = source.get("config", {}) if source.get("format") == "circuit_tracer" else {}
    model = exported_model((first.get("model") or {}).get("id"))
    config: dict[str, Any] = {"model_name": model, "model_kind": kind}
    config |= {"feature_input_hook": reads, "feature_output_hook": writes, "scan": kept.get("scan") or "sparsary"}
    return {key: value for key, value in config.items() if value is not None}


def _places(n: CanonicalSAE) -> tuple[str | None, str | None]:
    """Return the TransformerLens names, within the block, of the input and output hooks."""
    model = (n.provenance.get("model") or {}).get("id")
    found = []
    for key in ("hooks_in", "hooks_out"):
        hook = (n.provenance.get(key) or [None])[0] or ""
        normed = n.row_norm is not None and key == "hooks_in"
        name = behind_norm(hook, model) if normed else to_transformer_lens(hook, model)
        found.append(None if name is None else re.sub(r"^blocks\.\d+\.", "", name))
    return found[0], found[1]


def write_yaml(path: Path, config: dict[str, Any]) -> None:
    # Imported lazily: the other formats must work without the package.
    with needs(str(path)):
        from ruamel.yaml import YAML

    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(config, text)
    write_text(path, text.getvalue())
