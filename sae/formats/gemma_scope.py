"""Gemma Scope: ``params.npz`` of the first release; ``params.safetensors``, or one file per layer, of the second.

JumpReLU dictionaries without input bias or normalization. Model and hooks are given only by the path in the first release, and
by ``config.json``, which some folders lack, in the second. Sources: Lieberum et al. 2024, arXiv:2408.05147, and the
repositories' own descriptions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Format, Read, ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrosscoder, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles
from .origin import origin, reading_before_norm, with_origin

NPZ, SAFETENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"
KEYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
AFFINE = "affine_skip_connection"
# A file of a cross-layer transcoder, with its source layer.
LAYER_FILE = r"[^/]*layer_(\d+)[^/]*\.safetensors"
# Set -> its input and output hooks. Labels such as 16k are not needed: the number of latents comes from the tensors.
SITES_1 = {
    "res": ("hook_resid_post", "hook_resid_post"),
    "mlp": ("hook_mlp_out", "hook_mlp_out"),
    "att": ("attn.hook_z", "attn.hook_z"),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
# Transcoders of the second release read the norm's output after its gain, those of the first release before it.
SITES_2 = {
    "resid_post": (":out", ":out"),
    "attn_out": ("self_attn.o_proj:in", "self_attn.o_proj:in"),
    "mlp_out": ("post_feedforward_layernorm:out", "post_feedforward_layernorm:out"),
    "transcoder": ("pre_feedforward_layernorm:out", "post_feedforward_layernorm:out"),
    "clt": ("pre_feedforward_layernorm:out", "post_feedforward_layernorm:out"),
    "crosscoder": (":out", ":out"),
}
# Layers of a crosscoder in the name of its folder.
CROSSCODER = re.compile(r"layer_(\d+(?:_\d+)+)_width_")
BOS = "its first token was excluded from training: leave position 0 out of any measure"


class GemmaScope(Format):
    name = "gemma_scope"
    title = "Gemma Scope"

    def detect(self, source: SourceFiles) -> str | None:
        archive = npz_of(source)
        if archive is not None:
            keys = () if source.remote else {key.lower() for key in source.headers(archive)}
            return f"{archive} with W_enc and threshold" if source.remote or set(KEYS) <= set(keys) else None
        if source.has(SAFETENSORS):
            return f"{SAFETENSORS} with w_enc" if source.remote or "w_enc" in source.headers(SAFETENSORS) else None
        files = _layer_files(source)
        if not files or source.has("config.yaml") or (files[0].startswith("layer_") and source.remote):
            return None
        keys = {"w_enc": None} if source.remote else source.headers(files[0])
        return f"{files[0]} and {len(files) - 1} like it, with w_enc" if "w_enc" in keys else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        archive = npz_of(source)
        if archive is not None:
            return first_release(source, archive, options)
        config = source.config(CONFIG) if source.has(CONFIG) else {}
        architecture = config.get("architecture", "jump_relu")
        if architecture != "jump_relu":
            raise ValueError(f"{source.path(CONFIG)}: architecture: expected jump_relu, got {architecture!r}.")
        single = source.named(r"[^/]*params[^/]*\.safetensors") if not _layer_files(source) else []
        if source.has(SAFETENSORS) or single:
            return second_release(source, SAFETENSORS if source.has(SAFETENSORS) else single[0], config, options)
        return _cross_layer(source, config, options)

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError("gemma_scope: read-only format, the layout of two releases. Use --to saelens or circuit_tracer.")


def npz_of(source: SourceFiles) -> str | None:
    """Return the archive's name: ``params.npz``, or the only file if it is an npz archive."""
    if source.has(NPZ):
        return NPZ
    return source.files[0] if len(source.files) == 1 and source.files[0].endswith(".npz") else None


def _layer_files(source: SourceFiles) -> list[str]:
    """Return the files of a cross-layer transcoder in layer order."""
    return sorted(source.named(LAYER_FILE), key=lambda name: int(re.findall(r"layer_(\d+)", name)[-1]))


def _dictionary(where: object, tensors: Mapping[str, Tensor], kind: str) -> CanonicalSAE:
    """Build a dictionary from the tensors of either release; names are case-insensitive, since archives differ.

    Raises:
        ValueError: If a tensor is missing, unknown, or has an inconsistent shape.
    """
    found = {key.lower(): tensor for key, tensor in tensors.items()}
    require_keys(where, found, KEYS)
    unknown = sorted(set(found) - {*KEYS, AFFINE})
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(KEYS)}, got also {', '.join(unknown)}.")
    latents = found["b_enc"].shape[0] if found["b_enc"].ndim else 0
    require_shape(where, "W_enc, its latents last", tuple(found["w_enc"].shape), (None, latents))
    require_shape(where, "threshold", tuple(found["threshold"].shape), (latents,))
    d_in, d_out = found["w_enc"].shape[0], found["b_dec"].shape[-1] if found["b_dec"].ndim else 0
    targets = (None,) * (found["w_dec"].ndim - 2)
    require_shape(where, "W_dec, its latents first", tuple(found["w_dec"].shape), (latents, *targets, d_out))
    skip = found.get(AFFINE)
    if skip is not None:
        require_shape(where, AFFINE, tuple(skip.shape), (d_in, d_out))
    return CanonicalSAE(
        kind=kind,
        W_enc=found["w_enc"].T,
        b_enc=found["b_enc"],
        W_dec=found["w_dec"],
        b_out=found["b_dec"],
        gate=ActivationFn("threshold", threshold=found["threshold"]),
        # Stored for x A; W_skip is applied as W x.
        W_skip=None if skip is None else skip.T,
    )


def first_release(source: SourceFiles, archive: str, options: ReadOptions) -> CanonicalSAE:
    """Read ``params.npz``."""
    path = str(source.path(archive).absolute() if not source.remote else f"{source}/{archive}")
    site, layer, model, embedding = placed(path)
    model = options.model or model
    n = _dictionary(source.path(archive), source.tensors(archive), "transcoder" if site == "transcoders" else "sae")
    reads, writes = (None, None) if site is None else SITES_1[site]
    reads, writes = (f"blocks.{layer}.{hook}" if hook and layer is not None else None for hook in (reads, writes))
    words = ["W_enc transposed"]
    if embedding:
        # The embedding module's output, before the model multiplies it by sqrt(d).
        reads = writes = "model.embed_tokens:out"
        words.append("trained on embeddings as model.embed_tokens gives them, without the model's factor sqrt(d)")
    n, reads = reading_before_norm(n, reads, model)
    provenance, warnings = origin(GemmaScope.name, {}, model, [reads], [writes], options)
    return with_origin(n, provenance, [*warnings, BOS], *words)


def placed(path: str) -> tuple[str | None, int | None, str | None, bool]:
    """Parse set, layer, model, and whether the SAE is trained on embeddings from a path of the first release."""
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", path)
    parts = re.split(r"[/\\]", path)
    site = repository.group(3) if repository else next((part for part in reversed(parts) if part in SITES_1), None)
    model = None
    if repository:
        model = f"google/gemma-2-{repository.group(1)}{'-it' if repository.group(2) == 'it' else ''}"
    layer = next((int(found.group(1)) for part in reversed(parts) if (found := re.fullmatch(r"layer_(\d+)", part))), None)
    return site, layer, model, "embedding" in parts


def second_release(source: SourceFiles, name: str, config: dict[str, Any], options: ReadOptions) -> CanonicalSAE:
    """Read ``params.safetensors``."""
    where = source.path(name)
    path = f"{source}/{name}" if source.remote else str(where.absolute())
    reads, writes, model = _hooks(config, path)
    n = _dictionary(where, source.tensors(name), "transcoder")
    if n.W_dec.ndim == 3:
        raise ValueError(
            f"{where}: expected a transcoder of one layer, got one layer of a cross-layer transcoder of {n.W_dec.shape[1]}. "
            "Load the folder that has a file for each layer."
        )
    if reads == writes and n.W_skip is None and n.d_in == n.d_out:
        n = replace(n, kind="sae")
    doubt = [] if config else [f"no {CONFIG}: hooks are those of the path"]
    provenance, warnings = origin(GemmaScope.name, config, options.model or model, [reads], [writes], options)
    return with_origin(n, provenance, [*doubt, *warnings, BOS], "W_enc transposed")


def _hooks(config: Mapping[str, Any], path: str, layer: int | None = None) -> tuple[str | None, str | None, str | None]:
    """Return input hook, output hook, and model from the configuration or, if it lacks them, from the path."""
    named = config.get("model_name") or next(iter(re.findall(r"gemma-3-\d+m?b?-(?:pt|it)|gemma-3-270m", path)), None)
    sizes = re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)", path)
    if named is None and sizes:
        named = f"gemma-3-{sizes.group(1)}-{sizes.group(2)}"
    # The smallest base model has no suffix on the Hub.
    model = None if named is None else str(named).replace("-v3", "-3").replace("gemma-3-270m-pt", "gemma-3-270m")
    model = model if model is None or "/" in model else f"google/{model}"
    given = [spelt(config.get(key)) for key in ("hf_hook_point_in", "hf_hook_point_out")]
    if layer is None and all(given):
        return given[0], given[1], model
    parts = re.split(r"[/\\]", path)
    site = next((name for part in parts for name in SITES_2 if part == name or part.startswith(f"{name}_")), None)
    found = re.search(r"layer_(\d+)", path)
    layer = int(found.group(1)) if layer is None and found else layer
    if site is None or layer is None:
        return given[0], given[1], model
    reads, writes = (f"model.layers.{layer}{'' if place.startswith(':') else '.'}{place}" for place in SITES_2[site])
    return reads, writes, model


def spelt(hook: Any) -> str | None:
    """Convert ``model.layers.3.mlp.output`` to a module path with a side; a path without a side means the output."""
    if not isinstance(hook, str) or not hook:
        return None
    for theirs, ours in ((".output", ":out"), (".input", ":in")):
        if hook.endswith(theirs):
            return hook.removesuffix(theirs) + ours
    return hook if ":" in hook else f"{hook}:out"


def _not_causal(layers: Sequence[CanonicalSAE], provenance: dict[str, Any], warnings: tuple[str, ...]) -> CanonicalCrosscoder:
    """Return a crosscoder of all sites from its latents by the site they read; decoders are latents by sites by width."""
    assert all(n.W_enc is not None and n.b_enc is not None and n.gate.threshold is not None for n in layers)
    width = layers[0].b_out.shape[0]
    whole = CanonicalSAE(
        kind="sae",
        W_enc=torch.block_diag(*(n.W_enc for n in layers)),  # pyright: ignore[reportArgumentType]
        b_enc=torch.cat([n.b_enc for n in layers]),  # pyright: ignore[reportArgumentType, reportCallIssue]
        W_dec=torch.cat([n.W_dec.flatten(1) for n in layers]),
        b_out=torch.cat([n.b_out for n in layers]),
        gate=ActivationFn("threshold", threshold=torch.cat([n.gate.threshold for n in layers])),  # pyright: ignore
    )
    words = ("W_enc transposed", f"{len(layers)} files joined")
    sizes = (width,) * len(layers), (1.0,) * len(layers)
    return CanonicalCrosscoder(whole, *sizes, provenance, words, warnings=warnings)


def _cross_layer(
    source: SourceFiles, config: dict[str, Any], options: ReadOptions
) -> CanonicalCrossLayer | CanonicalCrosscoder:
    """Read a cross-layer transcoder from one file per source layer; decoders to earlier layers are padding and dropped.

    A weakly causal crosscoder is one whose layers read and write the residual stream: each latent reads one layer, and writes
    to that and later ones. If it also writes to earlier layers, it is a crosscoder whose encoder is zero at all sites but one.

    Raises:
        ValueError: If layers are missing.
    """
    files = _layer_files(source)
    numbers = [int(re.findall(r"layer_(\d+)", name)[-1]) for name in files]
    if not files or numbers != list(range(len(files))):
        raise ValueError(
            f"{source}: expected one file for each layer from 0, got layers {', '.join(map(str, numbers)) or 'none'}. "
            "Download the missing files, or move each set of files to a folder of its own."
        )
    sites = CROSSCODER.findall(f"{source}/")
    if sites and len(sites[-1].split("_")) != len(files):
        raise ValueError(f"{source}: expected a file for each of the layers {sites[-1].replace('_', ', ')}, got {len(files)}.")
    layers, dropped, whole = [], 0, []
    for i, name in enumerate(files):
        where = source.path(name)
        n = _dictionary(where, source.tensors(name), "transcoder")
        require_shape(where, "W_dec, latents by layers by width", tuple(n.W_dec.shape), (None, len(files), n.b_out.shape[0]))
        dropped += bool(n.W_dec[:, :i].any())
        whole.append(n)
        layers.append(replace(n, W_dec=n.W_dec[:, i:].flatten(1)))
    numbers = [int(layer) for layer in sites[-1].split("_")] if sites else numbers
    places = [_hooks(config, f"{source}/{name}", layer) for layer, name in zip(numbers, files, strict=True)]
    reads, writes = [place[0] for place in places], [place[1] for place in places]
    provenance, warnings = origin(GemmaScope.name, config, options.model or places[0][2], reads, writes, options)
    if dropped and sites:
        doubt = f"latents of {dropped} layers also write to earlier layers: not weakly causal"
        return _not_causal(whole, provenance, (*warnings, doubt, BOS))
    if dropped:
        warnings.append(f"decoders of {dropped} layers to layers before their own are not zero: padding, left out")
    words = ("W_enc transposed", "decoders to layers before the source left out", f"{len(files)} files joined")
    return CanonicalCrossLayer(tuple(layers), provenance, words, warnings=(*warnings, BOS))
