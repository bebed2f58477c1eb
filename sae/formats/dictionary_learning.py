"""dictionary_learning: a trainer's ``ae.pt`` and ``config.json``, its checkpoints, and the backups of later versions.

Half of its classes store matrices as linear layers, ``encoder.weight (latents, d)`` and ``decoder.weight (d, latents)``; the
others store them transposed. A state file does not name its class; the configuration or the keys determine it. Source: the
code of dictionary_learning 0.1.0.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json
from ..suggestions import require_choice
from .base import Format, Read, ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles
from .folding import fold_all, fold_b_in, fold_b_out_in, fold_equal_norms, fold_norms, norms_of
from .hooks import layer_of, to_module
from .origin import config_above, hooks_from_files, model_of, originated, public_model, source_config
from .torch_files import CONFIGS, torch_names, values_of, write_torch

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
# Class -> its tensors, except k, threshold, and group_sizes, which early files lack.
CLASSES = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "JumpReluAutoEncoder": (*PLAIN, "threshold"),
    "AutoEncoderTopK": (*LINEAR, "b_dec"),
    "BatchTopKSAE": (*LINEAR, "b_dec"),
    "MatryoshkaBatchTopKSAE": PLAIN,
}
BUFFERS = ("k", "threshold", "group_sizes")
# Prefix of the dictionary's tensors in a backup, which an interrupted run leaves.
BACKUP = "ae."
# Names of hooks in the library's training scripts.
PLACES = r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)_layer_?(\d+)"


class DictionaryLearning(Format):
    name = "dictionary_learning"
    title = "dictionary_learning"

    def detect(self, source: SourceFiles) -> str | None:
        if source.has(CONFIG) and torch_names(source):
            config = source.json(CONFIG)
            trainer = config.get("trainer") if isinstance(config, dict) else None
            if isinstance(trainer, dict) and ("dict_class" in trainer or "trainer_class" in trainer):
                return f"{CONFIG} with trainer.dict_class {trainer.get('dict_class')!r}"
        names = torch_names(source)
        if any(source.has(name) for name in CONFIGS) or not names or (source.remote and WEIGHTS not in names):
            return None
        values = values_of(source, WEIGHTS if WEIGHTS in names else names[0])
        if {"step", "ae.encoder.weight"} <= values.keys() or {"step", "ae.W_enc"} <= values.keys():
            return "a backup of a training: step, and tensors under ae"
        found = [c for c in classes_of(values) if c != "AutoEncoderNew" or WEIGHTS in names or names[0].startswith("ae_")]
        return f"the keys of {' or '.join(found)}" if found else None

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        name = weights_name(source)
        where, values = source.path(name), dict(source.values(name))
        config = config_above(source, CONFIG, 2)
        words: list[str] = []
        scale = 1.0
        if any(key.startswith(BACKUP) for key in values):
            config = config or {"trainer": {k.removeprefix("config."): v for k, v in values.items() if k.startswith("config.")}}
            scale = factor(where, values)
            values = {key.removeprefix(BACKUP): value for key, value in values.items() if key.startswith(BACKUP)}
            words.append(f"a backup: inputs divided by its norm_factor {1 / scale:.6g}, outputs times it")
        trainer = config.get("trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        kind = class_of(where, trainer, tensors, options)
        n = _dictionary(where, kind, trainer, tensors, options)
        n = n.noting(f"{kind}: matrices transposed", *words, scale_in=scale, scale_out=scale)
        buffer = config.get("buffer")
        buffer = buffer if isinstance(buffer, dict) else {}
        length = buffer.get("ctx_len")
        return originated(
            n,
            self.name,
            config,
            options,
            hook=_hook_name(trainer, buffer),
            model=trainer.get("lm_name"),
            text={"context_length": length} if isinstance(length, int) else None,
        )

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        if isinstance(n, CanonicalCrossLayer) or n.kind != "sae":
            raise ValueError("dictionary_learning: expected an SAE, got a transcoder. Use --to sparsify or saelens.")
        kind, trainer, tensors = _written(n)
        reads, _ = hooks_from_files(n)
        module, side = (reads or ":out").rsplit(":", 1)
        kept = source_config(n, self.name)
        found = {"dict_class": kind, "activation_dim": n.d_in, "dict_size": n.n_latents, **trainer}
        found |= {"layer": layer_of(reads), "lm_name": public_model(model_of(n)), "submodule_name": module or None}
        found = {key: value for key, value in found.items() if value is not None}
        length = (n.provenance.get("text") or {}).get("context_length")
        buffer = {"d_submodule": n.d_in, "io": side} | ({} if length is None else {"ctx_len": length})
        directory.mkdir(parents=True, exist_ok=True)
        write_torch(directory / WEIGHTS, tensors)
        earlier = {part: value for part in ("trainer", "buffer") if isinstance(value := kept.get(part), dict)}
        write_json(
            directory / CONFIG,
            {"trainer": earlier.get("trainer", {}) | found, "buffer": earlier.get("buffer", {}) | buffer},
        )


def weights_name(source: SourceFiles) -> str:
    """Return the name of the state file to load.

    Raises:
        ValueError: If there is none, or there are several checkpoints.
    """
    names = torch_names(source)
    if WEIGHTS in names:
        return WEIGHTS
    states = [name for name in names if name.startswith("ae_")] or names
    if len(states) != 1:
        some = ", ".join(states[:20]) or "none"
        raise ValueError(f"{source}: expected {WEIGHTS} or one state file, found {some}. Name the file itself.")
    return states[0]


def classes_of(values: Mapping[str, Any]) -> list[str]:
    """Return the candidate classes of a state file, given its keys and the shape of its threshold."""
    names = {name for name, value in values.items() if isinstance(value, Tensor)}
    threshold = values.get("threshold")
    per_latent = isinstance(threshold, Tensor) and threshold.ndim == 1
    return [
        kind
        for kind, keys in CLASSES.items()
        if set(keys) <= names <= {*keys, *BUFFERS}
        and (kind != "JumpReluAutoEncoder" or per_latent)
        # W_enc, b_enc, W_dec, and b_dec alone occur in many formats.
        and (kind != "MatryoshkaBatchTopKSAE" or ("threshold" in names and not per_latent))
    ]


def class_of(where: object, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions) -> str:
    """Return the class of a state file.

    Raises:
        ValueError: If the configuration names an unknown class, or the keys are ambiguous.
    """
    named = trainer.get("dict_class")
    if named == "IdentityDict":
        raise ValueError(f"{where}: dict_class: IdentityDict returns its input and has no weights. There is nothing to load.")
    if named is not None:
        return require_choice(f"{where}: dict_class", named, CLASSES)
    found = classes_of(tensors)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"{where}: expected the tensors of one of {', '.join(CLASSES)}, got {', '.join(sorted(tensors))}.")
    # AutoEncoderTopK and BatchTopKSAE have the same tensors; the first uses k, the second the threshold.
    if (options.k is None) == (options.threshold is None):
        raise ValueError(
            f"{where}: the tensors may be those of {' or '.join(found)}, and no {CONFIG} says which. Give k=NUMBER for the "
            "former or threshold=NUMBER for the latter (--k NUMBER, --threshold NUMBER)."
        )
    return found[0] if options.threshold is None else found[1]


def factor(where: object, values: Mapping[str, Any]) -> float:
    """Return the input scale of a backup, whose biases are in units of inputs divided by ``norm_factor``.

    Raises:
        ValueError: If ``norm_factor`` is not a number above 0.
    """
    norm = values.get("norm_factor")
    norm = norm.item() if isinstance(norm, Tensor) and norm.numel() == 1 else 1.0 if norm is None else norm
    if not isinstance(norm, (int, float)) or not 0 < norm < float("inf"):
        raise ValueError(f"{where}: norm_factor: expected a number above 0, got {norm!r}.")
    return 1 / norm


def _dictionary(
    where: object, kind: str, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions
) -> CanonicalSAE:
    keys = CLASSES[kind]
    require_keys(where, tensors, keys)
    unknown = sorted(set(tensors) - {*keys, *BUFFERS})
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(keys)} of {kind}, got also {', '.join(unknown)}.")
    linear = "encoder.weight" in keys
    W_enc, W_dec = ("encoder.weight", "decoder.weight") if linear else ("W_enc", "W_dec")
    b_enc = next(name for name in ("encoder.bias", "b_enc", "gate_bias") if name in keys)
    b_dec = next(name for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in keys)
    require_shape(where, b_enc, tuple(tensors[b_enc].shape), (None,))
    require_shape(where, b_dec, tuple(tensors[b_dec].shape), (None,))
    latents, width = len(tensors[b_enc]), len(tensors[b_dec])
    require_shape(where, W_enc, tuple(tensors[W_enc].shape), (latents, width) if linear else (width, latents))
    require_shape(where, W_dec, tuple(tensors[W_dec].shape), (width, latents) if linear else (latents, width))
    for field, size in (("activation_dim", width), ("dict_size", latents)):
        if trainer.get(field, size) != size:
            raise ValueError(f"{where}: {field}: expected {size}, as in the weights, got {trainer[field]!r} in {CONFIG}.")
    subtracts = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    return CanonicalSAE(
        kind="sae",
        W_enc=tensors[W_enc] if linear else tensors[W_enc].T,
        b_enc=tensors[b_enc],
        W_dec=tensors[W_dec].T if linear else tensors[W_dec],
        b_out=tensors[b_dec],
        gate=_activation_fn(where, kind, trainer, tensors, options),
        b_in=tensors[b_dec] if subtracts else None,
    )


def _activation_fn(
    where: object, kind: str, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions
) -> ActivationFn:
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ActivationFn("relu")
    if kind == "GatedAutoEncoder":
        return ActivationFn("gated", r_mag=tensors["r_mag"], b_mag=tensors["mag_bias"])
    if kind == "JumpReluAutoEncoder":
        return ActivationFn("threshold", threshold=tensors["threshold"])
    k = chosen_k(where, trainer, tensors, options)
    if kind == "AutoEncoderTopK":
        return ActivationFn("topk", k=k)
    # k has no effect at inference, but the library requires it when the dictionary is written back.
    return ActivationFn("threshold", k=k if isinstance(k, int) else None, threshold=chosen_threshold(where, tensors, options))


def chosen_k(where: object, trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions) -> Any:
    """Return k from the options, the tensors, or the configuration (in this order; early files have only the last)."""
    said = trainer.get("k")
    if options.k is not None or "k" not in tensors:
        return said if options.k is None else options.k
    stored = tensors["k"]
    require_shape(where, "k", tuple(stored.shape), ())
    k = stored.item()
    if isinstance(k, float) and k.is_integer():
        k = int(k)
    if said is not None and said != k:
        raise ValueError(
            f"{where}: k: expected the same number in weights and {CONFIG}, got {k} and {said!r}. Give the correct one: "
            "k=NUMBER, or --k NUMBER."
        )
    return k


def chosen_threshold(where: object, tensors: Mapping[str, Tensor], options: ReadOptions) -> Tensor:
    """Return the single threshold of all latents.

    Raises:
        ValueError: If training has not measured it; the library then stores -1, which would keep every positive latent.
    """
    if options.threshold is not None:
        return torch.tensor(float(options.threshold))
    level = tensors.get("threshold")
    if level is not None:
        require_shape(where, "threshold", tuple(level.shape), ())
    if level is None or level < 0:
        found = "none" if level is None else f"{float(level):g}, which means that none was measured"
        raise ValueError(
            f"{where}: threshold: expected the threshold measured in training, got {found}. Without it the code of a token "
            "depends on its batch. Measure the smallest activation kept per batch, and give it: threshold=NUMBER, or "
            "--threshold NUMBER."
        )
    return level


def _hook_name(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> str | None:
    """Return the hook of a configuration: a module path, or a TransformerLens name."""
    name = trainer.get("submodule_name")
    if not isinstance(name, str):
        return None
    found = re.fullmatch(PLACES, name)
    if found is not None:
        return f"blocks.{found.group(2)}.hook_{found.group(1)}"
    side = "in" if buffer.get("io") == "in" else "out"
    return f"{name}:{side}" if to_module(name) == f"{name}:out" else name


def _written(n: CanonicalSAE) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the class, trainer arguments, and tensors to write.

    Raises:
        ValueError: If the library cannot represent the dictionary.
    """
    reasons = {
        "topk_raw": "its topk applies relu. Use --to circuit_tracer",
        "abs_topk": "its topk applies relu. Use --to saelens, which has abstopk",
        "group_max": "there is no equivalent. Use --to sparsify",
        "pursuit": "it has no matching pursuit. Use --to saelens",
    }
    if n.gate.name in reasons:
        raise ValueError(f"dictionary_learning: cannot represent {n.gate.name}: {reasons[n.gate.name]}.")
    if n.row_norm is not None:
        raise ValueError(
            f"dictionary_learning: row_norm: expected null, as the library has none, got {n.row_norm}. Use --to saelens."
        )
    k = n.gate.k or source_config(n, "dictionary_learning").get("trainer", {}).get("k")
    n = fold_all(n)
    if n.gate.by_norm or (n.gate.name == "relu" and bool(((norms_of(n.W_dec) - 1).abs() > 1e-6).any())):
        # The library normalizes an AutoEncoder's decoder when it loads one.
        n = fold_norms(n)
    n = fold_equal_norms(n)
    level = n.gate.threshold
    per_latent = level is not None and bool((level != level.reshape(-1)[0]).any())
    if level is not None and (per_latent or not isinstance(k, int)):
        n = fold_b_in(n)
        assert n.W_enc is not None
        assert n.b_enc is not None
        tensors = {"W_enc": n.W_enc.T, "b_enc": n.b_enc, "W_dec": n.W_dec, "b_dec": n.b_out}
        return "JumpReluAutoEncoder", {}, tensors | {"threshold": level.reshape(-1).expand(n.n_latents)}
    n = fold_b_out_in(n)
    assert n.W_enc is not None
    assert n.b_enc is not None
    tensors = {"encoder.weight": n.W_enc, "decoder.weight": n.W_dec.T}
    if n.gate.name == "relu":
        return "AutoEncoder", {}, tensors | {"encoder.bias": n.b_enc, "bias": n.b_out}
    if n.gate.name == "gated":
        assert n.gate.r_mag is not None
        assert n.gate.b_mag is not None
        gates = {"gate_bias": n.b_enc, "r_mag": n.gate.r_mag, "mag_bias": n.gate.b_mag}
        return "GatedAutoEncoder", {}, tensors | {"decoder_bias": n.b_out} | gates
    kind = "AutoEncoderTopK" if level is None else "BatchTopKSAE"
    threshold = torch.tensor(-1.0) if level is None else level.reshape(-1)[0]
    tensors |= {"encoder.bias": n.b_enc, "b_dec": n.b_out, "k": torch.tensor(k, dtype=torch.int32)}
    return kind, {"k": k}, tensors | {"threshold": threshold}
