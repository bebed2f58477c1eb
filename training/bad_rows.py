"""Counters of unusable rows (documents, tokens). They are skipped and counted, or raise an error above a maximum share."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .recipe import HarvestSection, TextSection

# The share is computed over at least this many rows, so that a few early bad rows do not stop a run.
LEAST_TEXTS, LEAST_TOKENS = 100, 20_000
NOT_FINITE = "tokens whose activations are not finite"
NOT_UTF8 = "texts with bytes that are not UTF-8, read as U+FFFD"
HALF_PAIR = "texts with half a surrogate pair, read as U+FFFD"
_HALVES, _BYTES = re.compile("[\ud800-\udfff]"), re.compile("[\udc80-\udcff]")

log = logging.getLogger(__name__)


class BadRows:
    """Counter of the rows of one source and of the bad ones among them.

    Args:
        section: Recipe section with ``on_bad_row`` and ``max_bad_share``.
        key: Name of that section, for error messages.
        least: Smallest number of rows that the share is computed over.
    """

    def __init__(self, section: TextSection | HarvestSection, key: str, least: int):
        self.section, self.key, self.least = section, key, least
        self.rows = self.bad = 0
        self.first: tuple[str, str] | None = None

    def count(self, rows: int, bad: int = 0, where: str = "", remedy: str = "") -> None:
        """Count rows, ``bad`` of them bad.

        Args:
            where: Location of a bad row, and what is wrong with it.
            remedy: Suggested fix, in full sentences.

        Raises:
            ValueError: If there are more bad rows than the recipe allows. The message names the first one.
        """
        self.rows, self.bad = self.rows + rows, self.bad + bad
        if not bad:
            return
        if self.first is None:
            self.first = where, remedy
            if self.section.on_bad_row == "skip":
                log.warning("%s. Excluded or repaired, like further ones; their number is logged at the end.", where)
        if self.bad > self._limit * max(self.rows, self.least):
            self.refuse()

    @property
    def _limit(self) -> float:
        return self.section.max_bad_share if self.section.on_bad_row == "skip" else 0.0

    def refuse(self) -> None:
        """Raise ``ValueError`` for the first bad row, if there is one."""
        if self.first is None:
            return
        where, remedy = self.first
        if self.section.on_bad_row == "skip":
            share = f"{self.bad:,} of {self.rows:,} rows are bad, above {self.key}.max_bad_share = {self._limit:g}. "
        else:
            share, remedy = "", f"{remedy} Or set {self.key}.on_bad_row: skip, which excludes such rows and counts them."
        raise ValueError(f"{where}. {share}{remedy}")


class BadTexts(BadRows):
    """Counter of a text's bad rows, with the number of documents before each. Rows that are read again count once."""

    def __init__(self, section: TextSection):
        super().__init__(section, "text", LEAST_TEXTS)
        self.documents = 0
        self._places: list[tuple[int, str]] = []
        self._row = self._left_out = 0

    def begin(self) -> None:
        """Reset the position to the first row, before every pass over the text."""
        self.documents = self._row = 0

    def good(self) -> None:
        """Count a row that is readable or empty."""
        self._row += 1
        if self._row > self.rows:
            self.count(1)

    def skip(self, what: str, where: str, remedy: str, left_out: bool = True) -> None:
        """Count a row that is left out or repaired; ``what`` names the kind of defect."""
        self._row += 1
        if self._row > self.rows:
            self._places.append((self.documents, what))
            self._left_out += left_out
            self.count(1, 1, where, remedy)

    def end(self) -> None:
        """Finish a pass: raise ``ValueError`` if every row was left out."""
        if self._left_out == self.rows:
            self.refuse()

    def clean(self, text: str, where: str) -> str:
        """Return the text with lone surrogates, which also encode undecodable bytes, replaced by U+FFFD; count the row."""
        if text.isascii() or not _HALVES.search(text):
            self.good()
            return text
        if _BYTES.search(text):
            remedy = "Save the file as UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)."
            self.skip(NOT_UTF8, f"{where}: expected UTF-8, got other bytes", remedy, left_out=False)
        else:
            remedy = "Write such characters whole, or leave them out."
            self.skip(HALF_PAIR, f"{where}: expected text, got half a surrogate pair in it", remedy, left_out=False)
        return _HALVES.sub("\ufffd", text)

    def until(self, document: int | None) -> Counter[str]:
        """Return the number of bad rows of each kind before a document; ``None`` counts all rows read so far."""
        return Counter(what for before, what in self._places if document is None or before <= document)


class BadTokens(BadRows):
    """Counter of tokens with an activation that is not finite, or too large to store.

    Args:
        largest: Largest absolute value to accept; ``None`` accepts all finite ones.
    """

    def __init__(self, section: HarvestSection, largest: float | None = None):
        super().__init__(section, "harvest", LEAST_TOKENS)
        self.largest = torch.finfo(torch.float32).max if largest is None else largest

    @property
    def found(self) -> Counter[str]:
        """Number of tokens left out, in the form that stores and states record."""
        return +Counter({NOT_FINITE: self.bad})

    def usable(self, tensors: Iterable[Tensor]) -> Tensor | None:
        """Return a mask of the usable rows of tensors that hold the same tokens; ``None`` if all are usable."""
        bad = None
        for rows in tensors:
            # NumPy, not torch: this runs in a background thread while the model needs the cores. A maximum over NaN is NaN,
            # and every comparison with NaN is False.
            values = rows.numpy()
            if not values.size or max(values.max(), -values.min()) <= self.largest:
                continue
            here = ~(rows.abs() <= self.largest).all(-1)
            bad = here if bad is None else bad | here
        return None if bad is None else ~bad


def counted(found: Mapping[str, int]) -> str:
    """Return counts as text, largest first."""
    return "; ".join(f"{what}: {count:,}" for what, count in sorted(found.items(), key=lambda item: (-item[1], item[0])))
