"""Files of a checkpoint: their names, how they are written, and the description of the dictionary that they agree on."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import CHECKSUM, is_whole, json_checksum, read_unsealed_json, write_json, write_tensors
from .training_usage import TrainingUsage

FORMAT = "sparsary-dictionary"
FORMAT_VERSION = 1
WEIGHTS_FILE = "dictionary.safetensors"
CONFIG_FILE = "dictionary.json"
# Entry of dictionary.json alone: SHA-256 of the weights file, whose header holds all other entries.
WEIGHTS_DIGEST = "weights_sha256"
# Entries of the provenance that are mappings, or null.
SECTIONS = ("model", "text", "harvest", "recipe", "content", "skipped", "converted")

log = logging.getLogger(__name__)


def write_dictionary_files(
    directory: str | Path, tensors: Mapping[str, Tensor], config: dict[str, Any], usage: TrainingUsage | None
) -> None:
    """Write the files of a checkpoint, as ``SparseDictionary.save`` does.

    Args:
        tensors: ``state_dict()`` of the dictionary, or a copy of it.
        config: Its ``config()``.
        usage: Its ``training_usage``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    digest = write_tensors(directory / WEIGHTS_FILE, tensors, {"config": json.dumps(config)}, sealed=True)
    if usage is not None:
        usage.save(directory)
    write_json(directory / CONFIG_FILE, config | {WEIGHTS_DIGEST: digest}, sealed=True)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return the description of a checkpoint's dictionary: the contents of ``dictionary.json``, after checking them.

    They are compared with the copy in the header of the weights. If both are whole and differ, a save was interrupted between
    the two files, and the copy is returned, because it describes the weights. A file without a checksum, written by an earlier
    version or edited by hand, counts where it says where the dictionary comes from (``provenance``); the rest is the copy's.

    Raises:
        ValueError: If the file is missing, damaged, not a sparsary checkpoint, or from a newer version.
    """
    path = Path(directory) / CONFIG_FILE
    if not Path(directory).is_dir():
        raise ValueError(f"{directory}: expected a checkpoint directory, found none. Train one with `sparsary train RECIPE`.")
    config = read_unsealed_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a sparsary dictionary, with format {FORMAT!r}, got other JSON.")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {config.get('format_version')!r}. "
            "Install the version of sparsary that wrote it."
        )
    _require_entries(path, config)
    checksum = config.pop(CHECKSUM, None)
    if checksum not in (None, json_checksum(config)):
        raise ValueError(
            f"{path}: expected the checksum {str(checksum)[:40]!r} that it names, got another: the file is damaged, or was "
            "edited. Restore it from a backup; in the folder of a run, delete it and repeat `sparsary train`, which writes it "
            f"anew. If you edited it, delete its entry {CHECKSUM!r}."
        )
    weights = Path(directory) / WEIGHTS_FILE
    copy = _copy_in_weights(weights)
    if copy is None or copy == {key: value for key, value in config.items() if key != WEIGHTS_DIGEST}:
        return config
    if not is_whole(weights):
        # Reported when the weights are read.
        return config
    if checksum is None:
        log.warning(
            "%s has no checksum and differs from the copy inside %s: edited by hand, or damaged. Its provenance is used.",
            path,
            weights,
        )
        return copy | {"provenance": config.get("provenance")}
    log.warning("%s differs from the copy inside %s, which is used: a save was interrupted.", CONFIG_FILE, weights)
    return copy


def _copy_in_weights(path: Path) -> dict[str, Any] | None:
    """Return the description in the header of a weights file; ``None`` if it has none, or the file is missing or damaged.

    Damage is reported when the weights are read.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
        found = json.loads(metadata.get("config", "null"))
        if found is not None:
            _require_entries(path, found)
    except (OSError, SafetensorError, ValueError, AttributeError, RecursionError):
        return None
    return found


def _require_entries(path: Path, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the entries that readers rely on have the types they are written with."""
    usage = {"dead_after_tokens": int, "tokens": int}
    wanted: dict[str, tuple[Any, type | tuple[type, ...]]] = {
        "dictionary": (config.get("dictionary"), dict),
        "provenance": (config.get("provenance"), (dict, type(None))),
        "training_usage": (config.get("training_usage"), (dict, type(None))),
    }
    if isinstance(config.get("dictionary"), dict):
        size = {"widths": list} if config["dictionary"].get("kind") == "crosscoder" else {"d_in": int}
        types = {"kind": str, **size, "n_latents": int, "encoder": dict}
        wanted |= {f"dictionary.{key}": (config["dictionary"].get(key), kind) for key, kind in types.items()}
    for section, types in (("provenance", dict.fromkeys(SECTIONS, (dict, type(None)))), ("training_usage", usage)):
        if isinstance(config.get(section), dict):
            wanted |= {f"{section}.{key}": (config[section].get(key), kind) for key, kind in types.items()}
    for name, (value, kind) in wanted.items():
        if not isinstance(value, kind):
            raise ValueError(f"{path}: {name}: unexpected {type(value).__name__} {str(value)[:80]!r}. The file is damaged.")
