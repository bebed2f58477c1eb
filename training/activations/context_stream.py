"""Stream of whole contexts in text order, for objectives that run the language model themselves."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ...sae.metrics import Moments
from ..bad_rows import NOT_FINITE, BadTokens
from ..content import Content, TextDigest
from ..text import BEGINNING, Context, Cursor, are_heldout, contexts
from .contexts import ContextBatch, Origin, context_masks
from .harvested_rows import BadCount, counts_of_all
from .live import LiveStream, require_tokens
from .routes import routes
from .stream import ActivationBatch, ActivationStream, ReadAhead, side_by_side

# Contexts that are tokenized ahead if ranks exchange rows, so that batches cannot be made ahead.
CONTEXTS_AHEAD = 256


class ContextStream(ActivationStream):
    """Stream of whole contexts in text order, for objectives that run the model themselves (``objective: kl``).

    Every batch has exactly ``batch_tokens`` kept positions; surplus positions of its last context keep the model's own
    activations. Held-out documents and excluded positions are never kept. Samples and moments are those of ``rows``.

    Ranks divide the contexts of a batch nearly as they divide its rows: a context is run by a rank whose part its first row is
    in, and by one of the shards that share this part. Rows on the wrong side of a boundary are sent, and so are, by
    ``Origin.routes``, their reconstructions to where their context is run.
    """

    def __init__(self, rows: LiveStream):
        super().__init__(rows.batch_tokens, rows.part)
        self.rows, self.mesh, self.reads_ahead = rows, rows.mesh, rows.reads_ahead
        self.model, self.text, self.section = rows.source.model, rows.source.text, rows.section
        self._masks = context_masks(self.model, self.text, self.section)
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
        coming = self._endless(last)
        coming = coming if self.reads_ahead else ReadAhead(coming, CONTEXTS_AHEAD)
        try:
            for context, here in coming:
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
        finally:
            if isinstance(coming, ReadAhead):
                coming.close()

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
        batch = self._masks.batch(pieces)
        return replace(batch, kept=batch.kept & ~are_heldout(batch.document_ids, self.section.heldout))

    def _batch(self, pieces: list[Context], tokens: BadTokens) -> tuple[ActivationBatch | None, list[Context]]:
        """Return the batch and its contexts, or None and the contexts whose activations are all finite.

        Whole contexts are dropped: predictions after a token that overflowed are not finite either.
        """
        batch = self._training_contexts(pieces)
        within = np.cumsum(batch.kept).reshape(batch.kept.shape) <= self.batch_tokens
        batch = replace(batch, kept=batch.kept & within)
        hooks_in, hooks_out = self.rows.hooks_in, self.rows.hooks_out
        world, runs = self.mesh.world, self._who_runs(batch.kept.sum(1))
        mine = batch.some(runs == world.rank)
        kept_rows = mine.kept_activations(self.model, tuple(dict.fromkeys((*hooks_in, *hooks_out))))
        good = torch.stack([torch.isfinite(values).all(-1) for values in kept_rows.values()]).all(0).cpu().numpy()
        found: BadCount = (len(good), int((~good).sum()), "", "")
        if not good.all():
            where = f"an activation is not finite (document {mine.document_ids[mine.kept][~good][0]})"
            found = (*found[:2], f"{', '.join(kept_rows)}: {where}", "Set model.dtype: float32.")
        _, (_, bad, where, remedy) = counts_of_all(world, found)
        if bad:
            own = np.flatnonzero(runs == world.rank)[np.nonzero(mine.kept)[0][~good]].tolist() if found[1] else []
            left_out = {number for each in world.gather_objects(own) for number in each}
            tokens.count(bad, bad, where, remedy)
            return None, [piece for number, piece in enumerate(pieces) if number not in left_out]
        tokens.count(self.batch_tokens)
        x, target = (side_by_side([kept_rows[hook] for hook in hooks]) for hooks in (hooks_in, hooks_out))
        origin = mine.on(self.model.device)
        if world.size > 1:
            x, target, origin = self._shared(x, target, origin, batch, runs)
        return ActivationBatch(x, target if hooks_out != hooks_in else None, origin=origin), pieces

    def _who_runs(self, kept: Int[np.ndarray, " contexts"]) -> Int[np.ndarray, " contexts"]:
        """Return the rank that runs each context, in ascending order.

        Args:
            kept: Number of rows of each context.
        """
        parts, shards = self.part.ranks, self.mesh.shards.size
        part = np.minimum((np.cumsum(kept) - kept) * parts // self.batch_tokens, parts - 1)
        many = np.bincount(part, minlength=parts)
        place = np.arange(len(kept)) - (np.cumsum(many) - many)[part]
        return part * shards + place * shards // many[part]

    def _shared(
        self, x: Tensor, target: Tensor, origin: Origin, batch: ContextBatch, runs: Int[np.ndarray, " contexts"]
    ) -> tuple[Tensor, Tensor, Origin]:
        """Return this rank's part of the rows, from all ranks' contexts, and its contexts with the way of rows to them."""
        kept, world, shards = batch.kept.sum(1), self.mesh.world, self.mesh.shards
        held = [int(kept[runs == rank].sum()) for rank in range(world.size)]
        there = routes(world, held, [part.places(self.batch_tokens) for part in self.part.of_all(world.size)])
        # Reconstructions are on all shards of a part. Each takes those of the contexts that the same shard of any part runs.
        ends = np.cumsum(held)
        ran = [np.arange(ends[rank] - held[rank], ends[rank]) for rank in range(shards.rank, world.size, shards.size)]
        back = routes(self.mesh.batch, [self.batch_tokens // self.part.ranks] * self.part.ranks, ran)
        origin = replace(origin, routes=back, counted_of_all=int(batch.counted.sum()))
        own_x, own_target = there.take([x, target], x.device)
        return own_x, own_target, origin

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
