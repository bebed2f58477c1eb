"""Checkpoint of a dictionary: ``dictionary.safetensors`` and ``dictionary.json``, nothing executable.

The JSON holds the format version, the constructor's arguments, and the provenance. The tensor file's header holds the same
JSON: if a save is killed between the two renames, an older JSON lies next to newer weights, and the header's copy is used.
Trained dictionaries also have ``usage.safetensors``, which records how long each latent had been silent.
"""

import json
import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .dictionary import CONFIG_FILE, FORMAT, FORMAT_VERSION, WEIGHTS_FILE, SparseDictionary
from .encoders import build_encoder
from .files import read_json, read_tensors, require_finite
from .training_usage import load_training_usage

# kind in dictionary.json -> its class, imported on first use: loading must not depend on earlier imports, and this layer
# imports none above it.
KINDS = {
    "sae": "sae.autoencoder:SAE",
    "transcoder": "transcoders.transcoder:Transcoder",
    "cross_layer_transcoder": "transcoders.cross_layer:CrossLayerTranscoder",
}

# Entries of the provenance that are mappings, or null.
SECTIONS = ("model", "text", "harvest", "recipe", "content", "skipped", "converted")

log = logging.getLogger(__name__)


def kind_class(kind: object) -> type[SparseDictionary]:
    """Return the class of a kind in ``KINDS``.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"dictionary.kind: expected one of {', '.join(KINDS)}, got {kind!r}.")
    module, name = KINDS[str(kind)].split(":")
    return getattr(import_module(f"..{module}", __package__), name)


def build_dictionary(arguments: dict[str, Any]) -> SparseDictionary:
    """Return a dictionary with newly initialized weights from the result of ``SparseDictionary.arguments``."""
    arguments = dict(arguments)
    cls = kind_class(arguments.pop("kind", None))
    return cls(encoder=build_encoder(arguments.pop("encoder")), **arguments)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return the contents of ``dictionary.json`` after checking format and version.

    Raises:
        ValueError: If the file is missing, not a sparsary checkpoint, or from a newer version.
    """
    path = Path(directory) / CONFIG_FILE
    if not Path(directory).is_dir():
        raise ValueError(f"{directory}: expected a checkpoint directory, found none. Train one with `sparsary train RECIPE`.")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a sparsary dictionary, with format {FORMAT!r}, got other JSON.")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {config.get('format_version')!r}. "
            "Install the version of sparsary that wrote it."
        )
    _require_entries(path, config)
    return config


def _require_entries(path: Path, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the entries that readers rely on have the types they are written with."""
    usage = {"dead_after_tokens": int, "tokens": int}
    wanted: dict[str, tuple[Any, type | tuple[type, ...]]] = {
        "dictionary": (config.get("dictionary"), dict),
        "provenance": (config.get("provenance"), (dict, type(None))),
        "training_usage": (config.get("training_usage"), (dict, type(None))),
    }
    if isinstance(config.get("dictionary"), dict):
        types = {"kind": str, "d_in": int, "n_latents": int, "encoder": dict}
        wanted |= {f"dictionary.{key}": (config["dictionary"].get(key), kind) for key, kind in types.items()}
    for section, types in (("provenance", dict.fromkeys(SECTIONS, (dict, type(None)))), ("training_usage", usage)):
        if isinstance(config.get(section), dict):
            wanted |= {f"{section}.{key}": (config[section].get(key), kind) for key, kind in types.items()}
    for name, (value, kind) in wanted.items():
        if not isinstance(value, kind):
            raise ValueError(f"{path}: {name}: unexpected {type(value).__name__} {str(value)[:80]!r}. The file is damaged.")


def load_dictionary(directory: str | Path, device: str | torch.device = "cpu") -> SparseDictionary:
    """Load a saved dictionary of any kind, in eval mode.

    >>> import tempfile
    >>> from sparsary import ENCODERS, SAE
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SAE(5, 7, ENCODERS["topk"](k=2)).save(folder)
    ...     load_dictionary(folder).n_latents
    7

    Raises:
        ValueError: If a file is missing or damaged, or a tensor is missing, unexpected, of the wrong shape, or not finite.
    """
    directory = Path(directory)
    config = read_config(directory)
    path = directory / WEIGHTS_FILE
    tensors, metadata = read_tensors(path)
    try:
        own = json.loads(metadata.get("config", "null"))
        if own is not None:
            _require_entries(path, own)
    except (json.JSONDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: config: expected the contents of {CONFIG_FILE} ({error}). The file is damaged.") from None
    if own is not None and own != {key: value for key, value in config.items() if key != "weights_sha256"}:
        log.warning("%s differs from the copy inside %s, which is used: a save was interrupted.", CONFIG_FILE, path)
        config = own
    try:
        with torch.device("meta"):
            dictionary = build_dictionary(config["dictionary"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: dictionary: expected the constructor's arguments ({error}).") from None
    expected = dictionary.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{path}: expected tensors {sorted(expected)}; missing {missing}, not expected {extra}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"{path}: {name}: expected {expected[name].dtype} {tuple(expected[name].shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}."
            )
    require_finite(path, tensors)
    dictionary.load_state_dict(tensors, assign=True)
    dictionary.provenance = config.get("provenance") or {}
    dictionary.training_usage = load_training_usage(directory, config.get("training_usage"), dictionary.n_latents)
    return dictionary.to(device).eval()
