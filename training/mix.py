"""Interleaving of several texts by weight."""

from collections.abc import Callable, Iterator, Sequence

from .documents import SourceDocument
from .recipe import MixPart, TextSource

PartReader = Callable[[MixPart], Iterator[SourceDocument]]


def mixed_documents(parts: Sequence[MixPart], read: PartReader) -> Iterator[SourceDocument]:
    """Yield the documents of several texts in one fixed order, until the first of them ends.

    The next document is always of the text that has had the fewest characters for its weight so far, so the shares hold from
    the beginning on, up to a document.

    Raises:
        ValueError: If a text has no documents or cannot be read; the message names the part.
    """
    readers = [_documents_of(number, part, read) for number, part in enumerate(parts)]
    heads = [next(reader, None) for reader in readers]
    for number, head in enumerate(heads):
        if head is None:
            raise ValueError(f"text.mix.{number}: expected documents, got none. Give longer text, or leave this part out.")
    had = [0.0] * len(parts)
    while True:
        number = min(range(len(parts)), key=lambda each: had[each])
        head = heads[number]
        if head is None:
            return
        head.part = number
        yield head
        had[number] += head.size / parts[number].weight
        heads[number] = next(readers[number], None)


def _documents_of(number: int, part: MixPart, read: PartReader) -> Iterator[SourceDocument]:
    try:
        yield from (document for document in read(part) if document.strip())
    except ValueError as error:
        raise ValueError(str(error).replace("text.", f"text.mix.{number}.", 1)) from None


def part_names(parts: Sequence[TextSource]) -> list[str]:
    """Return a name for each part of a mix: its dataset, its files, or embedded."""
    names = [part.dataset or (", ".join(part.files) if part.source == "files" else part.source) for part in parts]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
