"""SAELens 6: ``cfg.json`` and ``sae_weights.safetensors``, including checkpoints saved mid-training.

Encoders are stored transposed, as ``(d_in, d_sae)``, and read as a view. Source: the code of SAELens 6.54.12.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json, write_tensors
from .base import Format, Read, ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles
from .folding import EQUAL, equal_norms, fold_all, fold_b_in, fold_norms, fold_whitening
from .hooks import hub_model, layer_of, to_module, to_transformer_lens
from .origin import exported_model, model_of
from .processed_models import CENTRE, CENTRED, KWARGS, of_published_model

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Files next to a mid-training checkpoint: the only record of the input scale or whitening.
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
# SAELens version whose layout is written.
VERSION = "6.54.12"

FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
# Architecture -> its tensors.
AUTOENCODERS = {
    "standard": FOUR,
    "topk": FOUR,
    "abstopk": FOUR,
    "jumprelu": (*FOUR, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    "matching_pursuit": ("W_dec", "b_dec"),
    # Found in training checkpoints only; SAELens exports them as jumprelu.
    "batchtopk": (*FOUR, "topk_threshold"),
    "matryoshka_batchtopk": (*FOUR, "topk_threshold"),
}
TRANSCODERS = {
    "transcoder": FOUR,
    "skip_transcoder": (*FOUR, "W_skip"),
    "jumprelu_transcoder": (*FOUR, "threshold"),
    "jumprelu_skip_transcoder": (*FOUR, "threshold", "W_skip"),
}
ROW_NORMS = {"constant_norm_rescale": "constant_norm", "layer_norm": "layer_norm"}
SCALED, WHITENED = "expected_average_only_in", "covariance_whitening"


class SAELens(Format):
    name = "saelens"
    title = "SAELens 6"

    def detect(self, source: SourceFiles) -> str | None:
        if not source.has(CONFIG):
            return None
        cfg = source.json(CONFIG)
        if not isinstance(cfg, dict) or not {"architecture", "d_in", "d_sae"} <= cfg.keys() or is_legacy(cfg):
            return None
        return f"{CONFIG} with architecture {cfg['architecture']!r} and SAELens {version(cfg)}"

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        cfg = source.config(CONFIG)
        where = source.path(WEIGHTS)
        if not isinstance(cfg.get("metadata") or {}, dict):
            raise ValueError(f"{source.path(CONFIG)}: metadata: expected a mapping, got {cfg['metadata']!r}.")
        n = saelens_dictionary(where, cfg, source.tensors(WEIGHTS), options)
        n = normalise_weights(source, cfg, n, options)
        return with_metadata(n.noting("W_enc transposed"), cfg, saelens_provenance(cfg, options), options)

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        if isinstance(n, CanonicalCrossLayer):
            raise ValueError("saelens: the format has no cross-layer transcoders. Use --to circuit_tracer.")
        cfg, tensors = _written(n)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / WEIGHTS, tensors, {})
        write_json(directory / CONFIG, cfg)


def version(cfg: Mapping[str, Any]) -> str | None:
    """Return the version of SAELens that wrote a configuration, or ``None`` if it is not recorded."""
    metadata = cfg.get("metadata")
    return cfg.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)


def is_legacy(cfg: Mapping[str, Any]) -> bool:
    """Return True if the configuration was written before version 6, which used a flat layout."""
    head = str(version(cfg) or "0").split(".")[0]
    return not head.isdigit() or int(head) < 6


def saelens_dictionary(
    where: object, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions
) -> CanonicalSAE:
    """Build the dictionary from a configuration and its tensors, without normalization and provenance."""
    architecture = cfg["architecture"]
    known = AUTOENCODERS | TRANSCODERS
    if architecture == "temporal":
        raise ValueError(
            f"{where}: architecture: temporal attends to earlier tokens, but dictionaries encode every token by itself. It "
            "cannot be loaded."
        )
    if architecture not in known:
        raise ValueError(f"{where}: architecture: expected one of {', '.join(known)}, got {architecture!r}.")
    names = known[architecture]
    if "log_threshold" in tensors:
        # Older training checkpoints store the logarithm.
        tensors = {name: tensor for name, tensor in tensors.items() if name != "log_threshold"} | {
            "threshold": tensors["log_threshold"].exp()
        }
    require_keys(where, tensors, names)
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(names)} of {architecture}, got also {', '.join(unknown)}.")
    kind = "sae" if architecture in AUTOENCODERS else "transcoder"
    require_keys(where, cfg, ("d_in", "d_sae"))
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    d_out = d_in if kind == "sae" else cfg.get("d_out", d_in)
    for key, size in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_out)):
        if not isinstance(size, int):
            raise ValueError(f"{where}: {key}: expected a whole number in {CONFIG}, got {size!r}.")
    sizes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    sizes |= {"W_skip": (d_out, d_in), "topk_threshold": ()}
    for name in names:
        require_shape(where, name, tuple(tensors[name].shape), sizes.get(name, (d_sae,)))
    subtracts = cfg.get("apply_b_dec_to_input", kind == "sae")
    if kind == "transcoder" and subtracts:
        raise ValueError(
            f"{where}: apply_b_dec_to_input: expected false for a transcoder, whose b_dec is an output bias, got true."
        )
    pursuit, b_dec = architecture == "matching_pursuit", tensors["b_dec"]
    return CanonicalSAE(
        kind=kind,
        W_enc=None if pursuit else tensors["W_enc"].T,
        b_enc=None if pursuit else tensors["b_gate" if architecture == "gated" else "b_enc"],
        W_dec=tensors["W_dec"],
        # Matching pursuit either subtracts and adds the bias or ignores it.
        b_out=torch.zeros_like(b_dec) if pursuit and not subtracts else b_dec,
        gate=_activation_fn(where, cfg, tensors, options),
        b_in=b_dec if subtracts else None,
        W_skip=tensors.get("W_skip"),
    )


def _activation_fn(where: object, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions) -> ActivationFn:
    name = cfg["architecture"].removesuffix("_transcoder").removesuffix("_skip")
    if name in ("standard", "transcoder", "skip"):
        return ActivationFn("relu")
    if name == "jumprelu":
        return ActivationFn("threshold", threshold=tensors["threshold"])
    if name == "gated":
        return ActivationFn("gated", r_mag=tensors["r_mag"], b_mag=tensors["b_mag"])
    if name == "matching_pursuit":
        steps, limit = cfg.get("max_iterations"), cfg.get("residual_threshold", 1e-2)
        if not isinstance(limit, (int, float)):
            raise ValueError(f"{where}: residual_threshold: expected a number, got {limit!r}.")
        stop = {
            "residual_norm": max(float(limit), 0.0),
            "stop_on_repeat": cfg.get("stop_on_duplicate_support", True),
        }
        return ActivationFn("pursuit", k=cfg["d_in"] if steps is None else steps, **stop)
    if name in ("batchtopk", "matryoshka_batchtopk"):
        level = float(tensors["topk_threshold"]) if options.threshold is None else options.threshold
        if not level > 0:
            raise ValueError(
                f"{where}: topk_threshold: expected the threshold that training has measured, got {level}. "
                "Give it as threshold=NUMBER, or --threshold NUMBER."
            )
        return ActivationFn("threshold", threshold=torch.tensor(level), by_norm=cfg.get("rescale_acts_by_decoder_norm", True))
    k = cfg.get("k") if options.k is None else options.k
    return ActivationFn("topk" if name == "topk" else "abs_topk", k=k, by_norm=cfg.get("rescale_acts_by_decoder_norm", False))


def normalise_weights(source: SourceFiles, cfg: Mapping[str, Any], n: CanonicalSAE, options: ReadOptions) -> CanonicalSAE:
    """Return a copy with the input normalization named in the configuration."""
    how = cfg.get("normalize_activations", "none")
    if how in ("none", None):
        return n
    if how in ROW_NORMS:
        return n.noting(f"normalize_activations {how} is row_norm {ROW_NORMS[how]}", row_norm=ROW_NORMS[how])
    if how == SCALED:
        scale = options.scale
        if scale is None and source.has(SCALER):
            scale = source.config(SCALER).get("scaling_factor")
        if not isinstance(scale, (int, float)) or not scale > 0:
            raise ValueError(
                f"{source.path(CONFIG)}: normalize_activations: {how}: expected the input scale factor in {SCALER} beside it, "
                "found none. Weights are in scaled units. Give the factor: scale=NUMBER, or --scale NUMBER."
            )
        return n.noting(f"inputs times {scale:.6g}, outputs divided by it", scale_in=float(scale), scale_out=float(scale))
    if how == WHITENED:
        matrices = source.tensors(WHITENING)
        require_keys(source.path(WHITENING), matrices, ("mean", "matrix", "inverse_matrix"))
        return fold_whitening(n, matrices["mean"], matrices["matrix"], matrices["inverse_matrix"])
    choices = ", ".join(("none", SCALED, WHITENED, *ROW_NORMS))
    raise ValueError(f"{source.path(CONFIG)}: normalize_activations: expected one of {choices}, got {how!r}.")


def saelens_provenance(cfg: Mapping[str, Any], options: ReadOptions) -> dict[str, Any]:
    """Return the provenance in native form, with the complete configuration under ``source``."""
    about: dict[str, Any] = dict(cfg.get("metadata") or {})
    lens = options.model or about.get("model_name")
    model = hub_model(lens)
    reads, writes = _hooks(about, lens)
    if options.hook is not None and not reads:
        reads = writes = to_module(options.hook, lens)
    found: dict[str, Any] = {"model": {"id": model} if model else None}
    if reads and writes:
        found |= {"hooks_in": [reads], "hooks_out": [writes]} | ({"hook": reads} if reads == writes else {})
    text: dict[str, Any] = {}
    if isinstance(about.get("context_size"), int):
        text["context_length"] = about["context_size"]
    if isinstance(about.get("prepend_bos"), bool):
        text["bos"] = "context" if about["prepend_bos"] else "none"
    if about.get("disable_concat_sequences") is True:
        text["packing"] = "separate"
    return found | {"text": text, "source": {"format": "saelens", "config": dict(cfg)}}


def with_metadata(n: CanonicalSAE, cfg: Mapping[str, Any], provenance: dict[str, Any], options: ReadOptions) -> CanonicalSAE:
    """Add provenance and warnings, and convert to a dictionary of the published model."""
    n = n.noting(provenance=provenance, warnings=(*n.warnings, *saelens_doubts(cfg, n, options)))
    return of_published_model(n, cfg.get("metadata") or {})


def _hooks(about: Mapping[str, Any], model: str | None) -> tuple[str | None, str | None]:
    """Return the input and output hooks as module paths, or ``None`` where no module emits them."""
    name = about.get("hf_hook_name") or about.get("hook_name")
    reads = to_module(name, model) or to_module(about.get("hook_name") or "", model) if name else None
    out = about.get("hf_hook_name_out") or about.get("hook_name_out")
    return reads, (to_module(out, model) if out else reads)


def saelens_doubts(cfg: Mapping[str, Any], n: CanonicalSAE, options: ReadOptions) -> list[str]:
    """Return warnings about dtype mismatches, unknown hooks, and unsupported head indices."""
    found = []
    declared, actual = str(cfg.get("dtype", "")).removeprefix("torch."), str(n.W_dec.dtype).removeprefix("torch.")
    if declared and declared != actual:
        found.append(f"{CONFIG} says {declared}, the tensors are {actual}")
    about = cfg.get("metadata") or {}
    name = about.get("hook_name")
    if name and options.hook is None and _hooks(about, options.model or about.get("model_name"))[0] is None:
        found.append(
            f"the hook {name} of {about.get('model_name')} is no module's input or output known here: give hook=MODULE:SIDE"
        )
    if about.get("hook_head_index") is not None:
        head = about["hook_head_index"]
        found.append(f"hook_head_index {head} is not obeyed: it is for head {head} of {name} alone, which no hook here gives")
    return found


def _written(n: CanonicalSAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and tensors to write.

    Raises:
        ValueError: If SAELens cannot represent the dictionary.
    """
    n = _prepared(n)
    gate, skip = n.gate, n.W_skip is not None
    cfg: dict[str, Any] = {"d_in": n.d_in, "d_sae": n.n_latents, "dtype": _dtype(n), "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": n.b_in is not None, "normalize_activations": _norm_name(n)}
    about = metadata(n)
    heads = str(about.get("hook_name")).endswith("hook_z")
    cfg |= {"reshape_activations": "hook_z" if heads else "none", "metadata": about}
    tensors = {"W_dec": n.W_dec, "b_dec": n.b_out}
    if n.W_enc is not None and n.b_enc is not None:
        tensors |= {"W_enc": n.W_enc.T, "b_gate" if gate.name == "gated" else "b_enc": n.b_enc}
    if gate.threshold is not None:
        tensors["threshold"] = gate.threshold.reshape(-1).expand(n.n_latents)
    if gate.r_mag is not None and gate.b_mag is not None:
        tensors |= {"r_mag": gate.r_mag, "b_mag": gate.b_mag}
    if n.W_skip is not None:
        tensors["W_skip"] = n.W_skip
    if n.kind == "transcoder":
        cfg |= {"d_out": n.d_out, "architecture": _transcoder_name(gate, skip)}
    else:
        cfg |= _autoencoder(n)
    # The configuration names one dtype, the decoder's.
    return cfg, {name: tensor.to(n.W_dec.dtype) for name, tensor in tensors.items()}


def _prepared(n: CanonicalSAE) -> CanonicalSAE:
    """Return an equivalent form that SAELens supports, with scales folded and unsupported biases folded."""
    if n.row_norm is not None and n.scaled:
        raise ValueError("saelens: the format has no fixed scale together with row_norm. Keep sparsary's format.")
    if n.row_norm in (None, CENTRED):
        n = fold_all(n)
    elif n.gate.by_norm:
        n = fold_norms(n)
    if n.gate.by_norm and n.gate.name not in ("topk", "abs_topk"):
        n = fold_norms(n)
    # SAELens has a flag to subtract b_dec from the input, but cannot store any other input bias.
    same = n.b_in is not None and n.kind == "sae" and torch.equal(n.b_in, n.b_out)
    return n if n.b_in is None or same else fold_b_in(n)


def _transcoder_name(gate: ActivationFn, skip: bool) -> str:
    names = {"relu": "transcoder", "threshold": "jumprelu_transcoder"}
    if gate.name not in names:
        raise ValueError(
            f"saelens: expected a transcoder with relu or jumprelu, got {gate.name}. Use --to circuit_tracer or sparsify."
        )
    return names[gate.name].replace("transcoder", "skip_transcoder") if skip else names[gate.name]


def _autoencoder(n: CanonicalSAE) -> dict[str, Any]:
    gate = n.gate
    names = {"relu": "standard", "topk": "topk", "abs_topk": "abstopk", "threshold": "jumprelu", "gated": "gated"}
    if gate.name in ("topk", "abs_topk"):
        # SAEDashboard folds decoder norms, which SAELens refuses unless activations are rescaled by them. If all norms
        # are equal, rescaling does not change the selection and can be enabled.
        rescale = gate.by_norm or equal_norms(n.W_dec, max(EQUAL, torch.finfo(n.W_dec.dtype).eps))
        return {"architecture": names[gate.name], "k": gate.k, "rescale_acts_by_decoder_norm": rescale}
    if gate.name in names:
        return {"architecture": names[gate.name]}
    if gate.name == "pursuit" and gate.tolerance == 0 and n.W_enc is None:
        if n.b_in is None and bool(n.b_out.any()):
            raise ValueError(
                "saelens: a pursuit with an output bias but no input bias has no equivalent. Keep sparsary's format."
            )
        stop = {"residual_threshold": gate.residual_norm, "stop_on_duplicate_support": gate.stop_on_repeat}
        return {"architecture": "matching_pursuit", "max_iterations": gate.k} | stop
    reasons = {
        "pursuit": "its matching pursuit is for SAEs and stops at a fixed norm of the residual, not at a share of the "
        "input's norm. Set tolerance to 0",
        "topk_raw": "its topk applies relu, and abstopk ranks by absolute value. Use --to circuit_tracer",
        "group_max": "there is no equivalent. Use --to sparsify",
    }
    raise ValueError(f"saelens: cannot represent {gate.name}: {reasons[gate.name]}.")


def metadata(n: CanonicalSAE) -> dict[str, Any]:
    """Return SAELens metadata with both TransformerLens and Hub names; metadata of an earlier SAELens configuration is kept."""
    kept, model = earlier_metadata(n), model_of(n)
    hook = n.provenance.get("hook")
    reads, writes = ((n.provenance.get(key) or ([hook] if hook else [None]))[0] for key in ("hooks_in", "hooks_out"))
    text = n.provenance.get("text") or {}
    found: dict[str, Any] = {"sae_lens_version": VERSION, "sae_lens_training_version": None}
    found |= {"model_name": exported_model(model), "model_class_name": None}
    found |= {"hook_name": reads and (to_transformer_lens(reads, model) or reads), "hf_hook_name": reads}
    found |= {"hook_layer": layer_of(reads), "hook_head_index": None}
    if n.kind == "transcoder":
        found |= {"hook_name_out": writes and (to_transformer_lens(writes, model) or writes), "hf_hook_name_out": writes}
        found |= {"hook_layer_out": layer_of(writes)}
    found |= {"context_size": text.get("context_length")}
    found |= {"prepend_bos": None if "bos" not in text else text["bos"] != "none"}
    found |= {"training_architecture_details": "; ".join(n.done) or None}
    if model is not None and hub_model(kept.get("model_name")) != model:
        kept.pop("model_name", None)
    if n.row_norm == CENTRED:
        kept[KWARGS] = {**(kept.get(KWARGS) or {}), CENTRE: True}
    return {key: value for key, value in found.items() if value is not None} | kept | {"sae_lens_version": VERSION}


def earlier_metadata(n: CanonicalSAE) -> dict[str, Any]:
    """Return the metadata of the SAELens configuration from which the dictionary was read, if any."""
    source = n.provenance.get("source") or {}
    config = source.get("config", {})
    if source.get("format") == "saelens_legacy":
        return {key: config[key] for key in (KWARGS, "seqpos_slice", "hook_head_index") if config.get(key) is not None}
    return dict(config.get("metadata") or {}) if source.get("format") == "saelens" else {}


def _norm_name(n: CanonicalSAE) -> str:
    # SAELens centers the model's weights itself if the metadata request it.
    names = {ours: theirs for theirs, ours in ROW_NORMS.items()} | {None: "none", CENTRED: "none"}
    return names[n.row_norm]


def _dtype(n: CanonicalSAE) -> str:
    return str(n.W_dec.dtype).removeprefix("torch.")
