"""What was measured before: entries of a group of metrics, by the content of everything they depend on.

They lie beside the checkpoint in ``eval_cache``, which may be deleted at any time. The key holds the weights' checksum and
the dictionary's arguments, model, text, what is left out, the number of tokens, how latents are chosen, and the group with
its version: another group, or a new version of one, does not make the rest be measured again. Local models and text files
count by size and time of change; of a model on the hub without a fixed revision only its name is known.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...sae.files import read_json, write_json
from ...training.embedded import MODEL_DIR
from ..metrics.base import MetricGroup

FOLDER = "eval_cache"
# Goes up when the way text is read or cut changes, which no group would notice.
CACHE_VERSION = 2
# What a group was told apart from the setting.
MetricOptions = Mapping[str, Any]
Entries = tuple[dict[str, Any], dict[str, str]]

log = logging.getLogger(__name__)


class ReportCache(Protocol):
    """Where a group's settled entries may be found."""

    def get(self, group: type[MetricGroup], options: MetricOptions) -> Entries | None: ...

    def put(self, group: type[MetricGroup], options: MetricOptions, entries: Entries) -> None: ...


class Nothing:
    """Remembers nothing."""

    def get(self, group: type[MetricGroup], options: MetricOptions) -> Entries | None:
        return None

    def put(self, group: type[MetricGroup], options: MetricOptions, entries: Entries) -> None:
        pass


class Beside:
    """Files beside a checkpoint; ``content`` is what entries depend on, apart from the group."""

    def __init__(self, directory: Path, content: dict[str, Any]):
        self.folder = directory / FOLDER
        self.content = content | {"cache_version": CACHE_VERSION}

    def path(self, group: type[MetricGroup], options: MetricOptions) -> Path:
        own = {"group": group.name, "version": group.version, "options": dict(options)}
        key = json.dumps(self.content | own, sort_keys=True)
        return self.folder / f"{group.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def get(self, group: type[MetricGroup], options: MetricOptions) -> Entries | None:
        path = self.path(group, options)
        if not path.exists():
            return None
        try:
            found = read_json(path)
            return dict(found["entries"]), dict(found["reasons"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s: damaged, measured again.", path)
            return None

    def put(self, group: type[MetricGroup], options: MetricOptions, entries: Entries) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.path(group, options), {"entries": entries[0], "reasons": entries[1]})
        except OSError as error:
            log.warning("%s: nothing can be kept here (%s); the next evaluation starts anew.", self.folder, error)


def content_of(weights: str, config: dict[str, Any], selection: str, tokens: int) -> dict[str, Any]:
    """Everything that figures of a checkpoint depend on; ``weights`` is the checksum of its files."""
    source = config["provenance"]
    model, text = source["model"], source["text"]
    place = MODEL_DIR if model["id"] == "embedded" else Path(model["id"])
    return {
        "weights": weights,
        "dictionary": config["dictionary"],
        "hooks": [source.get(key) for key in ("hook", "hooks_in", "hooks_out")],
        "model": {key: value for key, value in model.items() if key != "device"},
        "model_files": [_state(path) for path in sorted(place.glob("*"))] if place.is_dir() else None,
        "text": text,
        "text_files": [_state(Path(name)) for name in text.get("files", ())],
        "harvest": source["harvest"],
        "sparsary": source.get("sparsary_version"),
        "selection": selection,
        "tokens": tokens,
    }


def _state(path: Path) -> list[Any]:
    """Name, size and time of change, or the name alone of what is not there."""
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [path.name]
