"""Streams of activations computed on the fly, without a store: shuffled within buffers, or whole contexts in text order."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sae.metrics import Moments
from ..bad_rows import NOT_FINITE, BadTexts, BadTokens
from ..content import Content, TextDigest
from ..recipe import HarvestSection, TextSection
from ..text import BEGINNING, Context, Cursor, are_heldout, contexts
from .contexts import ContextBatch, context_batches, special_tokens, stack_contexts
from .harvested_rows import HarvestedRows, rows_of, usable_rows
from .model import LanguageModel
from .shuffle import permute
from .stream import WHOLE, ActivationBatch, ActivationStream, BatchPart, side_by_side


class Buffers:
    """Buffers of training tokens computed on the fly, with the activations at every hook that any stream reads.

    Streams that read the text in step share the work: the last ``keep`` buffers are kept for those that lag. The
    contents of a buffer depend only on where it begins. ``text_tokens`` is the number of training tokens in the text, 0 until
    it has been read from beginning to end.
    """

    def __init__(self, model: LanguageModel, text: TextSection, section: HarvestSection, hooks: tuple[str, ...], keep: int = 1):
        self.model, self.text, self.section, self.hooks = model, text, section, hooks
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
        pieces: list[HarvestedRows] = []
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
                pieces.append(rows_of(self.model, batch, self.section, self.hooks)["train"])
                found += len(pieces[-1])
                if sum(map(len, pieces)) >= self.section.live_buffer_tokens:
                    yield HarvestedRows.join(pieces), batch.cursor
                    pieces = []
            if cursor == BEGINNING:
                self.text_tokens = require_tokens(found)
            cursor = BEGINNING


def require_tokens(found: int) -> int:
    """Return the number of training tokens in a whole text; raise ``ValueError`` if there are none."""
    if not found:
        raise ValueError("text: expected tokens to train on, got none. Give longer text, or lower text.context_length.")
    return found


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
    tokens, or one buffer if that is more. Of several ranks, each runs the model on the whole text.
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
    ):
        super().__init__(batch_tokens, part)
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
        while True:
            before, (rows, cursor) = cursor, self.source.after(cursor)
            found = self.source.texts.until(cursor.document if cursor > before else None)
            # A text that restarts repeats its bad rows: only new ones count.
            skipped, known = found - known, known | found
            bad = tokens.bad
            rows = usable_rows(rows.at((*self.hooks_in, *self.hooks_out)), tokens, "harvest")
            skipped += Counter({NOT_FINITE: tokens.bad - bad})
            batches = len(rows) // self.batch_tokens
            self.buffers[begin + batches] = (number + 1, cursor)
            if begin + batches > start:
                order = torch.from_numpy(permute(np.arange(len(rows)), len(rows), self.seed * 1_000_003 + number))
                shuffled = rows.select(order)
                own = torch.from_numpy(self.part.places(self.batch_tokens))
                for i in range(max(start - begin, 0), batches):
                    part = shuffled.select(own + i * self.batch_tokens)
                    grad = self._columns(part, "grad", self.hooks_out) if self.section.gradients else None
                    # Counted with the first batch: a resume within the buffer has counted them already.
                    yield replace(self._sides(part), grad=grad, labels=part.labels, skipped=Counter() if i else skipped)
            begin, number = begin + batches, number + 1

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
            rows = rows_of(source.model, batch, section, source.hooks)["heldout"].at((*self.hooks_in, *self.hooks_out))
            found.append(self._sides(usable_rows(rows, BadTokens(section), "harvest")))
            if sum(len(each.x) for each in found) >= tokens:
                break
        if not sum(len(each.x) for each in found):
            return None
        joined = ActivationBatch.join(found)
        return joined.rows(slice(tokens))

    def _sampled_at(self, row: int) -> _Sampled:
        """Return the buffer that holds a row of the text, or the last buffer if the text ends before that row."""
        if self._sampled is None or row < self._sampled.begin:
            self._sampled = self._sampled_from(0, 0, BEGINNING)
        while row >= self._sampled.end and not 0 < self.source.text_tokens <= self._sampled.end:
            self._sampled = self._sampled_from(self._sampled.number + 1, self._sampled.end, self._sampled.cursor)
        return self._sampled

    def _sampled_from(self, number: int, begin: int, cursor: Cursor) -> _Sampled:
        rows, cursor = self.source.after(cursor)
        # Bad tokens are counted when training reads them.
        rows = usable_rows(rows.at((*self.hooks_in, *self.hooks_out)), BadTokens(self.section), "harvest")
        # A buffer may hold the end of the text and again its beginning, which earlier buffers held.
        new = min(len(rows), self.source.text_tokens - begin) if self.source.text_tokens else len(rows)
        # Negative buffer numbers give orders that training never uses.
        order = torch.from_numpy(permute(np.arange(new), new, self.seed * 1_000_003 - 1 - number))
        return _Sampled(number, begin, self._sides(rows).rows(order), cursor)

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


class ContextStream(ActivationStream):
    """Stream of whole contexts in text order, for objectives that run the model themselves (``objective: kl``).

    Every batch has exactly ``batch_tokens`` kept positions; surplus positions of its last context keep the model's own
    activations. Held-out documents and excluded positions are never kept. Samples and moments are those of ``rows``.
    """

    def __init__(self, rows: LiveStream):
        super().__init__(rows.batch_tokens)
        self.rows = rows
        self.model, self.text, self.section = rows.source.model, rows.source.text, rows.section
        self._special = special_tokens(self.model)
        # Separate from the digest of `rows`, from which only samples are drawn.
        self._digest = TextDigest(self.text)
        # Batch number -> cursor in the text where it begins.
        self.cursors: dict[int, Cursor] = {0: BEGINNING}
        self._text_tokens = 0

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        number = max(known for known in self.cursors if known <= start)
        pieces: list[Context] = []
        kept = 0
        tokens, known, last = BadTokens(self.section), Counter(self.skipped), self.cursors[number]
        bad = tokens.bad = known[NOT_FINITE]
        tokens.rows = start * self.batch_tokens + bad
        for context, here in self._endless(last):
            # Contexts without training tokens need no forward pass.
            if here:
                pieces.append(context)
            kept += here
            if kept < self.batch_tokens:
                continue
            batch, pieces = self._batch(pieces, tokens)
            if batch is None:
                kept = sum(int(self._training_contexts([piece]).kept.sum()) for piece in pieces)
                continue
            found = self.rows.source.texts.until(context.cursor.document if context.cursor > last else None)
            skipped = found - known + Counter({NOT_FINITE: tokens.bad - bad})
            known, last, bad = known | found, context.cursor, tokens.bad
            # Set before the batch is handed out, because the consumer may ask for the position.
            self.cursors[number + 1] = context.cursor
            if number >= start:
                yield replace(batch, skipped=skipped)
            number, pieces, kept = number + 1, [], 0

    def _endless(self, cursor: Cursor) -> Iterator[tuple[Context, int]]:
        """Yield every context of the text with its number of training tokens, endlessly."""
        while True:
            found = 0
            bad, reading = self.rows.source.texts, self._digest.add
            for context in contexts(self.text, self.model.tokenizer, cursor, bad=bad, reading=reading):
                here = int(self._training_contexts([context]).kept.sum())
                found += here
                yield context, here
            if cursor == BEGINNING:
                self._text_tokens = require_tokens(found)
            cursor = BEGINNING

    @property
    def distinct_tokens(self) -> int:
        return self._text_tokens

    def _training_contexts(self, pieces: list[Context]) -> ContextBatch:
        """Return the contexts as a batch in which held-out documents are not kept."""
        batch = stack_contexts(pieces, self._special, self.section)
        return replace(batch, kept=batch.kept & ~are_heldout(batch.document_ids, self.section.heldout))

    def _batch(self, pieces: list[Context], tokens: BadTokens) -> tuple[ActivationBatch | None, list[Context]]:
        """Return the batch and its contexts, or None and the contexts whose activations are all finite.

        Whole contexts are dropped: predictions after a token that overflowed are not finite either.
        """
        batch = self._training_contexts(pieces)
        within = np.cumsum(batch.kept).reshape(batch.kept.shape) <= self.batch_tokens
        batch = replace(batch, kept=batch.kept & within)
        hooks_in, hooks_out = self.rows.hooks_in, self.rows.hooks_out
        kept_rows = batch.kept_activations(self.model, tuple(dict.fromkeys((*hooks_in, *hooks_out))))
        good = torch.stack([torch.isfinite(values).all(-1) for values in kept_rows.values()]).all(0).cpu().numpy()
        if not good.all():
            left_out = set(np.nonzero(batch.kept)[0][~good].tolist())
            where = f"an activation is not finite (document {batch.document_ids[batch.kept][~good][0]})"
            bad = int((~good).sum())
            tokens.count(bad, bad, f"{', '.join(kept_rows)}: {where}", "Set model.dtype: float32.")
            return None, [piece for number, piece in enumerate(pieces) if number not in left_out]
        tokens.count(len(good))
        x, target = (side_by_side([kept_rows[hook] for hook in hooks]) for hooks in (hooks_in, hooks_out))
        return ActivationBatch(x, target if hooks_out != hooks_in else None, origin=batch.on(self.model.device)), pieces

    def content(self) -> Content:
        return self.rows.source.content_up_to(self.cursors[self.batches], self._digest)

    def position(self) -> dict[str, Any]:
        return super().position() | {"cursor": list(self.cursors[self.batches])}

    def seek(self, position: dict[str, Any]) -> None:
        super().seek(position)
        self.cursors = {position["batches"]: Cursor(*position["cursor"])}
        self._text_tokens = position.get("distinct", self._text_tokens)

    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        return self.rows.sample(tokens, skip)

    def start_sample(self, tokens: int) -> ActivationBatch:
        return self.rows.start_sample(tokens)

    def heldout(self, tokens: int) -> ActivationBatch | None:
        return self.rows.heldout(tokens)

    def moments(self) -> Moments:
        return self.rows.moments()

    def target_moments(self) -> Moments:
        return self.rows.target_moments()
