"""Stream of activations computed on the fly, without a store, and shuffled within buffers.

Ranks divide the contexts of every buffer among them, and send each other the rows of their parts of a batch.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sae.metrics import Moments
from ...sae.ranks import ALONE, Ranks
from ..bad_rows import NOT_FINITE, BadTexts, BadTokens
from ..content import Content, TextDigest
from ..processes import ONE_PROCESS, Mesh
from ..recipe import HarvestSection, TextSection
from ..text import BEGINNING, Cursor, are_heldout
from .contexts import ContextBatch, context_batches, own_contexts
from .harvested_rows import BadCount, HarvestedRows, counts_of_all, rows_of, without_bad
from .model import LanguageModel
from .routes import routes
from .shuffle import permute
from .stream import WHOLE, ActivationBatch, ActivationStream, BatchPart, ReadAhead, side_by_side


class Buffers:
    """Buffers of training tokens computed on the fly, with the activations at every hook that any stream reads.

    Streams that read the text in step share the work: the last ``keep`` buffers are kept for those that lag. The
    contents of a buffer depend only on where it begins. ``text_tokens`` is the number of training tokens in the text, 0 until
    it has been read from beginning to end. Of several ranks, each reads the whole text and runs the model on an equal part of
    a buffer's contexts; its buffer has the rows of these only.
    """

    def __init__(
        self,
        model: LanguageModel,
        text: TextSection,
        section: HarvestSection,
        hooks: tuple[str, ...],
        keep: int = 1,
        ranks: Ranks = ALONE,
    ):
        self.model, self.text, self.section, self.hooks, self.ranks = model, text, section, hooks, ranks
        self.keep = keep
        self.digest = TextDigest(text)
        self._model_content: Content | None = None
        self.texts = BadTexts(text)
        self.text_tokens = 0
        self._kept: dict[Cursor, tuple[HarvestedRows, Cursor]] = {}
        self._making = self._from(BEGINNING)
        self._stands_at: Cursor | None = BEGINNING
        self._lock = threading.Lock()

    def content_up_to(self, cursor: Cursor, digest: TextDigest | None = None) -> Content:
        """Return the content of the model, and of the text up to ``cursor``."""
        if self._model_content is None:
            self._model_content = self.model.content()
        return self._model_content | {"text": (digest or self.digest).up_to(cursor)}

    def after(self, cursor: Cursor) -> tuple[HarvestedRows, Cursor]:
        """Return the buffer that begins at ``cursor``, and the cursor after it."""
        # A thread that needs a buffer being computed waits for it.
        with self._lock:
            if cursor not in self._kept:
                while len(self._kept) >= self.keep:
                    self._kept.pop(next(iter(self._kept)))
                # Continuing costs nothing, but seeking may require reading the text up to the cursor.
                if cursor != self._stands_at:
                    self._making = self._from(cursor)
                # If this fails, the next call must try again and raise too.
                self._stands_at = None
                self._kept[cursor] = next(self._making)
                self._stands_at = self._kept[cursor][1]
            return self._kept[cursor]

    def _from(self, cursor: Cursor) -> Iterator[tuple[HarvestedRows, Cursor]]:
        """Yield buffers from a cursor on, endlessly."""
        pieces: list[ContextBatch] = []
        tokens = 0
        while True:
            found = 0
            for batch in context_batches(
                self.model,
                self.text,
                self.section,
                self.section.batch_contexts,
                cursor,
                bad=self.texts,
                reading=self.digest.add,
            ):
                here = int((batch.kept & ~are_heldout(batch.document_ids, self.section.heldout)).sum())
                pieces.append(batch)
                tokens, found = tokens + here, found + here
                if tokens >= self.section.live_buffer_tokens:
                    yield HarvestedRows.join([rows["train"] for rows in self.rows_of(pieces)]), batch.cursor
                    pieces, tokens = [], 0
            if cursor == BEGINNING:
                self.text_tokens = require_tokens(found)
            cursor = BEGINNING

    def rows_of(self, batches: list[ContextBatch]) -> Iterator[dict[str, HarvestedRows]]:
        """Yield the rows of this rank's part of the contexts, by split."""
        for piece in own_contexts(batches, self.ranks, self.section.batch_contexts):
            yield rows_of(self.model, piece, self.section, self.hooks)


def require_tokens(found: int) -> int:
    """Return the number of training tokens in a whole text; raise ``ValueError`` if there are none."""
    if not found:
        raise ValueError("text: expected tokens to train on, got none. Give longer text, or lower text.context_length.")
    return found


@dataclass(frozen=True)
class _OwnRows:
    """Usable rows that this rank holds of one buffer, what is bad in it and before, and the cursor after it."""

    rows: HarvestedRows
    bad: BadCount
    bad_texts: Counter[str]
    cursor: Cursor


@dataclass(frozen=True)
class _Sampled:
    """Rows of one buffer in an order that training never uses, without tokens that were in an earlier buffer.

    ``begin`` is the number of rows in earlier buffers, ``cursor`` the position in the text after this one.
    """

    number: int
    begin: int
    rows: ActivationBatch
    cursor: Cursor

    @property
    def end(self) -> int:
        return self.begin + len(self.rows.x)


class LiveStream(ActivationStream):
    """Stream of activations computed on the fly: one buffer of tokens after another, each shuffled and used up.

    Shuffling is limited to a buffer. A resume recomputes only the buffer it stopped in. Tokens of a buffer that do not fill a
    batch are dropped; the text restarts when it ends. Streams may share ``source``. Samples come from the beginning of the
    text and from as many buffers as they need; the moments and the sample that initialize a run use at most ``start_tokens``
    tokens, or one buffer if that is more.

    The ranks of a ``mesh`` hold each the rows of their part of a buffer's contexts. They number the rows of all in order, so
    that the buffer is shuffled as in one process, and send each other the rows of their parts of a batch: at every step a rank
    receives those that others hold, ``batch_tokens / parts x width`` numbers at most. Samples are gathered whole on every rank.
    """

    def __init__(
        self,
        source: Buffers,
        hooks_in: tuple[str, ...],
        batch_tokens: int,
        seed: int,
        hooks_out: tuple[str, ...] = (),
        start_tokens: int = 0,
        part: BatchPart = WHOLE,
        mesh: Mesh = ONE_PROCESS,
    ):
        super().__init__(batch_tokens, part)
        self.mesh, self.reads_ahead = mesh, mesh.world.size == 1
        section = source.section
        if section.live_buffer_tokens < batch_tokens:
            raise ValueError(
                f"harvest.live_buffer_tokens: expected at least batch_tokens = {batch_tokens}, "
                f"got {section.live_buffer_tokens}."
            )
        self.source, self.section, self.seed = source, section, seed
        self.hooks_in, self.hooks_out = hooks_in, hooks_out or hooks_in
        # Batch number at which a buffer begins -> (buffer number, cursor in the text).
        self.buffers: dict[int, tuple[int, Cursor]] = {0: (0, BEGINNING)}
        self.start_tokens = max(start_tokens, section.live_buffer_tokens)
        self._sampled: _Sampled | None = None
        self._widths: dict[str, int] = {}
        self._moments: tuple[Moments, Moments] | None = None

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        begin = max(number for number in self.buffers if number <= start)
        number, cursor = self.buffers[begin]
        tokens, known = BadTokens(self.section), Counter(self.skipped)
        tokens.bad, tokens.rows = known[NOT_FINITE], start * self.batch_tokens + known[NOT_FINITE]
        coming = self._own_buffers(cursor)
        # Ranks send each other rows in the order of the steps, but each computes its own in the background.
        coming = coming if self.reads_ahead else ReadAhead(coming, 1)
        try:
            for own in coming:
                # A text that restarts repeats its bad rows: only new ones count.
                skipped, known = own.bad_texts - known, known | own.bad_texts
                held, found = counts_of_all(self.mesh.world, own.bad)
                tokens.count(*found)
                skipped += Counter({NOT_FINITE: found[1]})
                batches = sum(held) // self.batch_tokens
                self.buffers[begin + batches] = (number + 1, own.cursor)
                if begin + batches > start:
                    order = permute(np.arange(sum(held)), sum(held), self.seed * 1_000_003 + number)
                    for i in range(max(start - begin, 0), batches):
                        batch = order[i * self.batch_tokens : (i + 1) * self.batch_tokens]
                        part = self._part(own.rows, held, batch)
                        grad = self._columns(part, "grad", self.hooks_out) if self.section.gradients else None
                        # Counted with the first batch: a resume within the buffer has counted them already.
                        yield replace(self._sides(part), grad=grad, labels=part.labels, skipped=Counter() if i else skipped)
                begin, number = begin + batches, number + 1
                if self.needed is not None and begin >= self.needed:
                    return
        finally:
            if isinstance(coming, ReadAhead):
                coming.close()

    def _own_buffers(self, cursor: Cursor) -> Iterator["_OwnRows"]:
        """Yield this rank's usable rows of the buffers from a cursor on, endlessly."""
        while True:
            before, (rows, cursor) = cursor, self.source.after(cursor)
            bad_texts = self.source.texts.until(cursor.document if cursor > before else None)
            usable, bad = without_bad(rows.at((*self.hooks_in, *self.hooks_out)), BadTokens(self.section), "harvest")
            yield _OwnRows(usable, bad, bad_texts, cursor)

    def _part(self, rows: HarvestedRows, held: list[int], batch: np.ndarray) -> HarvestedRows:
        """Return this rank's part of a batch.

        Args:
            held: Number of rows of the buffer that each rank holds.
            batch: Rows of the buffer that make up the batch.
        """
        world, parts = self.mesh.world, self.part.of_all(self.mesh.world.size)
        if world.size == 1:
            return rows.select(torch.from_numpy(batch[self.part.places(len(batch))]))
        routed = routes(world, held, [batch[part.places(len(batch))] for part in parts])
        device = self.source.model.device
        # Labels stay behind: no training reads them.
        return HarvestedRows({}, dict(zip(rows.tensors, routed.take([*rows.tensors.values()], device), strict=True)))

    def content(self) -> Content:
        return self.source.content_up_to(Cursor(*self.position()["cursor"]))

    @property
    def distinct_tokens(self) -> int:
        return self.source.text_tokens

    def position(self) -> dict[str, Any]:
        begin = max(number for number in self.buffers if number <= self.batches)
        number, cursor = self.buffers[begin]
        return super().position() | {"begin": begin, "buffer": number, "cursor": list(cursor)}

    def seek(self, position: dict[str, Any]) -> None:
        super().seek(position)
        self.buffers = {position["begin"]: (position["buffer"], Cursor(*position["cursor"]))}
        self.source.text_tokens = position.get("distinct", self.source.text_tokens)

    def _sides(self, rows: HarvestedRows) -> ActivationBatch:
        x = self._columns(rows, "x", self.hooks_in)
        return ActivationBatch(x, self._columns(rows, "x", self.hooks_out) if self.hooks_out != self.hooks_in else None)

    def _columns(self, rows: HarvestedRows, kind: str, hooks: tuple[str, ...]) -> Tensor:
        columns = [rows.tensors[f"{kind}:{hook}"] for hook in hooks]
        self._widths |= {hook: column.shape[1] for hook, column in zip(hooks, columns, strict=True)}
        return side_by_side(columns)

    def hook_widths(self) -> dict[str, int]:
        # Known from the first sample on.
        return self._widths

    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        found: list[ActivationBatch] = []
        while True:
            here = self._sampled_at(skip)
            rows = here.rows.rows(slice(skip - here.begin, skip - here.begin + tokens))
            found.append(rows)
            skip, tokens = skip + len(rows.x), tokens - len(rows.x)
            if not tokens or not len(rows.x):
                return found[0] if len(found) == 1 else ActivationBatch.join(found)

    def start_sample(self, tokens: int) -> ActivationBatch:
        return self.sample(min(tokens, self.start_tokens))

    def heldout(self, tokens: int) -> ActivationBatch | None:
        source, section = self.source, self.section
        if not section.heldout:
            return None
        found: list[ActivationBatch] = []
        for batch in context_batches(source.model, source.text, section, section.batch_contexts, heldout=True):
            found.append(self._of_all(HarvestedRows.join([rows["heldout"] for rows in source.rows_of([batch])])))
            if sum(len(each.x) for each in found) >= tokens:
                break
        if not sum(len(each.x) for each in found):
            return None
        joined = ActivationBatch.join(found)
        return joined.rows(slice(tokens))

    def _of_all(self, rows: HarvestedRows) -> ActivationBatch:
        """Return the usable ones of all ranks' rows, in order, which all ranks call together."""
        usable, bad = without_bad(rows.at((*self.hooks_in, *self.hooks_out)), BadTokens(self.section), "harvest")
        held, found = counts_of_all(self.mesh.world, bad)
        # Training counts them again.
        BadTokens(self.section).count(*found)
        own = self._sides(usable)
        if self.mesh.world.size == 1:
            return own
        x, target = (
            None if side is None else torch.cat(self.mesh.world.gather_rows(side, held)) for side in (own.x, own.target)
        )
        assert x is not None
        return ActivationBatch(x, target)

    def _sampled_at(self, row: int) -> _Sampled:
        """Return the buffer that holds a row of the text, or the last buffer if the text ends before that row."""
        if self._sampled is None or row < self._sampled.begin:
            self._sampled = self._sampled_from(0, 0, BEGINNING)
        while row >= self._sampled.end and not 0 < self.source.text_tokens <= self._sampled.end:
            self._sampled = self._sampled_from(self._sampled.number + 1, self._sampled.end, self._sampled.cursor)
        return self._sampled

    def _sampled_from(self, number: int, begin: int, cursor: Cursor) -> _Sampled:
        rows, cursor = self.source.after(cursor)
        whole = self._of_all(rows)
        # A buffer may hold the end of the text and again its beginning, which earlier buffers held.
        new = min(len(whole.x), self.source.text_tokens - begin) if self.source.text_tokens else len(whole.x)
        # Negative buffer numbers give orders that training never uses.
        order = torch.from_numpy(permute(np.arange(new), new, self.seed * 1_000_003 - 1 - number))
        return _Sampled(number, begin, whole.rows(order), cursor)

    def moments(self) -> Moments:
        return self._both_moments()[0]

    def target_moments(self) -> Moments:
        return self._both_moments()[1]

    def _both_moments(self) -> tuple[Moments, Moments]:
        """Return the moments of inputs and targets, computed together because every buffer costs forward passes."""
        if self._moments is None:
            size, seen = self.section.live_buffer_tokens, 0
            batch = self.sample(size)
            found = Moments(batch.x.shape[1]), Moments(_target(batch).shape[1])
            while len(batch.x):
                found[0].update(batch.x)
                found[1].update(_target(batch))
                seen += len(batch.x)
                if seen >= self.start_tokens:
                    break
                batch = self.sample(min(size, self.start_tokens - seen), seen)
            self._moments = found
        return self._moments


def _target(batch: ActivationBatch) -> Tensor:
    return batch.x if batch.target is None else batch.target
