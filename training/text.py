"""Text loading: documents of the embedded corpus, files or Hugging Face datasets, tokenized and packed into contexts.

Documents are numbered in reading order. The number alone decides whether a document is held out, so the same text is always
split the same way.
"""

import codecs
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from .bad_rows import BadTexts
from .embedded import corpus
from .recipe import TextSection

TOKENIZE_AT_ONCE = 256

Reader = Callable[[Path, TextSection, BadTexts], Iterator[str]]


class Cursor(NamedTuple):
    """A position in the text: the next document, and the number of its tokens already read."""

    document: int
    offset: int


@dataclass(frozen=True)
class Context:
    """One input of the language model, with the document and position of every token.

    BOS belongs to the document that follows it, at position -1. Padding has document -1 and position -1. ``cursor`` is the
    start of the next context.
    """

    token_ids: np.ndarray  # (context_length,) int32
    document_ids: np.ndarray  # (context_length,) int32
    positions: np.ndarray  # (context_length,) int32
    cursor: Cursor


def is_heldout(document: int, share: float) -> bool:
    """Return True if a document is held out, by a fixed hash of its number, so that no list must be stored."""
    # Finalizer of splitmix64: neighboring numbers get unrelated hashes.
    z = (document + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return ((z ^ (z >> 31)) >> 11) / 2.0**53 < share


def are_heldout(documents: np.ndarray, share: float) -> np.ndarray:
    """Return ``is_heldout`` of every number in an array."""
    with np.errstate(over="ignore"):
        z = (documents.astype(np.int64) + 1).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2.0**53 < share


BEGINNING = Cursor(0, 0)


def contexts(
    section: TextSection,
    tokenizer: Any,
    start: Cursor = BEGINNING,
    heldout: float | None = None,
    bad: BadTexts | None = None,
    reading: Callable[[int, str], None] | None = None,
) -> Iterator[Context]:
    """Yield the contexts of a text from ``start`` on.

    Args:
        heldout: Share of documents held out; only these are read. ``None`` reads all documents, and the caller splits them.
        bad: Counter of rows that cannot be read.
        reading: As in ``documents``.
    """

    def wanted(number: int) -> bool:
        return heldout is None or is_heldout(number, heldout)

    numbered = documents(section, start.document, wanted, bad, reading)
    return packed(numbered, section, tokenizer, start.offset)


def packed(
    numbered: Iterable[tuple[int, str]],
    section: TextSection,
    tokenizer: Any,
    offset: int = 0,
    at_once: int = TOKENIZE_AT_ONCE,
) -> Iterator[Context]:
    """Yield the contexts of numbered documents, without the first ``offset`` tokens of the first document.

    Args:
        at_once: Documents tokenized together, and so read ahead.
    """
    bos_id = tokenizer.bos_token_id
    if section.bos != "none" and bos_id is None:
        raise ValueError(f"text.bos: expected a tokenizer with a BOS token for {section.bos!r}, got none. Set text.bos: none.")
    pad_id = padding_id(tokenizer)
    tokenized = tokenize(numbered, tokenizer, at_once)
    return pack(
        tokenized, section.context_length, bos_id, section.bos, offset, pad_id if section.packing == "separate" else None
    )


def padding_id(tokenizer: Any) -> int:
    """Return the token id that pads incomplete contexts."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return next((token for token in known if token is not None), 0)


def tokenize(
    numbered: Iterable[tuple[int, str]], tokenizer: Any, at_once: int = TOKENIZE_AT_ONCE
) -> Iterator[tuple[int, list[int]]]:
    """Yield the token ids of every document, without special tokens."""
    iterator = iter(numbered)
    while batch := list(itertools.islice(iterator, at_once)):
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip((number for number, _ in batch), encoded, strict=True)


def documents(
    section: TextSection,
    start: int,
    wanted: Callable[[int], bool],
    bad: BadTexts | None = None,
    reading: Callable[[int, str], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield number and text of the wanted documents from number ``start`` on, in a fixed order.

    Rows without text, blank or bad, are not numbered, so leaving them out does not change the other numbers.

    Args:
        wanted: Returns True for the document numbers to yield.
        bad: Counter of rows that cannot be read.
        reading: Called with every document that is read; for files and datasets, also with those that are skipped.

    Raises:
        ValueError: If a file or dataset cannot be loaded, or more of its rows are unreadable than ``section`` allows.
    """
    if section.source == "embedded":
        # Documents are generated independently of those before them.
        for number in filter(wanted, itertools.count(start)):
            yield number, corpus.embedded_document(section.seed, number).text
        return
    bad = BadTexts(section) if bad is None else bad
    bad.begin()
    texts = _hub_documents(section, bad) if section.source == "hub" else _all_files(section, bad)
    for number, text in enumerate(text for text in texts if text.strip()):
        bad.documents = number + 1
        if reading is not None:
            reading(number, text)
        if number >= start and wanted(number):
            yield number, text
    bad.end()


class Documents:
    """Documents of a text, read in one pass that can skip ahead, and go back to the last place it was asked for.

    Args:
        start: Number of the first document.
        bad, reading: As in ``documents``.
    """

    def __init__(
        self,
        section: TextSection,
        start: int,
        bad: BadTexts | None = None,
        reading: Callable[[int, str], None] | None = None,
    ):
        self.section = section
        self._rest = documents(section, start, lambda _: True, bad, reading)
        # Texts from number `_first` on that were read already.
        self._first, self._held = start, list[str]()

    def forget(self, number: int) -> None:
        """Skip the documents before a number; they cannot be read again."""
        if self.section.source == "embedded":
            return
        gone = min(number - self._first, len(self._held))
        del self._held[:gone]
        self._first += gone
        while self._first < number and next(self._rest, None) is not None:
            self._first += 1

    def since(self, number: int) -> Iterator[tuple[int, str]]:
        """Yield number and text of the documents from a number on, which is not before the last one given to ``forget``."""
        if self.section.source == "embedded":
            # Each is generated by itself: skipped ones cost nothing.
            yield from documents(self.section, number, lambda _: True)
        while True:
            while number >= self._first + len(self._held):
                if (found := next(self._rest, None)) is None:
                    return
                self._held.append(found[1])
            yield number, self._held[number - self._first]
            number += 1


def require_text(section: TextSection) -> None:
    """Read the first document of a text, so that a text that cannot be loaded is reported before anything slow is done.

    Raises:
        ValueError: If a file or dataset cannot be loaded.
    """
    if section.source != "embedded":
        next(documents(section, 0, lambda _: True), None)


def _all_files(section: TextSection, bad: BadTexts) -> Iterator[str]:
    readers = {".txt": _txt_documents, ".jsonl": _jsonl_documents, ".parquet": _parquet_documents}
    # All files before the first is read: reading may take hours.
    for path in map(Path, section.files):
        if path.suffix not in readers:
            raise ValueError(f"text.files: expected {', '.join(readers)}, got {path}.")
        if not path.is_file():
            raise ValueError(f"text.files: {path} does not exist. Give an existing path, or set text.source: embedded.")
    for path in map(Path, section.files):
        yield from _file_documents(path, section, bad, readers)


def _file_documents(path: Path, section: TextSection, bad: BadTexts, readers: Mapping[str, Reader]) -> Iterator[str]:
    try:
        yield from readers[path.suffix](path, section, bad)
    except OSError as error:
        raise ValueError(f"text.files: {path} could not be read ({error.strerror or error}).") from None


def _opened(path: Path) -> TextIO:
    """Open a text file in the encoding of its byte-order mark, else as UTF-8, where other bytes become surrogates."""
    with path.open("rb") as handle:
        head = handle.read(4)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return path.open(encoding="utf-32", errors="replace")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return path.open(encoding="utf-16", errors="replace")
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def _txt_documents(path: Path, section: TextSection, bad: BadTexts) -> Iterator[str]:
    pending, line, lines = "", 1, section.separator.count("\n")
    with _opened(path) as handle:
        while chunk := handle.read(1 << 20):
            *whole, pending = (pending + chunk).split(section.separator)
            for text in whole:
                yield bad.clean(text, f"{path}:{line}")
                line += text.count("\n") + lines
    yield bad.clean(pending, f"{path}:{line}")


def _jsonl_documents(path: Path, section: TextSection, bad: BadTexts) -> Iterator[str]:
    with _opened(path) as handle:
        for number, line in enumerate(handle, start=1):
            # Blank lines are common in concatenated files.
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and section.column in row:
                yield from _texts(row[section.column], f"{path}:{number}", bad)
            else:
                what = f"lines that are no JSON object with the key {section.column!r}"
                where = f"{path}:{number}: expected a JSON object with the key {section.column!r}"
                bad.skip(what, where, "Set text.column to the key that holds the text.")


def _parquet_documents(path: Path, section: TextSection, bad: BadTexts) -> Iterator[str]:
    # Imported lazily: it is slow, and other files do not need it. `datasets` is not used, because it decodes every column and
    # stops at the first row that is not UTF-8.
    import pyarrow as pa
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if section.column not in file.schema_arrow.names:
                raise _no_column(section, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=[section.column]):
                values = batch.column(0)
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                    # As bytes, so that a value that is not UTF-8 affects its own row only.
                    values = values.cast(pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary())
                for value in values.to_pylist():
                    yield from _texts(value, f"{path}: row {row}", bad)
                    row += 1
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: row {row}: expected a parquet file, got a damaged one ({reason}). Get the file again; what was harvested "
            "is kept."
        ) from None


def _hub_documents(section: TextSection, bad: BadTexts) -> Iterator[str]:
    dataset = _load_dataset(
        section.dataset, section.dataset_config, split=section.dataset_split, revision=section.dataset_revision
    )
    rows, number = iter(dataset), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # noqa: BLE001
            # Broken connections and damaged datasets raise different errors in every library involved.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"{section.dataset}: row {number} could not be read ({reason}). What was harvested or saved is kept; the same "
                "command continues."
            ) from None
        if row is None:
            return
        if section.column not in row:
            raise _no_column(section, row, str(section.dataset))
        yield from _texts(row[section.column], f"{section.dataset}: row {number}", bad)
        number += 1


def _load_dataset(*arguments: Any, **options: Any) -> Any:
    # Imported lazily: it takes a second, and the embedded corpus does not need it.
    import datasets

    try:
        # A dataset's own code would run here; no version of `datasets` may do that.
        return datasets.load_dataset(*arguments, streaming=True, trust_remote_code=False, **options)
    except Exception as error:  # noqa: BLE001
        # Whatever the Hub client raises (offline, unknown id, no access), the remedy is the same.
        raise ValueError(
            f"text.dataset: {arguments[0]!r} could not be downloaded from the Hugging Face Hub ({type(error).__name__}: "
            f"{error}). Check the id and the "
            "connection, or set text.source: files, or embedded with model.id: embedded."
        ) from None


def _no_column(section: TextSection, columns: Iterable[str], where: str) -> ValueError:
    return ValueError(f"text.column: expected one of {', '.join(columns)} of {where}, got {section.column!r}.")


def _texts(value: Any, where: str, bad: BadTexts) -> Iterator[str]:
    """Yield the text of a row's value, or nothing if it holds none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "surrogateescape")
    if isinstance(value, str):
        yield bad.clean(value, where)
        return
    found = "null" if value is None else type(value).__name__
    remedy = "Set text.column to the key that holds the text."
    bad.skip(f"rows with {found} in place of text", f"{where}: expected text, got {found}", remedy)


def pack(
    documents: Iterable[tuple[int, list[int]]],
    context_length: int,
    bos_id: int | None,
    bos: str,
    first_offset: int = 0,
    pad_id: int | None = None,
) -> Iterator[Context]:
    """Yield contexts of ``context_length`` tokens made of documents; an incomplete last context is dropped.

    Args:
        first_offset: Number of tokens of the first document to skip, because they were in the previous context.
        pad_id: Give every document contexts of its own, padded with this id; ``None`` packs documents end to end.
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
