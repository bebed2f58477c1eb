"""Streamed pass over held-out text that collects each latent's contexts, moments and histogram, and a sample of tokens.

Memory is bounded by a batch, by ``n_latents`` times the contexts kept, and by the entries of the sample, not by the length of
the text. Every random choice is a hash of the item itself, so the result does not depend on how text is batched.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ...sae.dictionary import SparseDictionary
from ...sae.sparse_code import SparseCode
from ...training.activations.contexts import ContextBatch, context_batches
from ...training.activations.model import LanguageModel
from ...training.bad_rows import BadTexts, BadTokens
from ...training.recipe import HarvestSection, TextSection
from ...training.stages import StageProgress

BATCH_CONTEXTS = 32
# Histogram bins of activations: four per octave, from 2^-16 to 2^16; values outside are counted in the outermost bins.
BINS_PER_OCTAVE, LOWEST_OCTAVE, N_BINS = 4, -16, 128
NO_TOKEN = -1
# Added to the mark of tokens outside the mask.
LEFT_OUT = 32
# Function of a batch of contexts, and the activations and the code of its kept tokens.
Watch = Callable[[ContextBatch, torch.Tensor, SparseCode], None]


@dataclass(frozen=True)
class Limits:
    """Limits on the data kept by a pass. A window holds ``before`` tokens, the token at its center, and ``after`` tokens.

    Per latent, the ``top`` strongest contexts are kept, and ``sample`` more drawn uniformly from all in which it fires.
    ``background`` windows are drawn from all text. A uniform sample of tokens is kept, with up to ``sample_entries`` entries.
    The default window is delphi's 32 tokens, three quarters of them before the peak (Paulo et al. 2024, arXiv:2410.13928).
    """

    top: int = 16
    sample: int = 40
    before: int = 23
    after: int = 8
    background: int = 400
    sample_entries: int = 2_000_000

    @property
    def width(self) -> int:
        return self.before + 1 + self.after


class Examples(NamedTuple):
    """Windows of text, with a latent's activation on each token.

    ``tokens`` and ``values`` are ``(..., width)``; beyond a context's ends tokens are -1. ``keys`` are the ranking keys, minus
    infinity for an empty slot. ``marks`` are ``(..., width)`` too: see ``marks_of``.
    """

    tokens: np.ndarray
    values: np.ndarray
    documents: np.ndarray
    keys: np.ndarray
    marks: np.ndarray | None = None


def marks_of(batch: ContextBatch) -> np.ndarray:
    """Return a mark for every token: its role's number plus 1, or 0 without a role; plus ``LEFT_OUT`` if it is not kept."""
    roles = np.zeros(batch.kept.shape, np.int8) if batch.roles is None else batch.roles + np.int8(1)
    return (roles + np.int8(LEFT_OUT) * ~batch.kept).astype(np.int8)


class Kept:
    """The ``keep`` examples with the largest keys for each of ``n`` latents, no two of them with the same tokens."""

    def __init__(self, n: int, keep: int, width: int):
        self.keep = keep
        self.keys = np.full((n, keep), -np.inf, np.float32)
        # Empty slots have distinct negative hashes (real ones are not negative), so none counts as a duplicate.
        self.hashes = np.broadcast_to(-1 - np.arange(keep, dtype=np.int64), (n, keep)).copy()
        self.documents = np.full((n, keep), -1, np.int32)
        self.tokens = np.full((n, keep, width), NO_TOKEN, np.int32)
        self.values = np.zeros((n, keep, width), np.float32)
        self.marks = np.zeros((n, keep, width), np.int8)

    def offer(
        self,
        latents: np.ndarray,
        keys: np.ndarray,
        hashes: np.ndarray,
        fetch: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    ) -> None:
        """Offer candidates, in any order; ``fetch`` returns tokens, values, documents and marks of those accepted."""
        if not self.keep:
            return
        better = np.flatnonzero(keys > self.keys.min(1)[latents])
        touched, place = np.unique(latents[better], return_inverse=True)
        # Existing examples come first, so that the earlier of two duplicates stays.
        owners = np.concatenate([np.repeat(np.arange(len(touched)), self.keep), place])
        all_keys = np.concatenate([self.keys[touched].ravel(), keys[better]])
        all_hashes = np.concatenate([self.hashes[touched].ravel(), hashes[better]])
        is_new = np.arange(len(owners)) >= len(touched) * self.keep
        order = np.lexsort((is_new, -all_keys, all_hashes, owners))
        repeated = np.zeros(len(order), bool)
        repeated[1:] = (np.diff(owners[order]) == 0) & (np.diff(all_hashes[order]) == 0)
        alive = order[~repeated]
        alive = alive[np.lexsort((is_new[alive], -all_keys[alive], owners[alive]))]
        begins = np.searchsorted(owners[alive], np.arange(len(touched)))
        stays = np.zeros(len(owners), bool)
        stays[alive[np.arange(len(alive)) - begins[owners[alive]] < self.keep]] = True
        # Each latent gives up as many slots as it fills, and both lists are ordered by latent.
        given_up = np.flatnonzero(~stays & ~is_new)
        taken = np.flatnonzero(stays & is_new)
        taken = taken[np.argsort(owners[taken], kind="stable")]
        rows, columns = touched[given_up // self.keep], given_up % self.keep
        chosen = better[taken - len(touched) * self.keep]
        self.keys[rows, columns], self.hashes[rows, columns] = keys[chosen], hashes[chosen]
        for array, found in zip((self.tokens, self.values, self.documents, self.marks), fetch(chosen), strict=True):
            array[rows, columns] = found

    def ranked(self) -> Examples:
        """Return all kept examples, each latent's largest key first."""
        order = np.argsort(-self.keys, axis=1, kind="stable")

        def arranged(array: np.ndarray) -> np.ndarray:
            return np.take_along_axis(array, order.reshape(order.shape + (1,) * (array.ndim - 2)), axis=1)

        return Examples(*map(arranged, (self.tokens, self.values, self.documents, self.keys, self.marks)))


class TokenSample(NamedTuple):
    """Uniform sample of the kept tokens, with their codes: token ``t`` has entries ``starts[t]:starts[t + 1]``.

    ``previous`` and ``following`` are the neighboring ids, -1 if there is none in the same document. ``repeated`` marks tokens
    that occurred before in their context and document.
    """

    tokens: np.ndarray
    previous: np.ndarray
    following: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    repeated: np.ndarray
    starts: np.ndarray
    latents: np.ndarray
    values: np.ndarray


class _Sampler:
    """Sample of the tokens whose hash is below a threshold, which is halved when there are too many entries."""

    def __init__(self, entries: int):
        self.entries, self.threshold = entries, 1.0
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(
        self, keys: np.ndarray, labels: tuple[np.ndarray, ...], counts: np.ndarray, entries: tuple[np.ndarray, ...]
    ) -> None:
        self.parts.append(self._below((keys, *labels, counts, *entries)))
        while sum(len(part[-1]) for part in self.parts) > self.entries:
            self.threshold /= 2
            self.parts = [self._below(part) for part in self.parts]

    def _below(self, part: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        *labels, counts, latents, values = part
        here = labels[0] < self.threshold
        entries = np.repeat(here, counts)
        return (*(array[here] for array in labels), counts[here], latents[entries], values[entries])

    def result(self) -> TokenSample:
        _, *labels, counts, latents, values = (np.concatenate(arrays) for arrays in zip(*self.parts, strict=True))
        tokens, previous, following, documents, offsets, repeated = labels
        starts = np.concatenate([[0], np.cumsum(counts)])
        return TokenSample(tokens, previous, following, documents, offsets, repeated, starts, latents, values)


class Background(NamedTuple):
    """Windows around tokens drawn from all text. ``fires[i]`` holds the latents that fire anywhere in window ``i``."""

    tokens: np.ndarray
    documents: np.ndarray
    fires: list[np.ndarray]


@dataclass(frozen=True)
class Collected:
    """Results of one pass. ``histogram[i]`` counts latent ``i``'s activations by bin; see ``bin_edges``."""

    tokens: int
    documents: int
    limits: Limits
    firings: np.ndarray
    sums: np.ndarray
    maxima: np.ndarray
    histogram: np.ndarray
    top: Examples
    sample: Examples
    background: Background
    token_sample: TokenSample

    @property
    def n_latents(self) -> int:
        return len(self.firings)

    @property
    def has_roles(self) -> bool:
        """True if tokens of chats are among the examples."""
        return any(of.marks is not None and bool((of.marks % LEFT_OUT).any()) for of in (self.top, self.sample))


def bin_edges() -> np.ndarray:
    """Return the ``N_BINS + 1`` edges of the histogram's bins."""
    return 2.0 ** (LOWEST_OCTAVE + np.arange(N_BINS + 1) / BINS_PER_OCTAVE)


def mixed(*parts: Any) -> np.ndarray:
    """Return a 63-bit hash of integers, arrays or scalars: the splitmix64 finalizer after each part."""
    with np.errstate(over="ignore"):
        z = np.uint64(0)
        for part in parts:
            z = (np.asarray(part).astype(np.int64).view(np.uint64) ^ z) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return np.asarray(z >> np.uint64(1)).astype(np.int64)


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Return 63-bit hashes as numbers between 0 and 1."""
    return (hashes / 2.0**63).astype(np.float32)


class Collector:
    """Running statistics of a dictionary's codes over batches of contexts."""

    def __init__(self, n_latents: int, limits: Limits | None = None, seed: int = 22):
        self.n_latents, self.limits, self.seed = n_latents, limits or Limits(), seed
        self.tokens = 0
        self.documents: set[int] = set()
        self.firings = np.zeros(n_latents, np.int64)
        self.sums = np.zeros(n_latents)
        self.maxima = np.zeros(n_latents, np.float32)
        self.histogram = np.zeros((n_latents, N_BINS), np.int64)
        self.top = Kept(n_latents, self.limits.top, self.limits.width)
        self.sample = Kept(n_latents, self.limits.sample, self.limits.width)
        # One pseudo-latent that fires everywhere: windows around random tokens.
        self.background = Kept(1, self.limits.background, self.limits.width)
        self.background_fires: dict[int, np.ndarray] = {}
        self.sampler = _Sampler(self.limits.sample_entries)

    def update(self, batch: ContextBatch, code: SparseCode) -> None:
        """Add a batch of contexts and the code of its kept tokens, in reading order."""
        kept = np.flatnonzero(batch.kept)
        if not len(kept):
            return
        self.tokens += len(kept)
        self.documents |= set(batch.document_ids.ravel()[kept].tolist())
        latents, places, values = _entries(code, kept, batch.token_ids.size)
        self._moments(latents, values)
        view = _View(batch, self.limits, latents, places, values)
        self._contexts(view)
        self._sample_tokens(view, kept)
        self._background(view, kept)

    def result(self) -> Collected:
        """Return the statistics. Raises ``ValueError`` if there was no token."""
        if not self.tokens:
            raise ValueError("text: expected held-out tokens, got none. Raise harvest.heldout, or give longer text.")
        tokens, _, documents, keys, _ = self.background.ranked()
        there = keys[0] > -np.inf
        hashes = np.take_along_axis(self.background.hashes, np.argsort(-self.background.keys, axis=1, kind="stable"), axis=1)[0]
        fires = [self.background_fires[value] for value in hashes[there].tolist()]
        return Collected(
            self.tokens,
            len(self.documents),
            self.limits,
            self.firings,
            self.sums,
            self.maxima,
            self.histogram,
            self.top.ranked(),
            self.sample.ranked(),
            Background(tokens[0][there], documents[0][there], fires),
            self.sampler.result(),
        )

    def _moments(self, latents: np.ndarray, values: np.ndarray) -> None:
        self.firings += np.bincount(latents, minlength=self.n_latents)
        self.sums += np.bincount(latents, values, minlength=self.n_latents)
        np.maximum.at(self.maxima, latents, values)
        bins = np.floor((np.log2(values.astype(np.float64)) - LOWEST_OCTAVE) * BINS_PER_OCTAVE).astype(np.int64)
        np.add.at(self.histogram.reshape(-1), latents * N_BINS + bins.clip(0, N_BINS - 1), 1)

    def _contexts(self, view: "_View") -> None:
        """Offer every latent the window around its strongest token in every context."""
        length = view.length
        # Entries are ordered by latent, then place, so those of one context are adjacent.
        groups = view.latents * view.n_contexts + view.places // length
        strongest = np.lexsort((view.places, -view.values, groups))
        firsts = np.ones(len(groups), bool)
        firsts[1:] = np.diff(groups[strongest]) != 0
        chosen = strongest[firsts]
        latents, centres = view.latents[chosen], view.places[chosen]
        hashes = view.hashes(centres)

        def fetch(which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            return view.windows(latents[which], centres[which])

        self.top.offer(latents, view.values[chosen], hashes, fetch)
        # Keyed by tokens and latent, so that a duplicate gets the same number and no second draw.
        self.sample.offer(latents, uniform(mixed(hashes, latents, self.seed)), hashes, fetch)

    def _sample_tokens(self, view: "_View", kept: np.ndarray) -> None:
        batch = view.batch
        documents, offsets = batch.document_ids.ravel()[kept], batch.positions.ravel()[kept]
        order = np.argsort(view.places, kind="stable")
        counts = np.bincount(np.searchsorted(kept, view.places), minlength=len(kept))
        labels = (batch.token_ids, *view.neighbours(), batch.document_ids, batch.positions, view.repeated())
        self.sampler.add(
            uniform(mixed(documents, offsets, self.seed + 1)),
            tuple(label.ravel()[kept] for label in labels),
            counts,
            (view.latents[order].astype(np.int32), view.values[order]),
        )

    def _background(self, view: "_View", kept: np.ndarray) -> None:
        hashes = view.hashes(kept)
        # Keyed by place, not by tokens: repeated text counts again, though only one such window is kept.
        keys = uniform(mixed(view.batch.document_ids.ravel()[kept], view.batch.positions.ravel()[kept], self.seed + 2))
        ordered = np.argsort(view.places, kind="stable")
        places = view.places[ordered]

        def fetch(which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            for index in which:
                low, high = view.bounds(int(kept[index]))
                here = ordered[np.searchsorted(places, low) : np.searchsorted(places, high)]
                self.background_fires[int(hashes[index])] = np.unique(view.latents[here])
            nobody = np.full(len(which), -1)
            return view.windows(nobody, kept[which])

        self.background.offer(np.zeros(len(kept), np.int64), keys, hashes, fetch)
        alive = set(self.background.hashes[0].tolist())
        self.background_fires = {key: fires for key, fires in self.background_fires.items() if key in alive}


class _View:
    """A batch with its entries ordered by latent and place, and windows into it."""

    def __init__(self, batch: ContextBatch, limits: Limits, latents: np.ndarray, places: np.ndarray, values: np.ndarray):
        self.batch, self.limits = batch, limits
        self.latents, self.places, self.values = latents, places, values
        self.n_contexts, self.length = batch.token_ids.shape
        self._keys = latents * batch.token_ids.size + places
        self._steps = np.arange(-limits.before, limits.after + 1)
        self._marks = marks_of(batch).ravel()

    def bounds(self, centre: int) -> tuple[int, int]:
        """Return the first place of a window and the place after its last."""
        first = centre - centre % self.length
        return max(first, centre - self.limits.before), min(first + self.length, centre + self.limits.after + 1)

    def _spots(self, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        spots = centres[:, None] + self._steps
        inside = spots // self.length == centres[:, None] // self.length
        # Windows include BOS, although it has no offset in its document, but no padding.
        spots = np.where(inside, spots, 0)
        return spots, inside & (self.batch.document_ids.ravel()[spots] >= 0)

    def tokens(self, centres: np.ndarray) -> np.ndarray:
        spots, inside = self._spots(centres)
        return np.where(inside, self.batch.token_ids.ravel()[spots], NO_TOKEN).astype(np.int32)

    def hashes(self, centres: np.ndarray) -> np.ndarray:
        """Return a hash of each window's tokens."""
        return mixed(*self.tokens(centres).T) if len(centres) else np.zeros(0, np.int64)

    def windows(self, latents: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens around each center, the latent's values on them, the center's document, and the tokens' marks."""
        spots, inside = self._spots(centres)
        keys = latents[:, None] * self.batch.token_ids.size + spots
        at = np.searchsorted(self._keys, keys).clip(max=max(len(self._keys) - 1, 0))
        found = inside & (self._keys[at] == keys) if len(self._keys) else np.zeros_like(inside)
        values = np.where(found, self.values[at] if len(self._keys) else 0.0, 0.0)
        marks = np.where(inside, self._marks[spots], 0)
        return self.tokens(centres), values.astype(np.float32), self.batch.document_ids.ravel()[centres], marks

    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the previous and the next token of each token, within the same document."""
        ids, owners = self.batch.token_ids, self.batch.document_ids
        previous, following = np.full_like(ids, NO_TOKEN), np.full_like(ids, NO_TOKEN)
        same = owners[:, 1:] == owners[:, :-1]
        previous[:, 1:] = np.where(same, ids[:, :-1], NO_TOKEN)
        following[:, :-1] = np.where(same, ids[:, 1:], NO_TOKEN)
        return previous, following

    def repeated(self) -> np.ndarray:
        """Return a mask of tokens that occurred before in their context and document."""
        ids, owners = self.batch.token_ids, self.batch.document_ids
        context = np.repeat(np.arange(self.n_contexts), self.length)
        order = np.lexsort((owners.ravel(), ids.ravel(), context))
        again = np.zeros(ids.size, bool)
        same = [np.diff(key.ravel()[order]) == 0 for key in (context, ids, owners)]
        again[order[1:]] = same[0] & same[1] & same[2]
        return again.reshape(ids.shape)


def _entries(code: SparseCode, kept: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return latent, place and value of all active entries, ordered by latent and place; duplicates are summed."""
    latents, values = code.latents.cpu().numpy().astype(np.int64), code.values.detach().float().cpu().numpy()
    places = kept[code.token_ids().cpu().numpy()]
    order = np.argsort(latents * size + places, kind="stable")
    keys = (latents * size + places)[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1)) if len(keys) else np.zeros(0, np.int64)
    totals = np.add.reduceat(values[order], firsts) if len(keys) else values
    fires = totals > 0
    keys = keys[firsts][fires]
    return keys // size, keys % size, totals[fires].astype(np.float32)


@dataclass(frozen=True)
class FeatureText:
    """Text source, and the hooks that a dictionary reads."""

    model: LanguageModel
    text: TextSection
    harvest: HarvestSection
    reads: tuple[str, ...] = field(default=())

    @cached_property
    def bad_texts(self) -> BadTexts:
        """Rows of the text that could not be read."""
        return BadTexts(self.text)

    @cached_property
    def bad_tokens(self) -> BadTokens:
        """Tokens at which the model's activations are not finite."""
        return BadTokens(self.harvest)

    @torch.no_grad()
    def batches(
        self, dictionary: SparseDictionary, tokens: int, watch: Watch | None = None
    ) -> Iterator[tuple[ContextBatch, SparseCode]]:
        """Yield held-out contexts and their codes until ``tokens`` tokens are kept; ``watch`` is called with each of them."""
        kept_tokens = 0
        contexts = context_batches(self.model, self.text, self.harvest, BATCH_CONTEXTS, heldout=True, bad=self.bad_texts)
        for some in contexts:
            batch, rows = some.finite_activations(self.model, self.reads, self.bad_tokens)
            x = torch.cat([rows[hook] for hook in self.reads], dim=-1)
            code = dictionary.encode(x)
            if watch is not None:
                watch(batch, x, code)
            yield batch, code
            kept_tokens += int(batch.kept.sum())
            if kept_tokens >= tokens:
                return


def collect_features(
    dictionary: SparseDictionary,
    batches_of_text: Iterable[tuple[ContextBatch, SparseCode]],
    limits: Limits | None = None,
    shown: StageProgress | None = None,
) -> Collected:
    """Collect the statistics of a dictionary in ``eval()`` mode over batches of text.

    Args:
        shown: StageProgress that is updated with the number of tokens read.

    Raises:
        ValueError: If the text holds no token.
    """
    collector = Collector(dictionary.n_latents, limits)
    for batch, code in batches_of_text:
        collector.update(batch, code)
        if shown is not None:
            shown.update(collector.tokens)
    return collector.result()
