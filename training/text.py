"""Text loading: documents of the embedded corpus, files, Hugging Face datasets or a mix, tokenized and packed into contexts.

Documents are numbered in reading order. The number alone decides whether a document is held out, so the same text is always
split the same way.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .bad_rows import BadTexts
from .chats import NO_ROLE
from .documents import SourceDocument
from .embedded import corpus
from .mix import mixed_documents
from .recipe import TextSection, TextSource
from .text_files import file_documents, hub_documents
from .tokens import TOKENIZE_AT_ONCE, Tokenization, beginning_roles, padding_id


class Cursor(NamedTuple):
    """A position in the text: the next document, and the number of its tokens already read."""

    document: int
    offset: int


@dataclass(frozen=True)
class Context:
    """One input of the language model, with the document and position of every token.

    BOS belongs to the document that follows it, at position -1. Padding has document -1 and position -1. ``cursor`` is the
    start of the next context. ``roles`` numbers the tokens' roles in ``ROLES``, ``NO_ROLE`` outside of chats; None without any.
    """

    token_ids: np.ndarray  # (context_length,) int32
    document_ids: np.ndarray  # (context_length,) int32
    positions: np.ndarray  # (context_length,) int32
    cursor: Cursor
    roles: np.ndarray | None = None  # (context_length,) int8


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
    tokenized = Tokenization(section, tokenizer).of(numbered, at_once)
    return pack(
        tokenized, section.context_length, bos_id, section.bos, offset, pad_id if section.packing == "separate" else None
    )


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
    texts = (
        mixed_documents(section.mix, lambda part: _sources_documents(part, bad))
        if section.source == "mix"
        else _sources_documents(section, bad)
    )
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


def _sources_documents(section: TextSource, bad: BadTexts) -> Iterator[SourceDocument]:
    """Yield the documents of one source."""
    match section.source:
        case "embedded":
            return (SourceDocument(corpus.embedded_document(section.seed, number).text) for number in itertools.count())
        case "hub":
            return hub_documents(section, bad)
        case _:
            return file_documents(section, bad)


def pack(
    documents: Iterable[tuple[int, Sequence[int]]],
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
        if not ids:
            continue
        roles, of_bos = getattr(ids, "roles", None), beginning_roles(ids)
        if pad_id is not None and row.tokens:
            yield row.close(Cursor(number, start), pad_id)
        if bos != "none" and len(row.tokens) < context_length and start == 0:
            row.add([bos_id], number, [-1], of_bos)
        while start < len(ids):
            if len(row.tokens) == context_length:
                yield row.close(Cursor(number, start))
            if not row.tokens and (bos == "context" or (bos == "document" and start == 0)):
                row.add([bos_id], number, [-1], of_bos)
            stop = min(len(ids), start + context_length - len(row.tokens))
            row.add(ids[start:stop], number, range(start, stop), roles and roles[start:stop])
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
        self.roles: list[int] = []
        self.has_roles = False

    def add(self, ids: Iterable[Any], owner: int, positions: Iterable[int], roles: Sequence[int] | None = None) -> None:
        before = len(self.tokens)
        self.tokens.extend(ids)
        added = len(self.tokens) - before
        self.owners.extend([owner] * added)
        self.positions.extend(positions)
        self.roles.extend([NO_ROLE] * added if roles is None else roles)
        self.has_roles |= roles is not None

    def close(self, cursor: Cursor, pad_id: int | None = None) -> Context:
        missing = self.length - len(self.tokens)
        if missing:
            self.add([pad_id] * missing, -1, [-1] * missing)
        full = Context(
            np.array(self.tokens, np.int32),
            np.array(self.owners, np.int32),
            np.array(self.positions, np.int32),
            cursor,
            np.array(self.roles, np.int8) if self.has_roles else None,
        )
        self.clear()
        return full
