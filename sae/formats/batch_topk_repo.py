"""SAEs of the BatchTopK repository and its Matryoshka successor: ``sae.pt`` and a flat ``config.json``.

Its TopK and BatchTopK classes do not use their encoder bias, which therefore stays zero, so adding it is correct for every
class. Source: Bussmann et al. 2024, arXiv:2412.06410, and their code.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Format, Read, ReadOptions, require_keys, require_shape
from .canonical import ActivationFn, CanonicalCrossLayer, CanonicalSAE
from .files import SourceFiles
from .origin import originated
from .torch_files import INSTEAD, torch_names

CONFIG, WEIGHTS = "config.json", "sae.pt"
FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
LOGS = ("jumprelu.log_threshold", "log_threshold")
# Buffers of the Matryoshka variants; only the threshold matters at inference.
BUFFERS = ("threshold", "group_sizes", "num_batches_not_active")
# Words in sae_type that mean top-k over the whole batch.
BATCHWIDE = ("batch", "matryoshka", "global")


class BatchTopKRepository(Format):
    name = "batch_topk"
    title = "the BatchTopK repository"

    def detect(self, source: SourceFiles) -> str | None:
        if not source.has(CONFIG) or not torch_names(source):
            return None
        cfg = source.json(CONFIG)
        if not isinstance(cfg, dict) or not {"act_size", "dict_size"} <= cfg.keys() or "trainer" in cfg:
            return None
        return f"{CONFIG} with act_size, dict_size and sae_type {cfg.get('sae_type')!r}"

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        cfg, names = source.config(CONFIG), torch_names(source)
        if WEIGHTS not in names and len(names) != 1:
            raise ValueError(f"{source}: expected {WEIGHTS}, found {', '.join(names) or 'no torch file'}.")
        name = WEIGHTS if WEIGHTS in names else names[0]
        n = _dictionary(source.path(name), cfg, source.tensors(name), options)
        length = cfg.get("seq_len")
        return originated(
            n,
            self.name,
            cfg,
            options,
            hook=cfg.get("hook_point"),
            model=cfg.get("model_name"),
            text={"context_length": length} if isinstance(length, int) else None,
        )

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError(f"batch_topk: read-only format. {INSTEAD}.")


def _dictionary(where: object, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions) -> CanonicalSAE:
    """Build the dictionary from a configuration and its tensors, without provenance."""
    require_keys(where, tensors, FOUR)
    unknown = sorted(set(tensors) - {*FOUR, *LOGS, *BUFFERS})
    if unknown:
        raise ValueError(f"{where}: expected {', '.join((*FOUR, LOGS[0]))}, got also {', '.join(unknown)}.")
    width, latents = cfg.get("act_size"), cfg.get("dict_size")
    for key, size in (("act_size", width), ("dict_size", latents)):
        if not isinstance(size, int):
            raise ValueError(f"{where}: {key}: expected a whole number in {CONFIG}, got {size!r}.")
    shapes = {"W_enc": (width, latents), "W_dec": (latents, width), "b_enc": (latents,), "b_dec": (width,)}
    for key, shape in shapes.items():
        require_shape(where, key, tuple(tensors[key].shape), shape)
    if cfg.get("activation", "relu") != "relu":
        raise ValueError(f"{where}: activation: expected relu, got {cfg['activation']!r}. It cannot be loaded.")
    gate = _chosen(where, cfg, tensors, options)
    # By default only JumpReLU does not subtract b_dec from inputs; an option changes that, but no file records it.
    jumps = any(name in tensors for name in LOGS)
    subtracts = not jumps if options.subtract_b_dec is None else options.subtract_b_dec
    n = CanonicalSAE(
        kind="sae",
        W_enc=tensors["W_enc"].T,
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_out=tensors["b_dec"],
        gate=gate,
        b_in=tensors["b_dec"] if subtracts else None,
        done=("W_enc transposed",),
    )
    if flag(cfg, "input_unit_norm"):
        n = n.noting("input_unit_norm is row_norm layer_norm", row_norm="layer_norm")
    if flag(cfg, "tied_weights"):
        n = n.noting("tied_weights: atoms are the encoder's rows", W_dec=tensors["W_enc"].T)
    if "use_encoder_bias" in cfg and not flag(cfg, "use_encoder_bias"):
        n = n.noting("use_encoder_bias false: b_enc dropped", b_enc=torch.zeros_like(tensors["b_enc"]))
    if jumps and options.subtract_b_dec is None and bool(tensors["b_dec"].any()):
        doubt = "of JumpReLU, b_dec is not subtracted from inputs, as by default there. If its fvu is poor, subtract_b_dec=true"
        n = replace(n, warnings=(*n.warnings, doubt))
    return n


def _chosen(where: object, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ReadOptions) -> ActivationFn:
    """Return the activation function.

    Raises:
        ValueError: If the type is unknown, or selects latents over a batch and has no threshold.
    """
    log = next((tensors[name] for name in LOGS if name in tensors), None)
    if log is not None:
        require_shape(where, "log_threshold", tuple(log.shape), (cfg["dict_size"],))
        return ActivationFn("threshold", threshold=log.exp())
    kind = str(cfg.get("sae_type", "")).lower()
    if kind in ("vanilla", "standard"):
        return ActivationFn("relu")
    if any(word in kind for word in BATCHWIDE):
        level = tensors.get("threshold")
        level = torch.tensor(float(options.threshold)) if options.threshold is not None else level
        if level is None or level.numel() != 1 or not float(level) > 0:
            found = "none" if level is None else f"{level.reshape(-1).tolist()[:3]}"
            raise ValueError(
                f"{where}: threshold: expected a number above 0, got {found}. {kind} selects latents over a whole batch, but "
                "inference encodes every token by itself. Measure the smallest activation kept per batch, and give it: "
                "threshold=NUMBER, or --threshold NUMBER."
            )
        return ActivationFn(
            "threshold", threshold=level.reshape(()), k=cfg["top_k"] if isinstance(cfg.get("top_k"), int) else None
        )
    if kind == "topk":
        return ActivationFn("topk", k=cfg.get("top_k") if options.k is None else options.k)
    known = "vanilla, topk, batchtopk, jumprelu, or a Matryoshka one"
    raise ValueError(f"{where}: sae_type: expected {known}, got {cfg.get('sae_type')!r}. It cannot be loaded.")


def flag(cfg: Mapping[str, Any], key: str) -> bool:
    """Return a boolean setting, which some versions wrote as a string."""
    return cfg.get(key) in (True, "True", "true")
