"""Rows that cannot be used, of texts and of activations: left out and counted, or an error above a share."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .recipe import HarvestSection, TextSection

# Below as many rows a share says little: so many bad ones as it allows of these always pass.
LEAST_TEXTS, LEAST_TOKENS = 100, 20_000
NOT_FINITE = "tokens whose activations are not finite"
NOT_UTF8 = "texts with bytes that are not UTF-8, read as U+FFFD"
HALF_PAIR = "texts with half a surrogate pair, read as U+FFFD"
_HALVES, _BYTES = re.compile("[\ud800-\udfff]"), re.compile("[\udc80-\udcff]")

log = logging.getLogger(__name__)


class BadRows:
    """Rows of one source, and how many of them are bad.

    Args:
        section: The recipe's section that says what is to become of bad rows.
        key: Its name, for messages.
        least: The number of rows of which the largest share is always allowed.
    """

    def __init__(self, section: TextSection | HarvestSection, key: str, least: int):
        self.section, self.key, self.least = section, key, least
        self.rows = self.bad = 0
        self.first: tuple[str, str] | None = None

    def count(self, rows: int, bad: int = 0, where: str = "", remedy: str = "") -> None:
        """Take in some rows, of which ``bad`` are bad.

        Args:
            where: The place of a bad one, and what is wrong there.
            remedy: What helps, as sentences.

        Raises:
            ValueError: If more are bad than the recipe allows; it names the first place.
        """
        self.rows, self.bad = self.rows + rows, self.bad + bad
        if not bad:
            return
        if self.first is None:
            self.first = where, remedy
            if self.section.on_bad_row == "skip":
                log.warning("%s. Left out or mended, as others like it will be; the number is told at the end.", where)
        if self.bad > self._limit * max(self.rows, self.least):
            self.refuse()

    @property
    def _limit(self) -> float:
        return self.section.max_bad_share if self.section.on_bad_row == "skip" else 0.0

    def refuse(self) -> None:
        """Raise the ``ValueError`` for the first bad row, if there is one."""
        if self.first is None:
            return
        where, remedy = self.first
        if self.section.on_bad_row == "skip":
            share = f"{self.bad:,} of {self.rows:,} rows are bad, above {self.key}.max_bad_share = {self._limit:g}. "
        else:
            share, remedy = "", f"{remedy} Or set {self.key}.on_bad_row: skip, which leaves such rows out and counts them."
        raise ValueError(f"{where}. {share}{remedy}")


class BadTexts(BadRows):
    """Bad rows of a text, by the number of documents before them. Reading may begin anew: each row is counted once."""

    def __init__(self, section: TextSection):
        super().__init__(section, "text", LEAST_TEXTS)
        self.documents = 0
        self._places: list[tuple[int, str]] = []
        self._row = self._left_out = 0

    def begin(self) -> None:
        """Reading begins, or begins again, with the first row."""
        self.documents = self._row = 0

    def good(self) -> None:
        """Count a row that can be read, or that is empty."""
        self._row += 1
        if self._row > self.rows:
            self.count(1)

    def skip(self, what: str, where: str, remedy: str, left_out: bool = True) -> None:
        """Count a row that is left out, or mended; ``what`` are such rows."""
        self._row += 1
        if self._row > self.rows:
            self._places.append((self.documents, what))
            self._left_out += left_out
            self.count(1, 1, where, remedy)

    def end(self) -> None:
        """Reading is at the end: raise ``ValueError`` if no row was of use."""
        if self._left_out == self.rows:
            self.refuse()

    def clean(self, text: str, where: str) -> str:
        """Return a text in which halves of surrogate pairs, and bytes that were read as such, are U+FFFD."""
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
        """Count the bad rows before a document; without one, all that were met."""
        return Counter(what for before, what in self._places if document is None or before <= document)


class BadTokens(BadRows):
    """Tokens whose activations cannot be used, because one of them is not finite, or above what can be stored.

    Args:
        largest: The largest absolute value that is of use; ``None``: all that are finite.
    """

    def __init__(self, section: HarvestSection, largest: float | None = None):
        super().__init__(section, "harvest", LEAST_TOKENS)
        self.largest = torch.finfo(torch.float32).max if largest is None else largest

    @property
    def found(self) -> Counter[str]:
        """The number that was left out, as it is counted in stores and states."""
        return +Counter({NOT_FINITE: self.bad})

    def usable(self, tensors: Iterable[Tensor]) -> Tensor | None:
        """Return which rows of tensors of the same tokens are of use; ``None`` if all are."""
        bad = None
        for rows in tensors:
            # Numpy's functions, not torch's: these run in a background thread, beside a model that needs the cores. NaN is
            # the largest of whatever it is among, and larger than nothing.
            values = rows.numpy()
            if not values.size or max(values.max(), -values.min()) <= self.largest:
                continue
            here = ~(rows.abs() <= self.largest).all(-1)
            bad = here if bad is None else bad | here
        return None if bad is None else ~bad


def counted(found: Mapping[str, int]) -> str:
    """Return counts in words, the largest first."""
    return "; ".join(f"{what}: {count:,}" for what, count in sorted(found.items(), key=lambda item: (-item[1], item[0])))
