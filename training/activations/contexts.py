"""Batches of contexts, and the masks of tokens that are excluded from them.

Harvests, live streams, evaluations on held-out text and latent probing all read their text through this module.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...sae.ranks import Ranks
from ..bad_rows import BadTexts, BadTokens
from ..chats import NO_ROLE
from ..recipe import HarvestSection, TextSection
from ..text import BEGINNING, Context, Cursor, Documents, contexts, packed
from ..tokens import TOKENIZE_AT_ONCE
from .exclusions import Exclusions
from .hooked_model import embedding_rows
from .model import LanguageModel
from .routes import Routes

# Contexts at the beginning of a text that the median norm of `harvest.exclude.norm_above` is taken over.
NORM_CONTEXTS = 64
# Tokens of a pass on a CPU. Larger ones leave the cache: six blocks of GPT-2 small on contexts of 128 tokens run at 1,590
# tokens/s with 16 contexts, at 1,200 with 32, at 1,160 with 64 (AMD EPYC, two threads).
CPU_PASS_TOKENS = 2048


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

    ``positions`` are positions in the document, -1 at BOS and padding. ``cursor`` is where the next context begins. ``roles``
    numbers the tokens' roles in ``ROLES``; None if there are no chats among the documents.
    """

    token_ids: Int[np.ndarray, "contexts positions"]
    document_ids: Int[np.ndarray, "contexts positions"]
    positions: Int[np.ndarray, "contexts positions"]
    kept: Bool[np.ndarray, "contexts positions"]
    cursor: Cursor
    roles: Int[np.ndarray, "contexts positions"] | None = None

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
        roles = None if self.roles is None else self.roles[contexts]
        return ContextBatch(token_ids, document_ids, positions, kept, self.cursor, roles)

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
        contexts, positions = origin.token_ids.shape
        at_once = max(1, CPU_PASS_TOKENS // max(positions, 1)) if model.device.type == "cpu" else max(contexts, 1)
        rows: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        for ids, kept in zip(origin.token_ids.split(at_once), origin.kept.split(at_once), strict=True):
            for hook, x in model.activations(ids, tuple(hooks)).items():
                rows[hook].append(x[kept].float())
        return {hook: parts[0] if len(parts) == 1 else torch.cat(parts) for hook, parts in rows.items()}

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
    return batched(read, context_masks(model, text, section), size)


def own_contexts(batches: Sequence[ContextBatch], ranks: Ranks, size: int) -> list[ContextBatch]:
    """Return this rank's part of the contexts of some batches, in batches of ``size``: one of equal, consecutive parts.

    Without the tokens' roles, which nobody asks for behind the masks.
    """
    if ranks.size == 1:
        return list(batches)
    names = ("token_ids", "document_ids", "positions", "kept")
    token_ids, document_ids, positions, kept = (np.concatenate([getattr(b, name) for b in batches]) for name in names)
    whole = ContextBatch(token_ids, document_ids, positions, kept, batches[-1].cursor)
    first, last = (len(whole.token_ids) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    # A rank without contexts returns one, of which no token is kept.
    return [whole.some(slice(i, min(i + size, last))) for i in range(first, max(last, first + 1), size)]


def batched(read: Iterable[Context], masks: "ContextMasks", size: int) -> Iterator[ContextBatch]:
    """Yield contexts in batches of ``size``; the last batch may be smaller.

    Raises:
        ValueError: If they contain a token that the model has no embedding for.
    """
    model = masks.model
    rows = embedding_rows(model.module)
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
            yield masks.batch(pending)
            pending = []
    if pending:
        yield masks.batch(pending)


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
        self._masks = context_masks(model, text, section)
        self._documents = Documents(text, start.document, bad, reading)
        self._place: Cursor | None = None
        self._batches: Iterator[ContextBatch] = iter(())

    def batches(self, start: Cursor) -> Iterator[ContextBatch]:
        """Yield the batches from ``start`` on; what has been tokenized is not tokenized again if the last ones ended there."""
        self._documents.forget(start.document)
        if start != self._place:
            numbered = self._documents.since(start.document)
            read = packed(numbered, self.text, self.model.tokenizer, start.offset, self.at_once)
            self._batches = batched(read, self._masks, self.section.batch_contexts)
        for batch in self._batches:
            self._place = batch.cursor
            yield batch


class ContextMasks:
    """Batches of contexts of a text with the masks of the tokens that are kept, by norm too if the recipe says so.

    Args:
        model: Model that the norms are those of.
    """

    def __init__(self, model: LanguageModel, text: TextSection, section: HarvestSection):
        self.model, self.text, self.section = model, text, section
        self.exclusions = Exclusions(model.tokenizer, text, section)

    @cached_property
    def largest_norms(self) -> dict[str, float]:
        """Largest norm of the tokens that are kept, by hook; empty without ``norm_above``."""
        above = self.section.exclude.norm_above
        if above is None:
            return {}
        norms: dict[str, list[Tensor]] = {hook: [] for hook in self.section.hooks}
        first = itertools.islice(contexts(self.text, self.model.tokenizer), NORM_CONTEXTS)
        while some := list(itertools.islice(first, self.section.batch_contexts)):
            for hook, x in stack_contexts(some, self.exclusions).kept_activations(self.model, self.section.hooks).items():
                norms[hook].append(x.norm(dim=-1))
        if not any(len(each) for each in norms[self.section.hooks[0]]):
            return {}
        return {hook: above * float(torch.cat(each).nanmedian()) for hook, each in norms.items()}

    def batch(self, several: Sequence[Context]) -> ContextBatch:
        """Stack contexts into one batch and mask the tokens that the recipe excludes."""
        found = stack_contexts(several, self.exclusions)
        if not self.largest_norms or not found.kept.any():
            return found
        rows = found.kept_activations(self.model, self.section.hooks)
        # Norms that are not a number are no reason here: such tokens are counted where their activations are used.
        large = torch.stack([x.norm(dim=-1) > self.largest_norms[hook] for hook, x in rows.items()]).any(0).cpu().numpy()
        kept = found.kept.copy()
        kept[kept] = ~large
        return replace(found, kept=kept)


def context_masks(model: LanguageModel, text: TextSection, section: HarvestSection) -> ContextMasks:
    """Return the masks of a text's tokens, and set the model to see documents as the text is packed."""
    model.mask_documents(model.tokenizer.bos_token_id if text.packing == "pack_masked" else None)
    return ContextMasks(model, text, section)


def stack_contexts(batch: Sequence[Context], exclusions: Exclusions) -> ContextBatch:
    """Stack contexts into one batch and mask the tokens that are excluded whatever their activations are."""
    token_ids, document_ids, positions = (
        np.stack([getattr(context, name) for context in batch]) for name in ("token_ids", "document_ids", "positions")
    )
    roles = None
    if any(context.roles is not None for context in batch):
        none = np.full(token_ids.shape[1], NO_ROLE, np.int8)
        roles = np.stack([none if context.roles is None else context.roles for context in batch])
    kept = ~exclusions.dropped(token_ids, document_ids, roles)
    return ContextBatch(token_ids, document_ids, positions, kept, batch[-1].cursor, roles)
