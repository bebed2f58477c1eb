"""Batches straight from the model, nothing on disk: shuffled buffer by buffer, or whole contexts in the order of the text."""

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
from . import harvest
from .contexts import ContextBatch, context_batches, special_tokens, stack_contexts
from .model import LanguageModel
from .shuffle import permute
from .stream import ActivationBatch, ActivationStream, side_by_side


class Buffers:
    """Training tokens straight from the model, buffer after buffer, at every hook that some stream reads.

    Streams that walk the text together share the work: the last few buffers are kept for those that come after the first.
    What a buffer holds depends on where it begins and on nothing else. ``text_tokens`` is how many training tokens the text
    holds, 0 until it has been read from beginning to end.
    """

    def __init__(self, model: LanguageModel, text: TextSection, section: HarvestSection, hooks: tuple[str, ...], keep: int = 1):
        self.model, self.text, self.section, self.hooks = model, text, section, hooks
        self.keep = keep
        self.digest = TextDigest(text)
        self._model_content: Content | None = None
        self.texts = BadTexts(text)
        self.text_tokens = 0
        self._kept: dict[Cursor, tuple[harvest.HarvestedRows, Cursor]] = {}
        self._making = self._from(BEGINNING)
        self._stands_at: Cursor | None = BEGINNING
        self._lock = threading.Lock()

    def content_up_to(self, cursor: Cursor, digest: TextDigest | None = None) -> Content:
        """Return the content of the model, and of the text up to ``cursor``."""
        if self._model_content is None:
            self._model_content = self.model.content()
        return self._model_content | {"text": (digest or self.digest).up_to(cursor)}

    def after(self, cursor: Cursor) -> tuple[harvest.HarvestedRows, Cursor]:
        """The buffer that begins at ``cursor``, and where the text stands after it."""
        # Who wants a buffer that is being made waits for it.
        with self._lock:
            if cursor not in self._kept:
                while len(self._kept) >= self.keep:
                    self._kept.pop(next(iter(self._kept)))
                # Going on in the text costs nothing, finding a place in it may cost reading up to there.
                if cursor != self._stands_at:
                    self._making = self._from(cursor)
                # Should it fail, whoever asks next is to hear of it too.
                self._stands_at = None
                self._kept[cursor] = next(self._making)
                self._stands_at = self._kept[cursor][1]
            return self._kept[cursor]

    def _from(self, cursor: Cursor) -> Iterator[tuple[harvest.HarvestedRows, Cursor]]:
        """Buffer after buffer from a place in the text on, endlessly."""
        pieces: list[harvest.HarvestedRows] = []
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
                pieces.append(harvest.rows_of(self.model, batch, self.section, self.hooks)["train"])
                found += len(pieces[-1])
                if sum(map(len, pieces)) >= self.section.live_buffer_tokens:
                    yield harvest.HarvestedRows.join(pieces), batch.cursor
                    pieces = []
            if cursor == BEGINNING:
                self.text_tokens = require_tokens(found)
            cursor = BEGINNING


def require_tokens(found: int) -> int:
    """Return how many training tokens a whole text holds; raise ``ValueError`` if there are none."""
    if not found:
        raise ValueError("text: no token is left to train on. Give longer text, or lower text.context_length.")
    return found


@dataclass(frozen=True)
class _Sampled:
    """One buffer's rows in an order that training never uses, none of a token that was in a buffer before.

    ``begin`` counts the rows of the buffers before it, ``cursor`` is where the text stands after it.
    """

    number: int
    begin: int
    rows: ActivationBatch
    cursor: Cursor

    @property
    def end(self) -> int:
        return self.begin + len(self.rows.x)


class LiveStream(ActivationStream):
    """Straight from the model, nothing on disk: buffer after buffer of tokens, each shuffled and used up.

    The shuffle reaches as far as the buffer. A resume recomputes only the buffer it stopped in. Tokens of a buffer that do not
    fill a batch are dropped; the text starts over when it ends. Streams may share ``source``. Samples come from the text's
    beginning and from as many buffers as they need; what a run starts from, moments and sample, rests on no more than
    ``start_tokens`` tokens, or one buffer if that is more.
    """

    def __init__(
        self,
        source: Buffers,
        hooks_in: tuple[str, ...],
        batch_tokens: int,
        seed: int,
        hooks_out: tuple[str, ...] = (),
        start_tokens: int = 0,
    ):
        super().__init__(batch_tokens)
        section = source.section
        if section.live_buffer_tokens < batch_tokens:
            raise ValueError(
                f"harvest.live_buffer_tokens: expected at least batch_tokens = {batch_tokens}, "
                f"got {section.live_buffer_tokens}."
            )
        self.source, self.section, self.seed = source, section, seed
        self.hooks_in, self.hooks_out = hooks_in, hooks_out or hooks_in
        # Batch number at which a buffer begins -> (buffer number, place in the text).
        self.buffers: dict[int, tuple[int, Cursor]] = {0: (0, BEGINNING)}
        self.start_tokens = max(start_tokens, section.live_buffer_tokens)
        self._sampled: _Sampled | None = None
        self._moments: tuple[Moments, Moments] | None = None

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        begin = max(number for number in self.buffers if number <= start)
        number, cursor = self.buffers[begin]
        tokens, known = BadTokens(self.section), Counter(self.skipped)
        tokens.bad, tokens.rows = known[NOT_FINITE], start * self.batch_tokens + known[NOT_FINITE]
        while True:
            before, (rows, cursor) = cursor, self.source.after(cursor)
            found = self.source.texts.until(cursor.document if cursor > before else None)
            # A text that begins again has its bad rows again.
            skipped, known = found - known, known | found
            bad = tokens.bad
            rows = harvest.usable_rows(rows.at((*self.hooks_in, *self.hooks_out)), tokens, "harvest")
            skipped += Counter({NOT_FINITE: tokens.bad - bad})
            batches = len(rows) // self.batch_tokens
            self.buffers[begin + batches] = (number + 1, cursor)
            if begin + batches > start:
                order = torch.from_numpy(permute(np.arange(len(rows)), len(rows), self.seed * 1_000_003 + number))
                shuffled = rows.select(order)
                for i in range(max(start - begin, 0), batches):
                    part = shuffled.select(torch.arange(i * self.batch_tokens, (i + 1) * self.batch_tokens))
                    grad = self._columns(part, "grad", self.hooks_out) if self.section.gradients else None
                    # With the first of the buffer, whoever goes on in the midst of it has counted them.
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

    def _sides(self, rows: harvest.HarvestedRows) -> ActivationBatch:
        x = self._columns(rows, "x", self.hooks_in)
        return ActivationBatch(x, self._columns(rows, "x", self.hooks_out) if self.hooks_out != self.hooks_in else None)

    def _columns(self, rows: harvest.HarvestedRows, kind: str, hooks: tuple[str, ...]) -> Tensor:
        return side_by_side([rows.tensors[f"{kind}:{hook}"] for hook in hooks])

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

    def _sampled_at(self, row: int) -> _Sampled:
        """The buffer that holds a row of the text, or, if the text has none left, the one it ends in."""
        if self._sampled is None or row < self._sampled.begin:
            self._sampled = self._sampled_from(0, 0, BEGINNING)
        while row >= self._sampled.end and not 0 < self.source.text_tokens <= self._sampled.end:
            self._sampled = self._sampled_from(self._sampled.number + 1, self._sampled.end, self._sampled.cursor)
        return self._sampled

    def _sampled_from(self, number: int, begin: int, cursor: Cursor) -> _Sampled:
        rows, cursor = self.source.after(cursor)
        # Bad tokens are counted where training reads them.
        rows = harvest.usable_rows(rows.at((*self.hooks_in, *self.hooks_out)), BadTokens(self.section), "harvest")
        # A buffer may hold the end of the text and its beginning, which came before.
        new = min(len(rows), self.source.text_tokens - begin) if self.source.text_tokens else len(rows)
        # Negative numbers: orders that training never uses.
        order = torch.from_numpy(permute(np.arange(new), new, self.seed * 1_000_003 - 1 - number))
        return _Sampled(number, begin, self._sides(rows).rows(order), cursor)

    def moments(self) -> Moments:
        return self._both_moments()[0]

    def target_moments(self) -> Moments:
        return self._both_moments()[1]

    def _both_moments(self) -> tuple[Moments, Moments]:
        """Moments of inputs and targets, found together: each buffer is a pass of the model."""
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
    """Whole contexts straight from the model, in the order of the text, for objectives that run the model themselves.

    Every batch has exactly ``batch_tokens`` kept positions: of the last context, surplus ones are left as the model has
    them. Held-out documents and excluded positions are never kept. Samples and moments are those of ``rows``.
    """

    def __init__(self, rows: LiveStream):
        super().__init__(rows.batch_tokens)
        self.rows = rows
        self.model, self.text, self.section = rows.source.model, rows.source.text, rows.section
        self._special = special_tokens(self.model)
        # Read apart from the rows, which only samples are drawn from.
        self._digest = TextDigest(self.text)
        # Batch number -> the place in the text where it begins.
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
            # The model need not run where nothing is learned.
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
            # Before the batch is handed out: whoever has it may ask for the position.
            self.cursors[number + 1] = context.cursor
            if number >= start:
                yield replace(batch, skipped=skipped)
            number, pieces, kept = number + 1, [], 0

    def _endless(self, cursor: Cursor) -> Iterator[tuple[Context, int]]:
        """Every context of the text, over and over, with how many of its tokens are trained on."""
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
        """The contexts as a batch that keeps no held-out document."""
        batch = stack_contexts(pieces, self._special, self.section)
        return replace(batch, kept=batch.kept & ~are_heldout(batch.document_ids, self.section.heldout))

    def _batch(self, pieces: list[Context], tokens: BadTokens) -> tuple[ActivationBatch | None, list[Context]]:
        """The batch and its contexts; or none, and the contexts whose activations are finite.

        Whole contexts are left out: what the model predicts after a token that overflowed is not finite either.
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

    def moments(self) -> Moments:
        return self.rows.moments()

    def target_moments(self) -> Moments:
        return self.rows.target_moments()
