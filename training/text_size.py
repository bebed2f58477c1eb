"""Size of a text, measured before a run: its documents, training tokens and held-out tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations.contexts import stack_contexts
from .activations.exclusions import Exclusions
from .recipe import HarvestSection, TextSection
from .text import are_heldout, documents, is_heldout, packed
from .text_files import COMPRESSIONS, listed_files

# A longer text is read up to here, which takes a second or two, and the rest is estimated.
MEASURED_CHARACTERS = 2_000_000
# A Hugging Face dataset is streamed over the network: one document shows that it exists and has text.
HUB_CHARACTERS = 1


@dataclass(frozen=True)
class TextSize:
    """Number of documents of a text, and of tokens in them to train and to evaluate on.

    ``share`` is the fraction of the text that was read: 1 for all, which makes the numbers exact; ``None`` if the length of the
    rest is unknown. The numbers are those of the part that was read.
    """

    documents: int
    heldout_documents: int
    train: int
    heldout: int
    share: float | None

    @property
    def whole(self) -> bool:
        return self.share == 1.0

    def estimate(self, tokens: int) -> int | None:
        """Extrapolate a number of tokens from the part that was read to the whole text; ``None`` if its length is unknown."""
        return None if self.share is None else round(tokens / self.share)

    def words(self) -> str:
        """Return the size as text for display."""
        if self.share is None:
            return "length unknown"
        about = "" if self.whole else "about "
        figures = [self.estimate(figure) for figure in (self.documents, self.train, self.heldout)]
        return f"{about}{figures[0]:,} documents: {figures[1]:,} tokens to train on, {figures[2]:,} held out"


def measure_text(text: TextSection, tokenizer: Any, section: HarvestSection) -> TextSize:
    """Read a text, or the beginning of a long one, and count its documents and tokens.

    Args:
        section: Tokens that it excludes are not counted, and documents that it holds out are counted separately.

    Raises:
        ValueError: If the text cannot be loaded, or a line of the part that was read holds no text.
    """
    read: list[tuple[int, str]] = []
    left = HUB_CHARACTERS if text.source == "hub" else MEASURED_CHARACTERS
    whole = True
    for number, words in documents(text, 0, lambda number: True):
        # Only text can be cut.
        read.append((number, words if getattr(words, "kind", "text") != "text" else words[:left]))
        left -= len(words)
        if left <= 0:
            whole = False
            break
    heldout = [document for document in read if is_heldout(document[0], section.heldout)]
    train, _ = _kept(read, text, tokenizer, section)
    # Packed without the other documents, as evaluations read them.
    _, judged = _kept(heldout, text, tokenizer, section)
    return TextSize(len(read), len(heldout), train, judged, 1.0 if whole else _share(read, text))


def _kept(numbered: Iterable[tuple[int, str]], text: TextSection, tokenizer: Any, section: HarvestSection) -> tuple[int, int]:
    """Return the number of tokens that are not excluded, in training documents and in held-out ones."""
    exclusions, found = Exclusions(tokenizer, text, section), np.zeros(2, dtype=np.int64)
    for context in packed(numbered, text, tokenizer):
        batch = stack_contexts([context], exclusions)
        heldout = are_heldout(batch.document_ids, section.heldout)
        found += [(batch.kept & ~heldout).sum(), (batch.kept & heldout).sum()]
    return int(found[0]), int(found[1])


def _share(read: list[tuple[int, str]], text: TextSection) -> float | None:
    """Return the fraction of the files that was read, too small if they hold more than text; ``None`` if it is unknown."""
    if text.source != "files":
        return None
    files = listed_files(text)
    if any(path.suffix in COMPRESSIONS for path in files):
        return None
    size = sum(path.stat().st_size for path in files)
    return min(0.999, sum(len(words.encode()) + len(text.separator) for _, words in read) / max(size, 1))
