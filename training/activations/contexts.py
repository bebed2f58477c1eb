"""Batches of contexts, and the masks of tokens that are excluded from them.

Harvests, live streams, evaluations on held-out text and latent probing all read their text through this module.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...sae.ranks import Ranks
from ..bad_rows import BadTexts, BadTokens
from ..recipe import HarvestSection, TextSection
from ..text import BEGINNING, TOKENIZE_AT_ONCE, Context, Cursor, Documents, contexts, packed
from .hooked_model import embedding_rows
from .model import LanguageModel
from .routes import Routes


@dataclass(frozen=True)
class Origin:
    """Contexts that a batch's rows were read from, on the model's device: the rows are the ``kept`` positions in order.

    ``counted`` masks kept positions whose next token belongs to the same document (without the last position), i.e. where the
    LM loss is defined. If ranks divide the contexts, ``routes`` takes the rows of this rank's part of the batch to the ranks
    that have their contexts, and ``counted_of_all`` is the number of predictions of the whole batch.
    """

    token_ids: Int[Tensor, "contexts positions"]
    kept: Bool[Tensor, "contexts positions"]
    counted: Bool[Tensor, "contexts predictions"]
    routes: Routes | None = None
    counted_of_all: int = 0


@dataclass(frozen=True)
class ContextBatch:
    """Batch of contexts on the host; ``kept`` masks the tokens that are not excluded.

    ``positions`` are positions in the document, -1 at BOS and padding. ``cursor`` is where the next context begins.
    """

    token_ids: Int[np.ndarray, "contexts positions"]
    document_ids: Int[np.ndarray, "contexts positions"]
    positions: Int[np.ndarray, "contexts positions"]
    kept: Bool[np.ndarray, "contexts positions"]
    cursor: Cursor

    @property
    def documents(self) -> set[int]:
        """Ids of the documents of the kept tokens."""
        return set(self.document_ids[self.kept].tolist())

    @property
    def counted(self) -> Bool[np.ndarray, "contexts predictions"]:
        """Mask of the kept positions whose next token belongs to the same document."""
        return self.kept[:, :-1] & (self.document_ids[:, 1:] == self.document_ids[:, :-1])

    def some(self, contexts: slice | Bool[np.ndarray, " contexts"]) -> "ContextBatch":
        """Return some of the contexts. If there are none, return the first context with no token kept: models need one."""
        token_ids, document_ids, positions, kept = (
            each[contexts] for each in (self.token_ids, self.document_ids, self.positions, self.kept)
        )
        if not len(token_ids):
            return replace(self.some(slice(1)), kept=np.zeros_like(self.kept[:1]))
        return ContextBatch(token_ids, document_ids, positions, kept, self.cursor)

    def on(self, device: torch.device) -> Origin:
        """Return the token ids and masks on a device."""
        return Origin(
            torch.from_numpy(self.token_ids).long().to(device),
            torch.from_numpy(self.kept).to(device),
            torch.from_numpy(self.counted).to(device),
        )

    def kept_activations(self, model: LanguageModel, hooks: Sequence[str]) -> dict[str, Float[Tensor, "tokens width"]]:
        """Run the model and return the activations of the kept tokens at each hook, in float32 on the model's device."""
        origin = self.on(model.device)
        return {hook: x[origin.kept].float() for hook, x in model.activations(origin.token_ids, tuple(hooks)).items()}

    def finite_activations(
        self, model: LanguageModel, hooks: Sequence[str], bad: BadTokens
    ) -> tuple["ContextBatch", dict[str, Float[Tensor, "tokens width"]]]:
        """Return the batch without tokens whose activations are not finite, and the activations of its kept tokens.

        Raises:
            ValueError: If the recipe allows fewer such tokens.
        """
        rows = self.kept_activations(model, hooks)
        finite = torch.stack([torch.isfinite(x).all(-1) for x in rows.values()]).all(0).cpu().numpy()
        where = f"{', '.join(hooks)}: expected finite activations, got NaN or infinite ones from {model.id}"
        bad.count(len(finite), int((~finite).sum()), where, "Set model.dtype: float32.")
        if finite.all():
            return self, rows
        kept = self.kept.copy()
        kept[kept] = finite
        return replace(self, kept=kept), {hook: x[torch.from_numpy(finite).to(x.device)] for hook, x in rows.items()}


def context_batches(
    model: LanguageModel,
    text: TextSection,
    section: HarvestSection,
    size: int,
    start: Cursor = BEGINNING,
    heldout: bool = False,
    bad: BadTexts | None = None,
    reading: Callable[[int, str], None] | None = None,
) -> Iterator[ContextBatch]:
    """Yield batches of ``size`` contexts of a text, from ``start`` on; the last batch may be smaller.

    Args:
        section: Its exclusions determine ``kept``.
        heldout: Read only held-out documents; otherwise all are read, and the caller splits them.
        bad: Counter of rows of the text that cannot be read.
        reading: Callback, called with the number and text of every document that is read.

    Raises:
        ValueError: If the text cannot be read, or contains a token that the model has no embedding for.
    """
    read = contexts(text, model.tokenizer, start, section.heldout if heldout else None, bad, reading)
    return batched(read, model, section, size)


def own_contexts(batches: Sequence[ContextBatch], ranks: Ranks, size: int) -> list[ContextBatch]:
    """Return this rank's part of the contexts of some batches, in batches of ``size``: one of equal, consecutive parts."""
    if ranks.size == 1:
        return list(batches)
    names = ("token_ids", "document_ids", "positions", "kept")
    token_ids, document_ids, positions, kept = (np.concatenate([getattr(b, name) for b in batches]) for name in names)
    whole = ContextBatch(token_ids, document_ids, positions, kept, batches[-1].cursor)
    first, last = (len(whole.token_ids) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    # A rank without contexts returns one, of which no token is kept.
    return [whole.some(slice(i, min(i + size, last))) for i in range(first, max(last, first + 1), size)]


def batched(
    read: Iterable[Context],
    model: LanguageModel,
    section: HarvestSection,
    size: int,
) -> Iterator[ContextBatch]:
    """Yield contexts in batches of ``size``; the last batch may be smaller.

    Raises:
        ValueError: If they contain a token that the model has no embedding for.
    """
    special, rows = special_tokens(model), embedding_rows(model.module)
    pending: list[Context] = []
    for context in read:
        if rows is not None and context.token_ids.max() >= rows:
            place = int(context.token_ids.argmax())
            raise ValueError(
                f"tokenizer: expected ids below {rows}, the embeddings of {model.id}, got {context.token_ids[place]} in "
                f"document {context.document_ids[place]}. Give the tokenizer the model was trained with."
            )
        pending.append(context)
        if len(pending) == size:
            yield stack_contexts(pending, special, section)
            pending = []
    if pending:
        yield stack_contexts(pending, special, section)


class ContextReader:
    """Batches of contexts of a text, from any place on that is not before the last one.

    Args:
        start: First place.
        bad: Counter of rows of the text that cannot be read.
        reading: Callback, called with the number and text of every document that is read or skipped.
        at_once: Documents tokenized together, and so read ahead.
    """

    def __init__(
        self,
        model: LanguageModel,
        text: TextSection,
        section: HarvestSection,
        start: Cursor,
        bad: BadTexts | None = None,
        reading: Callable[[int, str], None] | None = None,
        at_once: int = TOKENIZE_AT_ONCE,
    ):
        self.model, self.text, self.section, self.at_once = model, text, section, at_once
        self._documents = Documents(text, start.document, bad, reading)
        self._place: Cursor | None = None
        self._batches: Iterator[ContextBatch] = iter(())

    def batches(self, start: Cursor) -> Iterator[ContextBatch]:
        """Yield the batches from ``start`` on; what has been tokenized is not tokenized again if the last ones ended there."""
        self._documents.forget(start.document)
        if start != self._place:
            numbered = self._documents.since(start.document)
            read = packed(numbered, self.text, self.model.tokenizer, start.offset, self.at_once)
            self._batches = batched(read, self.model, self.section, self.section.batch_contexts)
        for batch in self._batches:
            self._place = batch.cursor
            yield batch


def special_tokens(model: LanguageModel) -> frozenset[int]:
    """Return the ids of BOS, EOS, padding and all other special tokens of the model's tokenizer."""
    return special_ids(model.tokenizer)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all special tokens of a tokenizer."""
    return frozenset(tokenizer.all_special_ids)


def stack_contexts(batch: Sequence[Context], special: frozenset[int], section: HarvestSection) -> ContextBatch:
    """Stack contexts into one batch and mask the tokens that ``section`` excludes.

    Padding, special tokens and leading positions are excluded; if gradients are stored, the last position too.
    """
    token_ids, document_ids, positions = (
        np.stack([getattr(context, name) for context in batch]) for name in ("token_ids", "document_ids", "positions")
    )
    drop = document_ids < 0
    if section.exclude_special:
        drop |= np.isin(token_ids, list(special))
    drop[:, : section.exclude_leading] = True
    if section.gradients:
        # The last position predicts no token, so its gradient has another meaning.
        drop[:, -1] = True
    return ContextBatch(token_ids, document_ids, positions, ~drop, batch[-1].cursor)
