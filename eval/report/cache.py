"""Cache of metric results, keyed by everything that they depend on.

Results lie in ``eval_cache`` next to the checkpoint, which may be deleted at any time. The key covers the weights' checksum,
the dictionary's arguments, model, text, token filters, number of tokens, inference mode, and the metric group with its
version: adding a group, or raising one group's version, leaves the other entries valid. Models and texts count by their content
(``training.content``): an entry also records the documents it was measured on, and is ignored once they have changed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...sae.files import read_json, write_json
from ...training.activations.model_source import section_content
from ...training.content import Content, text_content
from ...training.recipe import ModelSection, TextSection
from ..metrics.base import MetricGroup

FOLDER = "eval_cache"
# Raised when the reading or cutting of text changes, which no group's version reflects.
CACHE_VERSION = 2
# A metric group's own options.
MetricOptions = Mapping[str, Any]
log = logging.getLogger(__name__)


class GroupResult(NamedTuple):
    """Result of one metric group: JSON-ready entries, the reason for every ``None``, and sums by document."""

    entries: dict[str, Any]
    reasons: dict[str, str]
    sums: dict[str, list[float]] | None = None


class ReportCache(Protocol):
    """Interface of a result cache. ``documents`` is the number of documents measured on, or ``None`` for all."""

    def get(self, group: type[MetricGroup], options: MetricOptions) -> GroupResult | None: ...

    def put(self, group: type[MetricGroup], options: MetricOptions, found: GroupResult, documents: int | None) -> None: ...


class Nothing:
    """Cache that stores nothing."""

    def get(self, group: type[MetricGroup], options: MetricOptions) -> GroupResult | None:
        return None

    def put(self, group: type[MetricGroup], options: MetricOptions, found: GroupResult, documents: int | None) -> None:
        pass


class Beside:
    """Cache in files next to a checkpoint; ``content`` holds the key's parts other than the group and the text's documents."""

    def __init__(self, directory: Path, content: dict[str, Any], text: TextSection):
        self.folder = directory / FOLDER
        self.content = content | {"cache_version": CACHE_VERSION}
        self.text = text
        # Computed once: all groups of an evaluation read the same documents.
        self._records: dict[int | None, Content] = {}

    def path(self, group: type[MetricGroup], options: MetricOptions) -> Path:
        own = {"group": group.name, "version": group.version, "options": dict(options)}
        key = json.dumps(self.content | own, sort_keys=True)
        return self.folder / f"{group.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def get(self, group: type[MetricGroup], options: MetricOptions) -> GroupResult | None:
        path = self.path(group, options)
        if not path.exists():
            return None
        try:
            found = read_json(path)
            if found["text"] != self._text_record(found["text"]["documents"]):
                return None
            return GroupResult(dict(found["entries"]), dict(found["reasons"]), found.get("sums"))
        except (ValueError, KeyError, TypeError):
            log.warning("%s: damaged; its metrics are recomputed.", path)
            return None

    def put(self, group: type[MetricGroup], options: MetricOptions, found: GroupResult, documents: int | None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.path(group, options), found._asdict() | {"text": self._text_record(documents)}, sealed=True)
        except OSError as error:
            log.warning("%s: results cannot be cached here (%s); the next evaluation recomputes them.", self.folder, error)

    def _text_record(self, documents: int | None) -> Content:
        if documents not in self._records:
            self._records[documents] = text_content(self.text, documents)
        return self._records[documents]


def content_of(weights: str, config: dict[str, Any], selection: str, tokens: int) -> dict[str, Any]:
    """Return everything that a checkpoint's results depend on; ``weights`` is the checksum of its files."""
    source = config["provenance"]
    section = ModelSection.model_validate(source["model"])
    return {
        "weights": weights,
        "dictionary": config["dictionary"],
        "hooks": [source.get(key) for key in ("hook", "hooks_in", "hooks_out")],
        "model": section.model_dump(mode="json", exclude={"device", "device_map", "trust_remote_code", "truncate"}),
        "content": section_content(section),
        "text": source["text"],
        "harvest": source["harvest"],
        "sparsary": source.get("sparsary_version"),
        "selection": selection,
        "tokens": tokens,
    }


def merged_entries(parts: Iterable[GroupResult]) -> dict[str, Any]:
    """Merge the entries of all groups; ``reasons`` explains every ``None``."""
    found: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for part in parts:
        found |= part.entries
        reasons |= part.reasons
    return found | {"reasons": reasons}
