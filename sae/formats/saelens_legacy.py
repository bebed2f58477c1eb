"""SAELens 2 to 5: a flat ``cfg.json``, whose fields were renamed between versions, and the tensor file of version 6.

The configuration is upgraded to the form of version 6 and read as such. The activation function is never guessed: an unknown
name is an error, since a TopK dictionary misread as ReLU has the same shapes. Source: the upgrade rules in the code of
SAELens 6.54.12 and of earlier versions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Format, Read, ReadOptions, require_keys
from .canonical import CanonicalCrossLayer, CanonicalSAE
from .files import TORCH_SUFFIXES, SourceFiles
from .folding import fold_activation_scale
from .saelens import CONFIG, WEIGHTS, is_legacy, normalise_weights, saelens_dictionary, saelens_provenance, with_metadata

RENAMED = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
# Fields of old configurations that version 6 keeps under metadata.
METADATA = (
    "model_name",
    "model_class_name",
    "hook_name",
    "hook_layer",
    "hook_head_index",
    "prepend_bos",
    "context_size",
    "dataset_path",
    "dataset_trust_remote_code",
    "seqpos_slice",
    "model_from_pretrained_kwargs",
    "neuronpedia_id",
    "sae_lens_training_version",
)
ACTIVATIONS = ("activation_fn", "activation_fn_str")
ARGUMENTS = ("activation_fn_kwargs", "activation_fn_args")
# Per-latent factors that multiplied activations before decoding.
FACTORS = ("scaling_factor", "finetuning_scaling_factor")


class SAELensLegacy(Format):
    name = "saelens_legacy"
    title = "SAELens before version 6"

    def detect(self, source: SourceFiles) -> str | None:
        if not source.has(CONFIG):
            return None
        cfg = source.json(CONFIG)
        if not isinstance(cfg, dict) or not {"hook_name", "hook_point"} & cfg.keys() or not is_legacy(cfg):
            return None
        return f"{CONFIG}, flat, with {'hook_point' if 'hook_point' in cfg else 'hook_name'}"

    def read(self, source: SourceFiles, options: ReadOptions) -> Read:
        if not source.has(CONFIG):
            raise_for_pickles(source)
        old = source.config(CONFIG)
        where = source.path(WEIGHTS)
        tensors = dict(source.tensors(WEIGHTS))
        cfg, words = upgraded(where, old, tensors)
        factor = factors(where, old, tensors)
        n = normalise_weights(source, cfg, saelens_dictionary(where, cfg, tensors, options), options)
        if factor is not None:
            n = fold_activation_scale(n, factor)
        found = saelens_provenance(cfg, options)
        found["source"] = {"format": self.name, "config": dict(old)}
        return with_metadata(n.noting("W_enc transposed", *words), cfg, found, options)

    def write(self, n: CanonicalSAE | CanonicalCrossLayer, directory: Path) -> None:
        raise ValueError("saelens_legacy: read-only format. Use --to saelens, which SAELens 6 reads.")


def upgraded(where: object, old: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Return a flat configuration in the form of version 6, and notes on renamed fields.

    Raises:
        ValueError: For activation functions and architectures that version 6 does not have.
    """
    cfg = {RENAMED.get(key, key): value for key, value in old.items()}
    words = [f"{before} renamed {after}" for before, after in RENAMED.items() if before in old]
    architecture, gate = _chosen(where, cfg)
    hook = cfg.get("hook_name") or ""
    new: dict[str, Any] = {"architecture": architecture, "dtype": cfg.get("dtype", ""), **gate}
    width, latents = tensors["W_dec"].shape[::-1] if "W_dec" in tensors and tensors["W_dec"].ndim == 2 else (None, None)
    new |= {"d_in": cfg.get("d_in", width), "d_sae": cfg.get("d_sae", latents)}
    if new["d_sae"] is None:
        new["d_sae"] = latents
    new["apply_b_dec_to_input"] = cfg.get("apply_b_dec_to_input", True)
    new["normalize_activations"] = normalisation(where, cfg.get("normalize_activations"))
    new["reshape_activations"] = cfg.get("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    about = {key: cfg[key] for key in METADATA if cfg.get(key) is not None}
    new["metadata"] = {"prepend_bos": True} | about
    return new, words


def _chosen(where: object, cfg: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the architecture and k from fields that had several names."""
    named = {str(cfg[key]) for key in ACTIVATIONS if cfg.get(key) is not None}
    if len(named) > 1:
        raise ValueError(f"{where}: {' and '.join(ACTIVATIONS)}: expected one activation function, got {sorted(named)}.")
    activation = next(iter(named), "relu")
    arguments = next((cfg[key] for key in ARGUMENTS if isinstance(cfg.get(key), dict)), {})
    architecture = cfg.get("architecture") or "standard"
    if activation == "topk" or architecture == "topk":
        if architecture not in ("standard", "topk"):
            raise ValueError(f"{where}: activation topk with architecture {architecture}: not supported. It cannot be loaded.")
        k = arguments.get("k", cfg.get("k"))
        return "topk", {"k": k}
    if activation != "relu":
        extra = ", which applies tanh to the rectified values and is not supported" if activation.startswith("tanh") else ""
        raise ValueError(
            f"{where}: activation function: expected relu or topk, got {activation!r}{extra}. It cannot be loaded."
        )
    return architecture, {}


def normalisation(where: object, value: object) -> str:
    """Return the name of the input normalization; the oldest files store a boolean instead."""
    if value in (None, False, "none"):
        return "none"
    if value is True:
        return "expected_average_only_in"
    if not isinstance(value, str):
        raise ValueError(f"{where}: normalize_activations: expected a name or true or false, got {value!r}.")
    return value


def factors(where: object, cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> Tensor | None:
    """Remove the per-latent factors from ``tensors`` and return them; ``None`` if they are all 1 or absent.

    Raises:
        ValueError: If tensors and configuration disagree on whether the factors were used.
    """
    found = [tensors.pop(name) for name in FACTORS if name in tensors]
    used = bool(cfg.get("finetuning_scaling_factor", False))
    if not found or torch.equal(found[0], torch.ones_like(found[0])):
        if used and not found:
            require_keys(where, tensors, ("finetuning_scaling_factor",))
        return None
    if not used:
        raise ValueError(
            f"{where}: expected scaling factors of 1, as {CONFIG} has finetuning_scaling_factor: false, got others. Set it to "
            "true in the file if the factors were in use, or remove the tensor."
        )
    return found[0]


def raise_for_pickles(source: SourceFiles) -> None:
    """Raise ``ValueError`` for files from before SAELens had separate configuration files."""
    pickles = [name for name in source.files if name.endswith((".pkl", ".pkl.gz", *TORCH_SUFFIXES))]
    what = f"pickled objects ({', '.join(pickles)}), as version 1 wrote," if pickles else "no configuration"
    raise ValueError(
        f"{source}: expected {CONFIG} and {WEIGHTS}, got {what} which are never loaded. If you trust them, convert them "
        "in a separate process with the version of SAELens that wrote them: SAE.load_from_pretrained(FILE).save_model(FOLDER)."
    )
