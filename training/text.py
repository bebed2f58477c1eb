"""Text in: documents from the embedded corpus, files or the hub, tokenised and packed into contexts.

Documents are numbered in reading order; a document's number decides whether it is held out, so the same text is split the
same way everywhere.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .embedded import corpus
from .recipe import TextSection

TOKENIZE_AT_ONCE = 256


class Cursor(NamedTuple):
    """A place in the text: the next document, and how many of its tokens have gone by."""

    document: int
    offset: int


@dataclass(frozen=True)
class Context:
    """One row for the model: ids, and for every token its document and its position in it.

    BOS belongs to the document that follows it, at position -1; padding belongs to none: both are -1 there. ``cursor`` is
    where the next context begins.
    """

    token_ids: np.ndarray  # (context_length,) int32
    document_ids: np.ndarray  # (context_length,) int32
    positions: np.ndarray  # (context_length,) int32
    cursor: Cursor


def is_heldout(document: int, share: float) -> bool:
    """Whether a document belongs to the held-out split: a fixed hash of its number, so no list needs keeping."""
    # splitmix64's finaliser: neighbouring numbers land far apart.
    z = (document + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return ((z ^ (z >> 31)) >> 11) / 2.0**53 < share


def are_heldout(documents: np.ndarray, share: float) -> np.ndarray:
    """``is_heldout`` of every number of an array."""
    with np.errstate(over="ignore"):
        z = (documents.astype(np.int64) + 1).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2.0**53 < share


BEGINNING = Cursor(0, 0)


def contexts(
    section: TextSection, tokenizer: Any, start: Cursor = BEGINNING, heldout: float | None = None
) -> Iterator[Context]:
    """Contexts of the text from ``start`` on.

    With ``heldout`` only the documents of that held-out share are read; without it all are, and the caller splits.
    """
    numbered = documents(section, start.document, lambda number: heldout is None or is_heldout(number, heldout))
    return packed(numbered, section, tokenizer, start.offset)


def packed(numbered: Iterable[tuple[int, str]], section: TextSection, tokenizer: Any, offset: int = 0) -> Iterator[Context]:
    """Contexts of numbered documents, of which the first is read from its token ``offset`` on."""
    bos_id = tokenizer.bos_token_id
    if section.bos != "none" and bos_id is None:
        raise ValueError(f"text.bos: expected a tokenizer with a BOS token for {section.bos!r}, got none. Set text.bos: none.")
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, bos_id) if i is not None), 0)
    tokenized = tokenize(numbered, tokenizer)
    return pack(
        tokenized, section.context_length, bos_id, section.bos, offset, pad_id if section.packing == "separate" else None
    )


def tokenize(numbered: Iterable[tuple[int, str]], tokenizer: Any) -> Iterator[tuple[int, list[int]]]:
    """Token ids of every document, no special tokens added."""
    iterator = iter(numbered)
    while batch := list(itertools.islice(iterator, TOKENIZE_AT_ONCE)):
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip((number for number, _ in batch), encoded, strict=True)


def documents(section: TextSection, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str]]:
    """Number and text of the wanted documents from number ``start`` on, in their fixed order.

    Raises:
        ValueError: If a file or data set cannot be had, or a line of it holds no text.
    """
    if section.source == "embedded":
        # Any document can be had without those before it.
        for number in filter(wanted, itertools.count(start)):
            yield number, corpus.embedded_document(section.seed, number).text
        return
    texts = _hub_documents(section) if section.source == "hub" else _all_files(section)
    for number, text in enumerate(texts):
        if number >= start and wanted(number):
            yield number, text


def _all_files(section: TextSection) -> Iterator[str]:
    for name in section.files:
        yield from _file_documents(Path(name), section)


def _file_documents(path: Path, section: TextSection) -> Iterator[str]:
    readers = {".txt": _txt_documents, ".jsonl": _jsonl_documents, ".parquet": _parquet_documents}
    if path.suffix not in readers:
        raise ValueError(f"text.files: expected {', '.join(readers)}, got {path}.")
    if not path.is_file():
        raise ValueError(f"text.files: {path} does not exist. Give an existing path, or set text.source: embedded.")
    for text in readers[path.suffix](path, section):
        if text.strip():
            yield text


def _txt_documents(path: Path, section: TextSection) -> Iterator[str]:
    pending = ""
    with path.open(encoding="utf-8") as handle:
        while chunk := handle.read(1 << 20):
            *whole, pending = (pending + chunk).split(section.separator)
            yield from whole
    yield pending


def _jsonl_documents(path: Path, section: TextSection) -> Iterator[str]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                text = json.loads(line)[section.column]
            except (json.JSONDecodeError, KeyError, TypeError, IndexError):
                raise ValueError(
                    f"{path}:{number}: expected a JSON object with the key {section.column!r}. Set text.column to the key "
                    "that holds the text."
                ) from None
            yield _require_text(text, f"{path}:{number}")


def _parquet_documents(path: Path, section: TextSection) -> Iterator[str]:
    yield from _rows_of(_load_dataset("parquet", data_files=str(path), split="train"), section.column, str(path))


def _hub_documents(section: TextSection) -> Iterator[str]:
    dataset = _load_dataset(
        section.dataset, section.dataset_config, split=section.dataset_split, revision=section.dataset_revision
    )
    yield from _rows_of(dataset, section.column, str(section.dataset))


def _load_dataset(*arguments: Any, **options: Any) -> Any:
    # Imported here: it takes a second, and the embedded corpus does without.
    import datasets

    try:
        return datasets.load_dataset(*arguments, streaming=True, **options)
    except Exception as error:  # noqa: BLE001
        # Whatever the hub client raises (offline, unknown id, no rights), the user needs the same two facts.
        raise ValueError(
            f"text.dataset: {arguments[0]!r} could not be had ({type(error).__name__}: {error}). Check the id and the "
            "connection, or set text.source: files, or embedded with model.id: embedded."
        ) from None


def _rows_of(dataset: Any, column: str, where: str) -> Iterator[str]:
    for number, row in enumerate(dataset):
        if column not in row:
            raise ValueError(f"text.column: expected one of {', '.join(row)} of {where}, got {column!r}.")
        yield _require_text(row[column], f"{where} row {number}")


def _require_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected text, got {type(text).__name__}. Set text.column to the key that holds the text.")
    return text


def pack(
    documents: Iterable[tuple[int, list[int]]],
    context_length: int,
    bos_id: int | None,
    bos: str,
    first_offset: int = 0,
    pad_id: int | None = None,
) -> Iterator[Context]:
    """Lay documents into contexts of ``context_length`` tokens; a last context that does not fill is dropped.

    With ``pad_id`` a context never holds two documents, and its rest is padded. ``first_offset`` tokens of the first
    document are skipped: they were in the context before.
    """
    row, number = _Row(context_length), 0
    for number, ids in documents:
        start, first_offset = first_offset, 0
        if pad_id is not None and row.tokens:
            yield row.close(Cursor(number, start), pad_id)
        if bos != "none" and len(row.tokens) < context_length and start == 0:
            row.add([bos_id], number, [-1])
        while start < len(ids):
            if len(row.tokens) == context_length:
                yield row.close(Cursor(number, start))
            if not row.tokens and (bos == "context" or (bos == "document" and start == 0)):
                row.add([bos_id], number, [-1])
            stop = min(len(ids), start + context_length - len(row.tokens))
            row.add(ids[start:stop], number, range(start, stop))
            start = stop
    if row.tokens and (pad_id is not None or len(row.tokens) == context_length):
        yield row.close(Cursor(number + 1, 0), pad_id)


class _Row:
    """The context being filled."""

    def __init__(self, length: int):
        self.length = length
        self.clear()

    def clear(self) -> None:
        self.tokens: list[int] = []
        self.owners: list[int] = []
        self.positions: list[int] = []

    def add(self, ids: Iterable[Any], owner: int, positions: Iterable[int]) -> None:
        before = len(self.tokens)
        self.tokens.extend(ids)
        self.owners.extend([owner] * (len(self.tokens) - before))
        self.positions.extend(positions)

    def close(self, cursor: Cursor, pad_id: int | None = None) -> Context:
        missing = self.length - len(self.tokens)
        if missing:
            self.add([pad_id] * missing, -1, [-1] * missing)
        full = Context(
            np.array(self.tokens, np.int32), np.array(self.owners, np.int32), np.array(self.positions, np.int32), cursor
        )
        self.clear()
        return full
