"""Division of a text into the units of a harvest, and of the units among ranks.

Which tokens a unit keeps is known without the model, so its end is too. Every rank reads the text of its own unit, tells the
next rank where it ended, and only then runs the model: the text is tokenized once, by one rank after the other, while the
others run the model.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ...sae.ranks import Ranks
from ..recipe import HarvestSection
from ..text import Cursor
from ..watch import Watch
from .contexts import ContextBatch, ContextReader
from .store_writer import UnitRecord


class Turn(NamedTuple):
    """Place where a unit begins, as every rank tells the next.

    ``kept`` counts the tokens that earlier units keep. ``told`` is 0 as long as there is more to harvest, then the number of
    ranks that know the end.
    """

    unit: int
    document: int
    offset: int
    kept: int
    text_ended: int = 0
    told: int = 0

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.document, self.offset)


class Unit:
    """Batches of one unit. ``end`` and ``kept`` grow as the batches are read, once. A ``stored`` unit has none."""

    def __init__(self, turn: Turn, reader: ContextReader, section: HarvestSection, target: int):
        self.turn, self.end, self.kept = turn, turn.cursor, 0
        self.text_ended = self.stored = False
        self.batches = self._read(reader, min(section.shard_tokens, target - turn.kept))

    def _read(self, reader: ContextReader, tokens: int) -> Iterator[ContextBatch]:
        for batch in reader.batches(self.turn.cursor):
            self.end = batch.cursor
            self.kept += int(batch.kept.sum())
            yield batch
            if self.kept >= tokens:
                return
        self.text_ended = True

    def read(self, watch: Watch) -> None:
        """Read all batches and keep them."""
        batches = []
        for batch in self.batches:
            watch.beat(f"reading the text of unit {self.turn.unit}")
            batches.append(batch)
        self.batches = iter(batches)

    def after(self, target: int) -> Turn:
        """Return the place behind the unit."""
        kept = self.turn.kept + self.kept
        over = self.text_ended or kept >= target
        return Turn(self.turn.unit + (self.kept > 0), *self.end, kept, int(self.text_ended), int(over))


class UnitQueue:
    """The units of a text in order; every rank has each ``ranks.size``-th.

    Args:
        complete: Records of units that an earlier harvest stored; they are left out.
    """

    def __init__(
        self,
        reader: ContextReader,
        section: HarvestSection,
        ranks: Ranks,
        watch: Watch,
        complete: Mapping[int, UnitRecord] | None = None,
    ):
        self.reader, self.section, self.ranks, self.complete = reader, section, ranks, complete or {}
        self.watch = watch
        self.end = Turn(0, 0, 0, 0)

    @property
    def text_ended(self) -> bool:
        """True if the last unit read is the last of the text."""
        return bool(self.end.text_ended)

    def own(self, turn: Turn, target: int) -> Iterator[Unit]:
        """Yield this rank's units from a place on, until ``target`` tokens are kept or the text ends; sets ``end``.

        If this rank is alone, a unit's batches are read while they are used.
        """
        ranks = self.ranks
        if turn.unit % ranks.size != ranks.rank:
            turn = self._next()
        while not turn.told:
            unit = self._unit(turn, target)
            if ranks.size == 1:
                yield unit
                turn = unit.after(target)
                continue
            unit.read(self.watch)
            turn = unit.after(target)
            ranks.pass_on(turn)
            yield unit
            if not turn.told:
                turn = self._next()
        self.end = turn

    def _next(self) -> Turn:
        """Wait for the previous rank, and tell the next one of the end if it does not know."""
        turn = Turn(*self.watch.wait(lambda: self.ranks.passed_on(len(Turn._fields))))
        if 0 < turn.told < self.ranks.size - 1:
            self.ranks.pass_on(turn._replace(told=turn.told + 1))
        return turn

    def _unit(self, turn: Turn, target: int) -> Unit:
        unit, known = Unit(turn, self.reader, self.section, target), self.complete.get(turn.unit)
        if known is not None and known.start == list(turn.cursor):
            unit.end, unit.kept, unit.batches, unit.stored = Cursor(*known.end), known.kept, iter(()), True
        return unit
