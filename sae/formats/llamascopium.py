"""llamascopium, formerly Language-Model-SAEs: dictionaries of all its kinds, in ``config.json`` and ``sae_weights``.

Also reads Llama Scope R1-Distill, written by the same library under earlier names. ``norm_activation`` says whether weights
are in normalized units. Source: the code of llamascopium 2.0.0b34.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Format, Read, ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrosscoder, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles
from .llama_scope import kind_of, scale_of, scale_words
from .origin import origin, reading_before_norm, with_origin

CONFIG = "config.json"
WEIGHTS = tuple(
    f"{stem}{suffix}"
    for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for suffix in (".safetensors", ".pt")
)
SHARDED = r"(sae_weights|checkpoints/(pruned|final))\.dcp/.*"
LOG_THRESHOLD, NORM = "activation_function.log_jumprelu_threshold", "dataset_average_activation_norm."
# Earlier names -> current names; matrices are transposed between the two.
EARLIER = {
    "encoder.weight": "W_E",
    "encoder.bias": "b_E",
    "decoder.weight": "W_D",
    "decoder.bias": "b_D",
    "log_jumprelu_threshold": LOG_THRESHOLD,
}
# Activation functions that depend on other tokens or layers -> why they need a fixed threshold.
SHARED = {
    "batchtopk": "the active latents of a token depend on the other tokens of its batch",
    "layertopk": "the active latents of a layer depend on later layers",
    "batchlayertopk": "the active latents depend on the other tokens of the batch and on later layers",
}


class Llamascopium(Format):
    name = "llamascopium"
    title = "llamascopium"

    def detect(self, source: SourceFiles) -> str | None:
        weights = [*(name for name in WEIGHTS if source.has(name)), *source.named(SHARDED)]
        if not source.has(CONFIG) or not weights:
            return None
        config = source.json(CONFIG)
        told = isinstance(config, dict) and ("sae_type" in config or {"hook_point_in", "expansion_factor"} <= config.keys())
        return f"{CONFIG} with {'sae_type' if 'sae_type' in config else 'hook_point_in'} and {weights[0]}" if told else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        config = source.config(CONFIG)
        weights = next((name for name in WEIGHTS if source.has(name)), None)
        if weights is None and source.named(SHARDED):
            raise ValueError(
                f"{source}: the weights are sharded (.dcp), which only torch's distributed reader opens, and it unpickles an "
                "index. If you trust it, convert it to one file with the library: "
                "SparseDictionary.from_pretrained(FOLDER).save_checkpoint('sae_weights.safetensors')."
            )
        weights = weights or WEIGHTS[0]
        where, tensors, words = source.path(weights), *renamed(source.tensors(weights))
        kind = config.get("sae_type", "sae")
        if kind == "clt":
            return _cross_layer(where, config, tensors, words, options)
        if kind == "crosscoder":
            return _crosscoder(where, config, tensors, options)
        if kind not in ("sae", "transcoder"):
            raise ValueError(
                f"{where}: sae_type: expected sae, transcoder, clt or crosscoder, got {kind!r}, which is not supported."
            )
        return one(where, config, tensors, words, options)

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError(
            "llamascopium: read-only format. The library also reads --to saelens; for cross-layer ones use --to circuit_tracer."
        )


def renamed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under current names, and notes on what was renamed."""
    if "encoder.weight" not in tensors:
        return dict(tensors), ["W_E transposed"]
    found = {EARLIER.get(key, key): t.T if key.endswith("weight") and t.ndim == 2 else t for key, t in tensors.items()}
    return found, ["encoder, decoder and threshold renamed", "decoder transposed"]


def one(
    where: object, config: Mapping[str, Any], tensors: dict[str, Tensor], words: list[str], options: ReadOptions
) -> CanonicalSAE:
    """Read an SAE, or a transcoder, whose two hooks differ."""
    kind = kind_of(where, config)
    require_keys(where, tensors, ("W_E", "b_E", "W_D"))
    width = tensors["W_D"].shape[-1] if tensors["W_D"].ndim else 0
    tensors = with_bias(config, tensors, "b_D", width)
    _require_known(where, tensors, ("W_E", "b_E", "W_D", "b_D", LOG_THRESHOLD))
    latents = tensors["b_E"].shape[0] if tensors["b_E"].ndim else 0
    require_shape(where, "W_E, its latents last", tuple(tensors["W_E"].shape), (config.get("d_model"), latents))
    require_shape(where, "W_D, its latents first", tuple(tensors["W_D"].shape), (latents, config.get("d_model")))
    hooks = [config["hook_point_in"], config["hook_point_out"]]
    n = CanonicalSAE(
        kind=kind,
        W_enc=tensors["W_E"].T,
        b_enc=tensors["b_E"],
        W_dec=tensors["W_D"],
        b_out=tensors["b_D"],
        gate=_activation_fn(where, config, tensors.get(LOG_THRESHOLD), options),
    )
    n, doubts = _normalised(where, config, tensors, n, hooks)
    model = config.get("model_name")
    n, reads = reading_before_norm(n, hooks[0], options.model or model)
    provenance, warnings = origin(Llamascopium.name, config, model, [reads], [hooks[1]], options)
    return with_origin(n, provenance, [*doubts, *warnings], *words)


def _cross_layer(
    where: object, config: Mapping[str, Any], tensors: dict[str, Tensor], words: list[str], options: ReadOptions
) -> CanonicalCrossLayer:
    """Read a cross-layer transcoder, whose decoders are stored by target layer.

    Raises:
        ValueError: If a layer's tensors are missing or have inconsistent shapes.
    """
    require_keys(where, config, ("hook_points_in", "hook_points_out"))
    reads, writes = config["hook_points_in"], config["hook_points_out"]
    if not isinstance(reads, list) or not isinstance(writes, list) or len(reads) != len(writes) or not reads:
        raise ValueError(f"{where}: hook_points_in and _out: expected a hook for each layer, got {reads!r} and {writes!r}.")
    count = len(reads)
    require_keys(where, tensors, ("W_E", "b_E", *(f"W_D.{t}" for t in range(count))))
    require_shape(where, "W_E, layers by width by latents", tuple(tensors["W_E"].shape), (count, config.get("d_model"), None))
    width, latents = tensors["W_E"].shape[1:]
    for t in range(count):
        tensors = with_bias(config, tensors, f"b_D.{t}", width)
        # Source layers by latents by width.
        require_shape(where, f"W_D.{t}", tuple(tensors[f"W_D.{t}"].shape), (t + 1, latents, width))
        require_shape(where, f"b_D.{t}", tuple(tensors[f"b_D.{t}"].shape), (width,))
    require_shape(where, "b_E", tuple(tensors["b_E"].shape), (count, latents))
    names = [f"{kind}_D.{t}" for kind in "Wb" for t in range(count)]
    _require_known(where, tensors, ("W_E", "b_E", LOG_THRESHOLD, *names))
    logs = tensors.get(LOG_THRESHOLD)
    if logs is not None:
        require_shape(where, LOG_THRESHOLD, tuple(logs.shape), (count, latents))
    layers, doubts = [], []
    for s in range(count):
        n = CanonicalSAE(
            kind="transcoder",
            W_enc=tensors["W_E"][s].T,
            b_enc=tensors["b_E"][s],
            W_dec=torch.cat([tensors[f"W_D.{t}"][s] for t in range(s, count)], dim=1),
            b_out=tensors[f"b_D.{s}"],
            gate=_activation_fn(where, config, None if logs is None else logs[s], options),
        )
        n, found = _normalised(where, config, tensors, n, [reads[s], writes[s]])
        layers.append(n)
        doubts += found
    provenance, warnings = origin(Llamascopium.name, config, config.get("model_name"), reads, writes, options)
    done = [*words, "decoders regrouped by the layer they read", *(word for layer in layers for word in layer.done)]
    return CanonicalCrossLayer(
        tuple(layers), provenance, tuple(dict.fromkeys(done)), warnings=(*dict.fromkeys(doubts), *warnings)
    )


def _crosscoder(
    where: object, config: Mapping[str, Any], tensors: dict[str, Tensor], options: ReadOptions
) -> CanonicalCrosscoder:
    """Read a crosscoder: matrices by site, pre-activations summed over sites.

    The library gates a latent at every site by its value times its norm there. That is one code for all sites only if the gate
    is relu, or a latent's norms are equal at all sites.

    Raises:
        ValueError: If a tensor is missing or has another shape, or the gates of a latent differ by site.
    """
    hooks = config.get("hook_points")
    if not isinstance(hooks, list) or len(hooks) < 2:
        raise ValueError(f"{where}: hook_points: expected a list of two or more hooks, got {hooks!r}.")
    names, count = ("W_E", "b_E", "W_D", "b_D"), len(hooks)
    require_keys(where, tensors, names)
    _require_known(where, tensors, (*names, LOG_THRESHOLD))
    width = tensors["b_D"].shape[-1] if tensors["b_D"].ndim else 0
    latents = tensors["b_E"].shape[-1] if tensors["b_E"].ndim else 0
    sizes = {"W_E": (count, width, latents), "b_E": (count, latents), "W_D": (count, latents, width), "b_D": (count, width)}
    for name, size in sizes.items():
        require_shape(where, f"{name}, sites first", tuple(tensors[name].shape), size)
    gate, norms = _activation_fn(where, config, tensors.get(LOG_THRESHOLD), options), tensors["W_D"].float().norm(dim=-1)
    if gate.name == "relu":
        gate = ActivationFn("relu")
    elif not torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-4):
        raise ValueError(
            f"{where}: act_fn: {config.get('act_fn')} gates a latent at each site by its value times its norm there, and "
            "the norms differ: its code is not one code of all sites. Only crosscoders with relu, or with equal norms, load."
        )
    elif gate.threshold is not None:
        # Of one site: norms over all sites together are larger.
        gate = ActivationFn("threshold", threshold=gate.threshold / norms[0].clamp_min(torch.finfo(torch.float32).tiny))
    how, doubts, scales = config.get("norm_activation", "dataset-wise"), [], [1.0] * count
    if how == "dataset-wise":
        scales = [scale_of(where, hook, mean_norm(where, config, tensors, hook, "in"), width) for hook in hooks]
    elif how == "inference":
        doubts.append("norms are folded already, which the library does exactly only where they are equal at all sites")
    else:
        raise ValueError(f"{where}: norm_activation: expected dataset-wise or inference for a crosscoder, got {how!r}.")
    whole = CanonicalSAE(
        kind="sae",
        W_enc=tensors["W_E"].flatten(0, 1).T,
        b_enc=tensors["b_E"].sum(0),
        W_dec=torch.cat(list(tensors["W_D"]), dim=1),
        b_out=tensors["b_D"].flatten(),
        gate=gate,
    )
    provenance, warnings = origin(Llamascopium.name, config, config.get("model_name"), hooks, hooks, options)
    words = ("W_E transposed", "matrices of the sites joined", "encoder biases of the sites summed")
    return CanonicalCrosscoder(whole, (width,) * count, tuple(scales), provenance, words, warnings=(*doubts, *warnings))


def with_bias(config: Mapping[str, Any], tensors: dict[str, Tensor], name: str, width: int) -> dict[str, Tensor]:
    """Add a zero output bias if the configuration disables the bias."""
    if config.get("use_decoder_bias", True) is not False or name in tensors:
        return tensors
    return tensors | {name: torch.zeros(width, dtype=tensors["b_E"].dtype)}


def _require_known(where: object, tensors: Mapping[str, Tensor], known: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if there are unknown tensors, or required ones are missing."""
    unknown = sorted(key for key in tensors if key not in known and not key.startswith(NORM))
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(known)}, got also {', '.join(unknown)}.")
    require_keys(where, tensors, tuple(name for name in known if name != LOG_THRESHOLD))


def _activation_fn(where: object, config: Mapping[str, Any], logs: Tensor | None, options: ReadOptions) -> ActivationFn:
    """Return the activation function, in the units of the weights; selection across tokens or layers needs a threshold."""
    name, by_norm = str(config.get("act_fn", "relu")).lower(), config.get("sparsity_include_decoder_norm", True)
    if name == "relu":
        return ActivationFn("relu")
    if name == "topk":
        return ActivationFn("topk", k=config.get("top_k") if options.k is None else options.k, by_norm=by_norm)
    if name == "jumprelu":
        if logs is None:
            raise ValueError(f"{where}: {LOG_THRESHOLD}: required with act_fn jumprelu, found none.")
        return ActivationFn(
            "threshold", threshold=logs.to(torch.promote_types(logs.dtype, torch.float32)).exp(), by_norm=by_norm
        )
    if name in SHARED:
        if options.threshold is None:
            raise ValueError(
                f"{where}: act_fn: {name} needs a threshold for inference, because {SHARED[name]}. Measure one on data, and "
                "give it: threshold=NUMBER, or --threshold NUMBER."
            )
        return ActivationFn("threshold", threshold=torch.tensor(options.threshold), by_norm=by_norm)
    raise ValueError(f"{where}: act_fn: expected relu, topk, jumprelu, {', '.join(SHARED)}, got {name!r}.")


def _normalised(
    where: object, config: Mapping[str, Any], tensors: Mapping[str, Tensor], n: CanonicalSAE, hooks: list[str]
) -> tuple[CanonicalSAE, list[str]]:
    """Return a copy with the scales or row norm named by ``norm_activation``, and warnings."""
    how = config.get("norm_activation", "dataset-wise")
    if how == "inference":
        doubtful = n.gate.name == "threshold" and config.get("act_fn") == "jumprelu"
        doubt = (
            "norms are folded already; the library folds thresholds of some kinds only, so compare l0 with what was published"
        )
        return n, [doubt] if doubtful else []
    if how == "token-wise" and n.kind == "sae":
        return n.noting("norm_activation token-wise is row_norm constant_norm", row_norm="constant_norm"), []
    if how != "dataset-wise":
        raise ValueError(
            f"{where}: norm_activation: expected dataset-wise, inference or, for an SAE, token-wise, got {how!r}, which "
            "scales by norms that inference does not know. It cannot be loaded."
        )
    width = n.b_out.shape[0] if n.b_out.ndim else 0
    norms = (mean_norm(where, config, tensors, hook, side) for hook, side in zip(hooks, ("in", "out"), strict=True))
    scale_in, scale_out = (scale_of(where, hook, norm, width) for hook, norm in zip(hooks, norms, strict=True))
    return n.noting(*scale_words(scale_in, scale_out), scale_in=scale_in, scale_out=scale_out), []


def mean_norm(where: object, config: Mapping[str, Any], tensors: Mapping[str, Tensor], hook: str, side: str) -> float | None:
    """Return the mean norm of a hook's activations: a tensor in current files, a configuration field in earlier ones."""
    if f"{NORM}{hook}" in tensors:
        found = tensors[f"{NORM}{hook}"]
        require_shape(where, f"{NORM}{hook}", tuple(found.shape), ())
        return float(found)
    means = config.get(NORM.removesuffix("."))
    return means.get(hook, means.get(side)) if isinstance(means, Mapping) else None
