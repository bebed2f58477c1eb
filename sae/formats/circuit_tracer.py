"""Reader of circuit-tracer's per-layer and cross-layer transcoders with a ``config.yaml``.

The files do not always name the activation function: a threshold means JumpReLU, ``activation: topk`` or a ``k`` means TopK
without a ReLU, neither means ReLU. Source: the code of circuit-tracer 0.5.0, and of its repository for TopK.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gemma_scope
from .base import Read, ReadOptions, SetFormat, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrossLayer, CanonicalSAE
from .circuit_tracer_writing import CONFIG, THRESHOLD, write_across_layers, write_transcoders
from .files import SourceFiles
from .origin import origin, reading_before_norm, with_origin

LAYER_FILE = r"layer_(\d+)\.safetensors"
KINDS = ("transcoder_set", "cross_layer_transcoder")
FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
# Configuration of cross-layer transcoders with a joint top-k over all layers.
JOINT_CONFIG, JOINT_KEYS = "config.json", {"k", "d_feature"}
SHOWN = 3


class CircuitTracer(SetFormat):
    name = "circuit_tracer"
    title = "circuit-tracer"

    def detect(self, source: SourceFiles) -> str | None:
        if source.has(CONFIG):
            config = source.yaml(CONFIG)
            kind = config.get("model_kind") if isinstance(config, dict) else None
            return f"{CONFIG} with model_kind {kind}" if kind is not None else None
        if source.has("W_enc_0.safetensors") and source.has("W_dec_0.safetensors"):
            return "W_enc_0.safetensors and W_dec_0.safetensors"
        if not source.has("layer_0.safetensors"):
            return None
        told = source.remote or {"W_enc", "W_dec"} <= source.headers("layer_0.safetensors").keys()
        return "layer_0.safetensors with W_enc and W_dec" if told else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        config = source.config(CONFIG) if source.has(CONFIG) else {}
        across = source.has("W_enc_0.safetensors")
        kind = config.get("model_kind", KINDS[across])
        if kind not in KINDS:
            raise ValueError(f"{source.path(CONFIG)}: model_kind: expected {' or '.join(KINDS)}, got {kind!r}.")
        return across_layers(source, config, options) if kind == KINDS[1] else transcoder_set(source, config, options)

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        if isinstance(n, CanonicalCrossLayer):
            write_across_layers(n, directory)
        else:
            write_transcoders([n], directory)

    def write_set(self, members: Mapping[str, CanonicalSAE], directory: Path) -> None:
        write_transcoders(list(members.values()), directory)


def transcoder_set(source: SourceFiles, config: dict[str, Any], options: ReadOptions) -> dict[str, CanonicalSAE]:
    """Read one transcoder per layer, keyed by output hook; only one of them if ``options.hook`` is the name of its file.

    Raises:
        ValueError: If layers are missing, or their files are in other repositories.
    """
    files = _layer_files(source, config)
    named = [name for name in files if options.hook in (name, Path(name).stem)]
    found: dict[str, CanonicalSAE] = {}
    for layer, name in enumerate(files):
        if named and name not in named:
            continue
        n = _transcoder(source, name, config, options)
        reads, writes = (joined(config.get(f"feature_{side}_hook"), layer) for side in ("input", "output"))
        model = config.get("model_name")
        n, reads = reading_before_norm(n, reads, options.model or model)
        # options is left out: its hook selects one of the transcoders and must not become the hook of each.
        provenance, warnings = origin(CircuitTracer.name, config, options.model or model, [reads], [writes])
        hook = str(options.hook) if named else (provenance.get("hooks_out") or [writes or f"layer_{layer}"])[0]
        extra = [f"no {CONFIG}: hooks and model are not known"] if not config else []
        found[hook] = with_origin(n, provenance, [*extra, *warnings])
    return found


def _layer_files(source: SourceFiles, config: Mapping[str, Any]) -> list[str]:
    """Return the files of all layers in order."""
    named = config.get("transcoders")
    if named is None:
        files = source.named(LAYER_FILE)
        numbers = [int(re.findall(r"\d+", name)[0]) for name in files]
        if not files or numbers != list(range(len(files))):
            got = ", ".join(map(str, numbers)) or "none"
            raise ValueError(
                f"{source}: expected layer_<i>.safetensors of all layers from 0, got layers {got}. Fetch the rest."
            )
        return files
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{source.path(CONFIG)}: transcoders: expected a list of paths, got {named!r}.")
    elsewhere = [name for name in named if name.startswith("hf://")]
    if elsewhere:
        some = ", ".join(elsewhere[:SHOWN])
        raise ValueError(
            f"{source.path(CONFIG)}: transcoders: {len(elsewhere)} files are in other repositories: {some}"
            f"{', ...' if len(elsewhere) > SHOWN else ''}. Download them (hf download REPOSITORY FILE --local-dir FOLDER) and "
            "list their paths below this folder instead; or load one from its own repository."
        )
    return named


def joined(place: Any, layer: int) -> str | None:
    """Return a block-relative site as a hook of a layer; nnsight locations have a ``{layer}`` placeholder."""
    if not isinstance(place, str):
        return None
    if "{layer}" not in place:
        return f"blocks.{layer}.{place}"
    return gemma_scope.spelt(re.sub(r"\[(\d+)\]", r".\1", place.format(layer=layer)))


def _transcoder(source: SourceFiles, name: str, config: Mapping[str, Any], options: ReadOptions) -> CanonicalSAE:
    """Read one layer's transcoder from a circuit-tracer or Gemma Scope file."""
    where, tensors = source.path(name), dict(source.tensors(name))
    if name.endswith(".npz") or "w_enc" in tensors:
        return gemma_scope._dictionary(where, tensors, "transcoder").noting("W_enc transposed")
    k = tensors.pop("k", None)
    require_keys(where, tensors, FOUR)
    unknown = sorted(set(tensors) - {*FOUR, THRESHOLD, "W_skip"})
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(FOUR)}, got also {', '.join(unknown)}.")
    latents, width = (tensors[key].numel() for key in ("b_enc", "b_dec"))
    sizes = {"W_enc": (latents, None), "W_dec": (latents, width), "b_enc": (latents,), "b_dec": (width,)}
    for key, size in (sizes | {THRESHOLD: (latents,), "W_skip": (width, None)}).items():
        if key in tensors:
            require_shape(where, key, tuple(tensors[key].shape), size)
    return CanonicalSAE(
        kind="transcoder",
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_out=tensors["b_dec"],
        gate=_activation_fn(where, config, tensors.get(THRESHOLD), options.k if k is None or options.k else _whole(where, k)),
        W_skip=tensors.get("W_skip"),
    )


def _whole(where: object, k: Tensor) -> int | float:
    """Return the number in a one-element tensor, as an int if it is whole."""
    require_shape(where, "k", tuple(k.reshape(-1).shape), (1,))
    number = float(k)
    return int(number) if number.is_integer() else number


def _activation_fn(where: object, config: Mapping[str, Any], threshold: Tensor | None, k: Any) -> ActivationFn:
    """Infer the activation function from the threshold, the configuration, and k."""
    named = str(config.get("activation") or "").lower().replace("_", "")
    if named not in ("", "relu", "jumprelu", "topk"):
        raise ValueError(f"{where}: activation: expected topk, jumprelu or relu in {CONFIG}, got {named!r}.")
    ranked = named == "topk" or k is not None
    if (ranked and threshold is not None) or (named == "jumprelu" and threshold is None) or (named == "relu" and ranked):
        raise ValueError(f"{where}: activation {named or 'not named'}, k {k}, and {THRESHOLD} contradict each other.")
    if ranked:
        return ActivationFn("topk_raw", k=config.get("k") if k is None else k)
    return ActivationFn("relu") if threshold is None else ActivationFn("threshold", threshold=not_negative(where, threshold))


def not_negative(where: object, threshold: Tensor) -> Tensor:
    """Raise ``ValueError`` for negative thresholds, with which circuit-tracer's JumpReLU keeps negative values."""
    if bool((threshold < 0).any()):
        raise ValueError(f"{where}: {THRESHOLD}: expected numbers from 0, got {float(threshold.min()):.4g}.")
    return threshold


def across_layers(source: SourceFiles, config: dict[str, Any], options: ReadOptions) -> CanonicalCrossLayer:
    """Read a cross-layer transcoder, whose decoders are stored by source layer.

    Raises:
        ValueError: If layers are missing, layers differ in activation function, or a joint top-k has no threshold.
    """
    joint = source.config(JOINT_CONFIG) if source.has(JOINT_CONFIG) else {}
    joint = joint if joint.keys() >= JOINT_KEYS else {}
    files = source.named(r"W_enc_(\d+)\.safetensors")
    numbers = [int(re.findall(r"\d+", name)[0]) for name in files]
    if not files or numbers != list(range(len(files))):
        got = ", ".join(map(str, numbers)) or "none"
        raise ValueError(f"{source}: expected W_enc_<i>.safetensors of all layers from 0, got layers {got}. Fetch the rest.")
    layers = tuple(layer_of_several(source, i, len(files), joint, options) for i in range(len(files)))
    if len({layer.gate.name for layer in layers}) > 1:
        raise ValueError(f"{source}: expected thresholds in all layers or none, got both.")
    reads, writes = ([joined(config.get(f"feature_{side}_hook"), i) for i in range(len(files))] for side in ("input", "output"))
    provenance, warnings = origin(CircuitTracer.name, config or joint, config.get("model_name"), reads, writes, options)
    words = ("decoders to all layers put side by side", *(("joint topk as a threshold",) if joint else ()))
    return CanonicalCrossLayer(layers, provenance, words, warnings=tuple(warnings))


def layer_of_several(source: SourceFiles, i: int, count: int, joint: Mapping[str, Any], options: ReadOptions) -> CanonicalSAE:
    """Read one layer's encoder, and its decoders to this and later layers."""
    names = [f"{kind}_{i}.safetensors" for kind in ("W_enc", "W_dec")]
    where = source.path(names[0])
    tensors = {**source.tensors(names[0]), **source.tensors(names[1])}
    if any(key.startswith("W_skip") for key in tensors):
        raise ValueError(
            f"{where}: W_skip: expected no skip path, which circuit-tracer does not support across layers, got one."
        )
    W_enc, W_dec, b_enc, b_dec, threshold, norm = (
        tensors.pop(f"{key}_{i}", None) for key in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_dec_norm")
    )
    if joint and W_enc is not None and W_dec is not None:
        # Joint top-k transcoders may lack biases.
        b_enc = torch.zeros(len(W_enc), dtype=W_enc.dtype) if b_enc is None else b_enc
        b_dec = torch.zeros(W_dec.shape[-1], dtype=W_dec.dtype) if b_dec is None else b_dec
    if W_enc is None or W_dec is None or b_enc is None or b_dec is None or tensors:
        wanted = ", ".join(f"{key}_{i}" for key in FOUR)
        got = ", ".join(sorted({**source.tensors(names[0]), **source.tensors(names[1])}))
        raise ValueError(f"{where}: expected {wanted}, got {got}.")
    latents, width = b_enc.numel(), b_dec.numel()
    require_shape(where, f"W_enc_{i}", tuple(W_enc.shape), (latents, None))
    require_shape(where, f"W_dec_{i}, latents by layers by width", tuple(W_dec.shape), (latents, count - i, width))
    for key, tensor, size in (("b_enc", b_enc, latents), ("b_dec", b_dec, width), ("threshold", threshold, latents)):
        if tensor is not None:
            require_shape(where, f"{key}_{i}", tuple(tensor.shape), (size,))
    n = CanonicalSAE(
        kind="transcoder",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec.flatten(1),
        b_out=b_dec,
        gate=_activation_fn(where, {}, threshold, None),
    )
    return replace(n, gate=joint_gate(where, i, norm, joint, options)) if joint else n


def joint_gate(where: object, i: int, norm: Tensor | None, joint: Mapping[str, Any], options: ReadOptions) -> ActivationFn:
    """Return a threshold that replaces the joint top-k over all layers' latents, ranked by pre-activation times decoder norm.

    Raises:
        ValueError: If the caller gives no threshold.
    """
    if options.threshold is None:
        raise ValueError(
            f"{where}: threshold: expected a number, got none. This transcoder keeps {joint['k']} latents per layer and token, "
            "chosen among all layers at once, which is impossible while the model runs layer by layer on the reconstructions. "
            "Measure an equivalent threshold on data, and give it: threshold=NUMBER, or --threshold NUMBER."
        )
    level = torch.tensor(options.threshold)
    if norm is None:
        return ActivationFn("threshold", threshold=level, by_norm=True)
    if norm.ndim != 1 or not bool((norm > 0).all()):
        raise ValueError(f"{where}: W_dec_norm_{i}: expected a number above 0 for each latent, got {tuple(norm.shape)}.")
    return ActivationFn("threshold", threshold=level / norm.float())
