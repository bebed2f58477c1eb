"""Pooled units of documents: latents, neurons, dimensions and words, one sparse row each, read in one streamed pass.

A unit's value in a document is its largest (or mean) activation over the document's tokens. Positive and negative parts are
separate entries, because generalised Jaccard compares sizes. The largest entries of every row are kept.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor

from ...training.activations.contexts import ContextBatch, batched, context_masks
from ...training.activations.sites import neuron_hook
from ...training.bad_rows import BadTexts, BadTokens, counted
from ...training.recipe import TextSection
from ...training.text import Context, documents, packed
from ..probing.subject import ProbeTarget

POOLINGS = ("max", "mean")
# Entries of a document's row that are kept: those of most texts are fewer.
TOP_ENTRIES = 256
# Documents pooled together: sorted by length, they need little padding. Fewer of wide dictionaries.
WINDOW_DOCUMENTS, WINDOW_ENTRIES = 64, 1 << 24
PASS_CONTEXTS = 32
WORDS = "words"
# scipy.sparse.csr_array; Any because scipy's stubs are incomplete.
SparseRows = Any


@dataclass(frozen=True)
class PooledDocuments:
    """Pooled units of some documents, one row each.

    ``units`` holds ``latents``, ``dimensions``, ``words`` (counts) and, where the hook's block has an MLP, ``neurons``: entries
    from the width on are the negative parts. ``places`` are the documents' file and row.
    """

    units: dict[str, SparseRows]
    activation: np.ndarray  # (documents, d_in), mean over tokens
    tokens: np.ndarray  # (documents,)
    digests: np.ndarray  # (documents,) int64, of the texts
    places: np.ndarray  # (documents, 2)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, chosen: np.ndarray) -> "PooledDocuments":
        """Return some of the documents, by a mask or by their indices."""
        arrays = {each.name: getattr(self, each.name)[chosen] for each in fields(self) if each.name != "units"}
        return PooledDocuments({name: rows[chosen] for name, rows in self.units.items()}, **arrays)


def joined_documents(parts: Sequence[PooledDocuments]) -> PooledDocuments:
    """Return the documents of several parts; parts that were read before others know fewer words."""
    words = max(part.units[WORDS].shape[1] for part in parts)
    parts = [part if part.units[WORDS].shape[1] == words else with_words(part, words) for part in parts]
    units = {name: sparse.csr_array(sparse.vstack([part.units[name] for part in parts])) for name in parts[0].units}
    names = [each.name for each in fields(PooledDocuments) if each.name != "units"]
    return PooledDocuments(units, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def with_words(part: PooledDocuments, words: int) -> PooledDocuments:
    """Return documents whose rows of words are as long as a larger vocabulary."""
    own = part.units[WORDS]
    longer = sparse.csr_array((own.data, own.indices, own.indptr), shape=(own.shape[0], words))
    return replace(part, units=part.units | {WORDS: longer})


class Vocabulary:
    """Words of texts, numbered in the order in which they occur, as scikit-learn's ``CountVectorizer`` splits them.

    >>> Vocabulary().counts(["one two two"], grow=True).toarray().tolist()
    [[1, 2]]
    """

    def __init__(self, words: Sequence[str] = ()):
        self.numbers = {word: number for number, word in enumerate(words)}
        self._split: Callable[[str], list[str]] = CountVectorizer().build_analyzer()

    def counts(self, texts: Sequence[str], grow: bool) -> SparseRows:
        """Return the number of times each word occurs in each text; without ``grow``, unknown words are left out."""
        columns: list[int] = []
        starts = [0]
        for text in texts:
            for word in self._split(text):
                number = self.numbers.setdefault(word, len(self.numbers)) if grow else self.numbers.get(word)
                if number is not None:
                    columns.append(number)
            starts.append(len(columns))
        entries = (np.ones(len(columns), np.int32), np.array(columns, np.int64), np.array(starts, np.int64))
        found = sparse.csr_array(entries, shape=(len(texts), len(self.numbers)))
        found.sum_duplicates()
        return found


class PooledTable:
    """Pooled values of a window's documents, ``(documents, entries)``: the maximum or the sum over tokens."""

    def __init__(self, documents: int, entries: int, pooling: str, device: torch.device):
        self.pooling = pooling
        self.values = torch.zeros(documents, entries, device=device)

    def add_rows(self, owners: Tensor, x: Tensor) -> None:
        """Add dense rows ``(tokens, width)``, positive parts first, then negative ones."""
        parts = torch.cat([x.relu(), (-x).relu()], 1)
        if self.pooling == "max":
            self.values.scatter_reduce_(0, owners[:, None].expand_as(parts), parts, "amax")
        else:
            self.values.index_add_(0, owners, parts)

    def add_entries(self, owners: Tensor, columns: Tensor, values: Tensor) -> None:
        """Add single entries; negative values belong to the second half of the columns."""
        width = self.values.shape[1]
        places = owners * width + columns + (values < 0) * (width // 2)
        flat = self.values.view(-1)
        if self.pooling == "max":
            flat.scatter_reduce_(0, places, values.abs(), "amax")
        else:
            flat.index_add_(0, places, values.abs())

    def rows(self, tokens: Tensor, top: int) -> SparseRows:
        """Return the largest ``top`` entries of every document."""
        values = self.values if self.pooling == "max" else self.values / tokens[:, None].clamp_min(1)
        best = values.topk(min(top, values.shape[1]), dim=1)
        kept = best.values > 0
        counts = kept.sum(1).cpu().numpy()
        starts = np.concatenate([[0], np.cumsum(counts)])
        entries = (best.values[kept].cpu().numpy(), best.indices[kept].cpu().numpy(), starts)
        found: SparseRows = sparse.csr_array(entries, shape=tuple(values.shape))
        found.sort_indices()
        return found


class PoolReader:
    """Documents of a text with their pooled units, read in one pass of the model.

    Every document has contexts of its own. Documents without a token that counts are left out.

    Args:
        text: Section that names the files, with ``packing: separate``.
        pooling: ``max`` or ``mean`` over the document's tokens.
        vocabulary: Words; those of the text are added if ``grow``.
        bad: Counter of rows that cannot be read, if some were counted before.
    """

    def __init__(
        self,
        subject: ProbeTarget,
        text: TextSection,
        pooling: str,
        vocabulary: Vocabulary,
        grow: bool,
        top: int,
        bad: BadTexts | None = None,
    ):
        self.subject, self.text, self.pooling, self.top = subject, text, pooling, top
        self.vocabulary, self.grow = vocabulary, grow
        self.bad, self.bad_tokens = bad or BadTexts(text), BadTokens(subject.section)
        self.files: dict[str, int] = {}
        self._noted: dict[int, Any] = {}
        neurons = neuron_hook(subject.model, subject.hook)
        # Of transcoders and attention outputs, too: the neurons of the block that the dictionary reads.
        self.hooks = (subject.hook,) if neurons is None else (subject.hook, neurons)
        dictionary = subject.dictionary
        # Norm of what a unit of each latent writes, so that latents are compared in the activation's own units.
        self.norms = (dictionary.atoms * dictionary.out_scale).detach().float().norm(dim=-1)

    @property
    def skipped(self) -> list[str]:
        """Rows and tokens that were left out or repaired, in words."""
        found = self.bad.until(None) + self.bad_tokens.found
        return [counted(found)] if found else []

    def windows(self) -> Iterator[PooledDocuments]:
        """Yield the documents with their pooled units, some dozens at a time.

        Raises:
            ValueError: If the text cannot be read, or more of its rows are unreadable than its section allows.
        """
        masks = context_masks(self.subject.model, self.text, self.subject.section)
        at_once = max(1, min(WINDOW_DOCUMENTS, WINDOW_ENTRIES // (2 * self.subject.dictionary.n_latents)))
        pending: dict[int, list[Context]] = {}
        for context in packed(self._documents(), self.text, self.subject.model.tokenizer):
            number = int(context.document_ids[0])
            if number not in pending and len(pending) == at_once:
                yield from self._pooled(pending, masks)
                pending = {}
            pending.setdefault(number, []).append(context)
        if pending:
            yield from self._pooled(pending, masks)

    def _documents(self) -> Iterator[tuple[int, str]]:
        for number, document in documents(self.text, 0, lambda _: True, self.bad):
            self._noted[number] = document
            yield number, document

    @torch.no_grad()
    def _pooled(self, pending: dict[int, list[Context]], masks: Any) -> Iterator[PooledDocuments]:
        model, dictionary = self.subject.model, self.subject.dictionary
        place_of = {number: place for place, number in enumerate(pending)}
        device = model.device
        tokens = torch.zeros(len(pending), dtype=torch.int64, device=device)
        activation = torch.zeros(len(pending), dictionary.d_in, device=device)
        tables: dict[str, PooledTable] = {}

        def table(name: str, entries: int) -> PooledTable:
            if name not in tables:
                tables[name] = PooledTable(len(pending), entries, self.pooling, device)
            return tables[name]

        ordered = sorted(
            (each for some in pending.values() for each in some), key=lambda each: int((each.positions >= 0).sum())
        )
        for whole in batched(ordered, masks, PASS_CONTEXTS):
            batch, rows = _trimmed(whole).finite_activations(model, self.hooks, self.bad_tokens)
            numbers = batch.document_ids[batch.kept].tolist()
            if not numbers:
                continue
            owners = torch.tensor([place_of[number] for number in numbers], device=device)
            x = rows[self.subject.hook]
            tokens += torch.bincount(owners, minlength=len(pending))
            activation.index_add_(0, owners, x)
            table("dimensions", 2 * x.shape[1]).add_rows(owners, x)
            if len(self.hooks) > 1:
                table("neurons", 2 * rows[self.hooks[1]].shape[1]).add_rows(owners, rows[self.hooks[1]])
            code = self.subject.encode(x)
            fires = code.values != 0
            latents = code.latents[fires]
            table("latents", 2 * dictionary.n_latents).add_entries(
                owners[code.token_ids()[fires]], latents, code.values[fires].float() * self.norms[latents]
            )
        sources = [self._noted.pop(number) for number in place_of]
        for number in [number for number in self._noted if number < max(place_of)]:
            # A document without tokens has no context.
            del self._noted[number]
        if not tables:
            return
        units = {name: found.rows(tokens, self.top) for name, found in tables.items()}
        units[WORDS] = self.vocabulary.counts([self._words(source) for source in sources], self.grow)
        places = [(self.files.setdefault(str(source.place[0]), len(self.files)), source.place[1]) for source in sources]
        found = PooledDocuments(
            units,
            (activation / tokens[:, None].clamp_min(1)).cpu().numpy(),
            tokens.cpu().numpy(),
            np.array([text_digest(source) for source in sources], np.int64),
            np.array(places, np.int64),
        )
        yield found if bool((tokens > 0).all()) else found.rows((tokens > 0).cpu().numpy())

    def _words(self, source: Any) -> str:
        """Return a document's text; token ids are decoded."""
        return self.subject.model.tokenizer.decode(json.loads(source)) if source.kind == "tokens" else source


def text_digest(text: str) -> int:
    """Return a digest of a text that fits a column of int64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _trimmed(batch: ContextBatch) -> ContextBatch:
    """Return contexts without the padding that all of them share."""
    width = int((batch.document_ids >= 0).sum(1).max())
    arrays = {name: getattr(batch, name)[:, :width] for name in ("token_ids", "document_ids", "positions", "kept")}
    return replace(batch, **arrays, roles=None if batch.roles is None else batch.roles[:, :width])
