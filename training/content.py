"""Content digests of models, tokenizers and texts, which change when files change under the same name.

A store's manifest, a run's checkpoint and cached results record a *content*: ``{"model": ..., "tokenizer": ..., "text": ...}``.
Local models are identified by their files, models and datasets of the Hugging Face Hub by their commit, texts by the documents
read so far. Files are hashed once: digests are kept in the user's cache folder (``$SPARSARY_CACHE``, else ``sparsary`` in
``$XDG_CACHE_HOME`` or ``~/.cache``), with the files' sizes, times and inodes. A file that differs in any of these is hashed
again.
"""

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..sae.files import read_json, sha256, write_json
from .chats import template_file
from .documents import SourceDocument
from .embedded import MODEL_DIR
from .mix import part_names
from .recipe import ModelSection, TextSection, TextSource
from .text import Cursor, documents
from .text_files import listed_files

log = logging.getLogger(__name__)

Content = dict[str, Any]
AnySource = TypeVar("AnySource", bound=TextSource)
REMEMBERED_FILE = "digests.json"
REMEMBERED = 1000
# A file may change again within the resolution of its timestamps, so digests of files that just changed are not cached.
SETTLED_SECONDS = 2.0
# The embedded corpus is generated: a few documents identify the rules that generate all of them.
EMBEDDED_DOCUMENTS = 16
# Keys of a model configuration that do not affect the model.
UNREAD_KEYS = ("transformers_version", "_name_or_path")
# Keys of a text section that do not affect its documents.
UNREAD_TEXT_KEYS = (
    *("context_length", "bos", "packing", "seed", "source", "on_bad_row", "max_bad_share", "tokenizer_sha256", "chat"),
)


def cache_folder() -> Path:
    """Return the folder of cached digests."""
    own = os.environ.get("SPARSARY_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsary"


def _state(path: Path) -> list[int]:
    """Return the file metadata that changes when the content does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _settled(states: Iterable[list[int]], now: float) -> bool:
    return all(now - max(state[1], state[2]) / 1e9 > SETTLED_SECONDS for state in states)


def remembered(name: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """Return ``compute()``, or its cached result if the files have not changed since.

    Args:
        name: Cache key; it must contain everything that the result depends on besides the files.
    """
    paths = list(files)
    states, started = [_state(path) for path in paths], time.time()
    known = _read_remembered()
    if known.get(name, {}).get("files") == states:
        return known[name]["digest"]
    digest = compute()
    if _settled(states, started) and [_state(path) for path in paths] == states:
        remember(name, states, digest)
    return digest


def remember(name: str, states: list[list[int]], digest: str) -> None:
    """Cache a digest. Without a writable cache folder it is computed again next time."""
    known = _read_remembered()
    known.pop(name, None)
    known[name] = {"files": states, "digest": digest}
    with suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_json(
            cache_folder() / REMEMBERED_FILE, dict(islice(known.items(), max(0, len(known) - REMEMBERED), None)), sealed=True
        )


def _read_remembered() -> dict[str, Any]:
    try:
        found = read_json(cache_folder() / REMEMBERED_FILE)
    except (OSError, ValueError):
        return {}
    well_formed = isinstance(found, dict) and all(
        isinstance(v, dict) and {"files", "digest"} <= v.keys() for v in found.values()
    )
    return found if well_formed else {}


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, from the cache if possible."""
    path = path.resolve()
    return remembered(f"file {path}", [path], lambda: sha256(path))


def _joined(parts: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in parts).encode()).hexdigest()


def model_folder(section: ModelSection) -> Path | None:
    """Return the folder of a local or embedded model; ``None`` for one of the Hugging Face Hub."""
    folder = MODEL_DIR if section.id == "embedded" else Path(section.id)
    return folder if folder.is_dir() else None


def folder_content(folder: Path, with_code: bool = False) -> Content:
    """Return the digests of a local model's configuration and weights and, with ``with_code``, of its Python code."""
    content = {"config": _config_digest(folder / "config.json")}
    weights = _weights(folder)
    content["weights"] = _joined((path.name, file_digest(path)) for path in weights)
    if with_code:
        content["code"] = _joined((path.name, file_digest(path)) for path in sorted(folder.glob("*.py")))
    return content


def _config_digest(path: Path) -> str:
    if not path.is_file():
        return ""
    raw = path.read_bytes()
    with suppress(ValueError):
        values = json.loads(raw)
        raw = json.dumps({key: value for key, value in values.items() if key not in UNREAD_KEYS}, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()


def _weights(folder: Path) -> list[Path]:
    """Return the files that a model's weights are loaded from, including adapters loaded on top."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    elif (folder / "model.safetensors").is_file():
        named = {"model.safetensors"}
    else:
        named = {path.name for path in folder.glob("*.safetensors")}
    named |= {path.name for path in folder.glob("adapter_*")}
    return sorted(folder / name for name in named if (folder / name).is_file())


def chained(digest: str, text: str) -> str:
    """Return the digest of a sequence of documents, given the digest of all but the last one."""
    return hashlib.sha256(digest.encode() + text.encode("utf-8", "surrogatepass")).hexdigest()


class TextDigest:
    """Running digest of a text's documents in reading order. It may be queried from another thread.

    Documents that are read again, as in a second pass, are not counted twice. The record of a mix has the characters of every
    part; that of a text with chats says that the tokenizer's template was used.
    """

    def __init__(self, section: TextSection):
        self.section = section
        self._documents, self._digest = 0, _template_seed(section)
        # Number of documents, digest and further entries for documents read ahead of the last record.
        self._ahead: deque[tuple[int, str, Content]] = deque()
        self._record: Content = {"documents": 0, "sha256": ""}
        self._parts = dict.fromkeys(part_names(section.mix), 0)
        self._reads_template = False
        self._lock = threading.Lock()
        self._files = _text_files(section)
        self._states = _states_of(self._files)

    def add(self, number: int, text: str) -> None:
        """Add document ``number`` if it is the next one; ignore it otherwise."""
        if number == self._documents:
            with self._lock:
                self._digest = chained(self._digest, text)
                self._documents += 1
                self._reads_template |= getattr(text, "kind", "text") == "chat" and self.section.chat.template == "tokenizer"
                if isinstance(text, SourceDocument) and self._parts:
                    self._parts[list(self._parts)[text.part]] += text.size
                more: Content = {"characters": dict(self._parts)} if self._parts else {}
                more |= {"chat_template": True} if self._reads_template else {}
                self._ahead.append((self._documents, self._digest, more))

    def up_to(self, cursor: Cursor) -> Content:
        """Return the record of all documents that begin before ``cursor``; never of fewer than last time."""
        if self.section.source == "embedded":
            return text_record(self.section, EMBEDDED_DOCUMENTS)
        with self._lock:
            while self._ahead and self._ahead[0][0] <= cursor.document + (cursor.offset > 0):
                number, digest, more = self._ahead.popleft()
                self._record = {"documents": number, "sha256": digest} | more
            commit = self.section.dataset_revision
            return self._record | ({"commit": commit} if _is_commit(commit) else {})

    def remember(self) -> None:
        """Cache the last record for the next start, unless files changed while they were read."""
        if self._states and _settled(self._states, time.time()) and _states_of(self._files) == self._states:
            remember(_text_name(self.section, self._record["documents"]), self._states, self._record["sha256"])


def _sources(section: TextSection) -> Sequence[TextSource]:
    return section.mix if section.source == "mix" else (section,)


def _text_files(section: TextSection) -> list[Path]:
    """Return the files that documents are read from; none if there are others, on the Hub."""
    found: list[Path] = []
    for source in _sources(section):
        if source.source == "hub" and not Path(str(source.dataset)).is_dir():
            return []
        if source.source == "hub":
            found += sorted(path for path in Path(str(source.dataset)).rglob("*") if path.is_file())
        elif source.source == "files":
            try:
                found += [path.resolve() for path in listed_files(source)]
            except ValueError:
                # Reported where they are read.
                found += [Path(name).resolve() for name in source.files]
    return found + [Path(section.chat.template).resolve()] * (section.chat.template != "tokenizer")


def _template_seed(section: TextSection) -> str:
    """Return the digest that the documents' begins with: of the chat template, if it is a file, else nothing."""
    if section.chat.template == "tokenizer":
        return ""
    return hashlib.sha256(template_file(section.chat).encode()).hexdigest()


def _states_of(files: list[Path]) -> list[list[int]]:
    try:
        return [_state(path) for path in files]
    except OSError:
        return []


def _text_name(section: TextSection, count: int | None) -> str:
    values = section.model_dump(mode="json", exclude=set(UNREAD_TEXT_KEYS))
    values["files"] = [str(path) for path in _text_files(section)]
    return f"text {count} {json.dumps(values, sort_keys=True)}"


def text_record(section: TextSection, count: int | None) -> Content:
    """Return the record of a text's first ``count`` documents, ``None`` for all; read them unless the digest is cached.

    Raises:
        ValueError: If the text cannot be read.
    """

    def compute() -> str:
        digest = _template_seed(section)
        for _, text in islice(documents(section, 0, lambda _: True), count):
            digest = chained(digest, text)
        return digest

    files = _text_files(section)
    if not files or not all(path.is_file() for path in files):
        # No file identifies the text, or one is missing: then reading raises the error that names the recipe key.
        return {"documents": count, "sha256": compute()}
    return {"documents": count, "sha256": remembered(_text_name(section, count), files, compute)}


def text_content(section: TextSection, count: int | None) -> Content:
    """Return the identity of a text's first documents: the commit of a Hugging Face dataset, else a digest of the documents.

    Raises:
        ValueError: If the text cannot be read.
    """
    if section.source == "embedded":
        return text_record(section, EMBEDDED_DOCUMENTS) | {"documents": count}
    commit = dataset_commit(section)
    return text_record(section, count) if commit is None else {"documents": count, "commit": commit}


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def pinned(section: TextSection) -> TextSection:
    """Return the text section with its datasets' current commits, so that all documents are read from one revision."""
    if section.source == "mix":
        return section.model_copy(update={"mix": tuple(_pinned_source(part) for part in section.mix)})
    return _pinned_source(section)


def _pinned_source(section: AnySource) -> AnySource:
    commit = dataset_commit(section)
    return section if commit is None else section.model_copy(update={"dataset_revision": commit})


def dataset_commit(section: TextSource) -> str | None:
    """Return the current commit of a Hugging Face dataset; ``None`` for other texts, or if the Hub gives none."""
    if section.source != "hub" or Path(str(section.dataset)).exists():
        return None
    if _is_commit(section.dataset_revision):
        return section.dataset_revision
    # Imported lazily: other texts do not need it.
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(section.dataset), revision=section.dataset_revision, timeout=10).sha
    except Exception as error:  # noqa: BLE001 - whatever the client raises: the data set may be cached all the same
        log.debug("%s: no commit (%s)", section.dataset, error)
        return None


def model_problems(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return one line for each difference between a recorded model and tokenizer and the current ones."""
    before, now = recorded.get("model") or {}, current.get("model") or {}
    found = _changes(before, now, "model")
    if before.get("tuned") and now.get("tuned"):
        found += _changes(before["tuned"], now["tuned"], "model.tuned")
    if recorded.get("tokenizer") and current.get("tokenizer") and recorded["tokenizer"] != current["tokenizer"]:
        found.append(
            "tokenizer: it changed, in how it cuts text or in its special tokens "
            f"(sha256 {_short(recorded['tokenizer'])} then, {_short(current['tokenizer'])} now)"
        )
    templates = recorded.get("chat_template"), current.get("chat_template")
    if (recorded.get("text") or {}).get("chat_template") and templates[0] and templates[0] != templates[1]:
        found.append(
            "tokenizer: its chat template, which the text is read with, changed "
            f"(sha256 {_short(templates[0])} then, {_short(templates[1] or 'none')} now)"
        )
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> list[str]:
    """Return one line for each difference between one recorded model and the current one."""
    found = []
    commits = before.get("commit"), now.get("commit")
    if None not in commits and commits[0] != commits[1]:
        found.append(
            f"{key}: the repository is at commit {commits[1]}, it was at {commits[0]}. For the old one, set {key}.revision: "
            f"{commits[0]}"
        )
    for part, words in (
        ("config", "configuration"),
        ("weights", "weights"),
        ("code", "Python code"),
        ("parameters", "weights"),
    ):
        if part in before and part in now and before[part] != now[part]:
            found.append(f"{key}: its {words} changed (sha256 {_short(before[part])} then, {_short(now[part])} now)")
    return found


def text_problems(recorded: Mapping[str, Any], section: TextSection) -> list[str] | None:
    """Return a line if a text's first documents, or its dataset's commit, differ from a recorded content.

    ``None`` means that they could not be compared.
    """
    before = recorded.get("text") or {}
    if section.source == "hub" and before.get("commit"):
        commit = dataset_commit(section)
        if commit is None:
            log.warning("text: %s: the Hugging Face Hub gives no commit, so changes to it cannot be detected.", section.dataset)
            return None
        if commit == before["commit"]:
            return []
        return [
            f"text: {section.dataset} is at commit {commit}, it was at {before['commit']}. Set text.dataset_revision: "
            f"{before['commit']} for the old one"
        ]
    remote = any(source.source == "hub" and not Path(str(source.dataset)).is_dir() for source in _sources(section))
    if not before.get("documents") or remote:
        return None
    try:
        now = text_record(section, before["documents"])
    except ValueError as error:
        # Not an error: a complete store or run does not need its text any more.
        log.warning("text: cannot be read, so changes to it cannot be detected (%s)", error)
        return None
    if now["sha256"] == before["sha256"]:
        return []
    named = section.mix or (section,)
    where = ", ".join("the embedded corpus" if each.source == "embedded" else part_names([each])[0] for each in named)
    return [
        f"text: the first {before['documents']:,} documents of {where} changed "
        f"(sha256 {_short(before['sha256'])} then, {_short(now['sha256'])} now)"
    ]


def _short(digest: str) -> str:
    return digest[:12]
