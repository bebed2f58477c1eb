"""Shuffled batches of activations: from a store, from a live model, or from tensors a user brings.

Every stream is endless where its source allows, reads ahead in a background thread, and is resumed exactly from the
number of batches that were handed out.

A store is shuffled globally: position ``i`` of a pass reads row ``permute(i)``, a keyed bijection that is computed, not
stored, so every order of the whole store is reached with memory for a few batches only.
"""

import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.parallel import has_numba
from sae.metrics import Moments

from ..recipe import HarvestSection, TextSection
from ..text import BEGINNING, Context, Cursor, are_heldout, contexts
from . import harvest
from .memory import Memory
from .model import LanguageModel
from .shards import LABELS, Rows, Store

# Batches read together: enough for reads in ascending order to pay, little enough to forget.
WINDOW_BATCHES = 4
READ_AHEAD_BATCHES = 8


@dataclass(frozen=True)
class Origin:
    """The contexts a batch's rows were read from: row after row they are the ``kept`` positions.

    ``counted`` are the kept positions whose next token is of the same document, less the last position.
    """

    token_ids: Int[Tensor, "contexts positions"]
    kept: Bool[Tensor, "contexts positions"]
    counted: Bool[Tensor, "contexts predictions"]


@dataclass(frozen=True)
class Batch:
    """Tokens for one training step: ``x`` and, where the training needs them, ``target``, ``grad`` and ``origin``."""

    x: Float[Tensor, "tokens d_in"]
    target: Float[Tensor, "tokens d_out"] | None = None
    # At the output, whose width it has.
    grad: Float[Tensor, "tokens d_grad"] | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    origin: Origin | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        target = None if self.target is None else self.target.to(device, non_blocking=True)
        grad = None if self.grad is None else self.grad.to(device, non_blocking=True)
        return Batch(self.x.to(device, non_blocking=True), target, grad, self.labels, self.origin)

    def rows(self, part: slice) -> "Batch":
        """Some of the rows. A batch of whole contexts cannot be cut."""
        return Batch(
            self.x[part],
            None if self.target is None else self.target[part],
            None if self.grad is None else self.grad[part],
            {key: values[part] for key, values in self.labels.items()},
        )

    def followed_by(self, other: "Batch") -> "Batch":
        """Both batches' activations and gradients in one."""
        both = self.grad is not None and other.grad is not None
        return Batch(torch.cat([self.x, other.x]), grad=torch.cat([self.grad, other.grad]) if both else None)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def split(self, pieces: int) -> list["Batch"]:
        """Equal consecutive parts, for gradient accumulation. A batch of whole contexts cannot be cut."""
        if pieces == 1:
            return [self]
        size = self.x.shape[0] // pieces
        return [self.rows(slice(i * size, (i + 1) * size)) for i in range(pieces)]


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where each index of ``range(n)`` goes under the permutation named by ``key``.

    A Feistel network over the next even number of bits, walked until the result is below ``n`` (Black and Rogaway 2002).
    """
    half = max(2, (n - 1).bit_length() + 1) // 2
    keys = np.array([_mix(key * 8 + r & 0xFFFFFFFFFFFFFFFF) for r in range(6)], np.uint64)
    index = index.astype(np.uint64)
    if not has_numba():
        return _permute_plain(index, n, half, keys).astype(np.int64)
    # Imported on first use: the compiler takes a second.
    from sae.kernels.permuting import feistel

    out = np.empty_like(index)
    feistel(index, np.uint64(n), np.uint64(half), keys, out)
    return out.view(np.int64)


def _permute_plain(index: np.ndarray, n: int, half: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)

    def scramble(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & mask
        for round_key in keys:
            left, right = right, left ^ (_mix_array(right ^ round_key) & mask)
        return left << np.uint64(half) | right

    out = scramble(index)
    while (outside := out >= n).any():
        out[outside] = scramble(out[outside])
    return out


def _mix(z: int) -> int:
    """splitmix64's finaliser."""
    z = (z + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def _mix_array(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Stream(ABC):
    """Batches one after another; ``position()`` is all that a resume needs."""

    def __init__(self, batch_tokens: int):
        self.batch_tokens = batch_tokens
        self.batches = 0
        self.waited_seconds = 0.0
        self._queue: queue.Queue | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def produce(self, start: int) -> Iterator[Batch]:
        """Batches from number ``start`` on; runs in the background thread."""

    @abstractmethod
    def sample(self, tokens: int, skip: int = 0) -> Float[Tensor, "tokens d_in"]:
        """Up to so many shuffled inputs for initialisation and calibration, without moving the stream."""

    @abstractmethod
    def moments(self) -> Moments:
        """Mean and deviation of the inputs: exact for a store, from a sample otherwise."""

    def position(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {"batches": self.batches}

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from where ``position`` was taken."""
        self.close()
        self.batches = position["batches"]

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._start()
        assert self._queue is not None
        started = time.perf_counter()
        item = self._queue.get()
        self.waited_seconds += time.perf_counter() - started
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.batches += 1
        return item

    def _start(self) -> None:
        self._queue, self._stop = queue.Queue(READ_AHEAD_BATCHES), threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(self._queue, self._stop), daemon=True)
        self._thread.start()

    def _read_ahead(self, out: queue.Queue, stop: threading.Event) -> None:
        try:
            for item in self.produce(self.batches):
                if not _put(out, item, stop):
                    return
            _put(out, StopIteration(), stop)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer raises it
            _put(out, error, stop)

    def close(self) -> None:
        """End the background thread; the next batch starts it again."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None


def _put(out: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Wait for room, but not beyond the stream's closing."""
    while not stop.is_set():
        try:
            out.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


class StoreStream(Stream):
    """The rows of one split of a store, pass after pass, each pass in a new global order.

    With ``labels`` every batch also says token, document, position and offset of its rows; with ``gradients`` it holds
    the loss's gradient at the hook.
    """

    def __init__(
        self,
        store: Store,
        hook_in: str,
        batch_tokens: int,
        seed: int,
        split: str = "train",
        hook_out: str | None = None,
        labels: bool = False,
        gradients: bool = False,
    ):
        super().__init__(batch_tokens)
        self.store, self.hook_in, self.seed = store, hook_in, seed
        names = {"x": f"x:{hook_in}"}
        if hook_out is not None:
            names["target"] = f"x:{hook_out}"
        if gradients:
            if store.manifest["gradients"] != harvest.GRADIENT_KIND:
                raise ValueError(
                    f"harvest.gradients: {store.directory} holds {store.manifest['gradients']}, expected "
                    f"{harvest.GRADIENT_KIND}. Choose a new harvest.store and run: sparsary harvest RECIPE"
                )
            names["grad"] = f"grad:{hook_in}"
        self.rows = {role: Rows(store, split, name) for role, name in names.items()}
        # Training does not look at them, and each would cost as many reads as the activations do.
        self.labels = {name: Rows(store, split, name) for name in LABELS if labels}
        self.n = len(self.rows["x"])
        if batch_tokens > self.n:
            raise ValueError(
                f"batch_tokens: expected at most the {self.n} {split} tokens of {store.directory}, got {batch_tokens}. "
                "Lower batch_tokens or raise harvest.tokens."
            )

    def produce(self, start: int) -> Iterator[Batch]:
        size = self.batch_tokens
        memory = {role: Memory(*reader.empty(WINDOW_BATCHES * size).shape) for role, reader in self.rows.items()}
        for window in itertools.count(start, WINDOW_BATCHES):
            rows = self.order(window * size, WINDOW_BATCHES * size)
            read = {role: self._read(role, rows, memory[role].take()) for role in self.rows}
            labels = {name: reader.gather(rows) for name, reader in self.labels.items()}
            for i in range(WINDOW_BATCHES):
                part = slice(i * size, (i + 1) * size)
                here = {role: values[part] for role, values in read.items()}
                yield Batch(here["x"], here.get("target"), here.get("grad"), {k: v[part] for k, v in labels.items()})

    def order(self, start: int, count: int) -> np.ndarray:
        """Row numbers of the tokens ``start`` to ``start + count`` of the endless stream."""
        parts = []
        for number in range(start // self.n, (start + count - 1) // self.n + 1):
            begin = number * self.n
            within = np.arange(max(start - begin, 0), min(start + count - begin, self.n))
            parts.append(permute(within, self.n, self.seed * 1_000_003 + number))
        return np.concatenate(parts)

    def _read(self, role: str, rows: np.ndarray, out: np.ndarray) -> Tensor:
        if not self.rows[role].read(rows, out):
            bad = int(np.flatnonzero(~np.isfinite(out).all(-1))[0])
            path, row = self.rows[role].locate(int(rows[bad]))
            raise ValueError(f"{path}: {self.rows[role].name}: row {row} is not finite. Delete the store and harvest again.")
        return torch.from_numpy(out)

    def sample(self, tokens: int, skip: int = 0) -> Float[Tensor, "tokens d_in"]:
        # Pass -1: an order that training never uses.
        rows = permute(np.arange(skip, max(skip, min(skip + tokens, self.n))), self.n, self.seed * 1_000_003 - 1)
        return self._read("x", rows, self.rows["x"].empty(len(rows)))

    def moments(self) -> Moments:
        return self.store.moments(self.hook_in)

    def release(self) -> None:
        """Close the shards' files; the stream is over."""
        self.close()
        for reader in (*self.rows.values(), *self.labels.values()):
            reader.close()


class Buffers:
    """Training tokens straight from the model, buffer after buffer, at every hook that some stream reads.

    Streams that walk the text together share the work: the last few buffers are kept for those that come after the first.
    What a buffer holds depends on where it begins and on nothing else.
    """

    def __init__(self, model: LanguageModel, text: TextSection, section: HarvestSection, hooks: tuple[str, ...], keep: int = 1):
        self.model, self.text, self.section, self.hooks = model, text, section, hooks
        self.keep = keep
        self._kept: dict[Cursor, tuple[harvest.Rows, Cursor]] = {}
        self._making = self._from(BEGINNING)
        self._stands_at: Cursor | None = BEGINNING
        self._lock = threading.Lock()

    def after(self, cursor: Cursor) -> tuple[harvest.Rows, Cursor]:
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

    def _from(self, cursor: Cursor) -> Iterator[tuple[harvest.Rows, Cursor]]:
        """Buffer after buffer from a place in the text on, endlessly."""
        pieces: list[harvest.Rows] = []
        while True:
            found = 0
            for batch in harvest.batches(contexts(self.text, self.model.tokenizer, cursor), self.section.batch_contexts):
                pieces.append(self._training_rows(batch))
                found += len(pieces[-1])
                if sum(map(len, pieces)) >= self.section.live_buffer_tokens:
                    yield harvest.Rows.join(pieces), batch[-1].cursor
                    pieces = []
            if not found and cursor == BEGINNING:
                raise ValueError("text: no token is left to train on. Give longer text, or lower text.context_length.")
            cursor = BEGINNING

    def _training_rows(self, batch: list[Context]) -> harvest.Rows:
        rows = harvest.rows_of(self.model, batch, self.section, self.hooks)["train"]
        for name, values in rows.tensors.items():
            if not bool(torch.isfinite(values).all()):
                bad = int((~torch.isfinite(values)).any(-1).nonzero()[0])
                where = {key: int(labels[bad]) for key, labels in rows.labels.items()}
                raise ValueError(f"{name}: not finite ({where}). Set model.dtype: float32, or raise harvest.exclude_leading.")
        return rows


class LiveStream(Stream):
    """Straight from the model, nothing on disk: buffer after buffer of tokens, each shuffled and used up.

    The shuffle reaches as far as the buffer. A resume recomputes only the buffer it stopped in. Tokens of a buffer that do not
    fill a batch are dropped; the text starts over when it ends. ``source`` is for streams that share one.
    """

    def __init__(
        self,
        model: LanguageModel,
        text: TextSection,
        section: HarvestSection,
        hook_in: str,
        batch_tokens: int,
        seed: int,
        source: Buffers | None = None,
    ):
        super().__init__(batch_tokens)
        if section.live_buffer_tokens < batch_tokens:
            raise ValueError(
                f"harvest.live_buffer_tokens: expected at least batch_tokens = {batch_tokens}, "
                f"got {section.live_buffer_tokens}."
            )
        self.section, self.hook_in, self.seed = section, hook_in, seed
        self.source = source or Buffers(model, text, section, (hook_in,))
        # Batch number at which a buffer begins -> (buffer number, place in the text).
        self.buffers: dict[int, tuple[int, Cursor]] = {0: (0, BEGINNING)}
        self._sample: Tensor | None = None

    def produce(self, start: int) -> Iterator[Batch]:
        begin = max(number for number in self.buffers if number <= start)
        number, cursor = self.buffers[begin]
        while True:
            rows, cursor = self.source.after(cursor)
            batches = len(rows) // self.batch_tokens
            self.buffers[begin + batches] = (number + 1, cursor)
            if begin + batches > start:
                order = torch.from_numpy(permute(np.arange(len(rows)), len(rows), self.seed * 1_000_003 + number))
                shuffled = rows.at(self.hook_in).select(order)
                for i in range(max(start - begin, 0), batches):
                    part = shuffled.select(torch.arange(i * self.batch_tokens, (i + 1) * self.batch_tokens))
                    grad = part.tensors.get(f"grad:{self.hook_in}")
                    yield Batch(part.tensors[f"x:{self.hook_in}"], None, grad, part.labels)
            begin, number = begin + batches, number + 1

    def position(self) -> dict[str, Any]:
        begin = max(number for number in self.buffers if number <= self.batches)
        number, cursor = self.buffers[begin]
        return {"batches": self.batches, "begin": begin, "buffer": number, "cursor": list(cursor)}

    def seek(self, position: dict[str, Any]) -> None:
        super().seek(position)
        self.buffers = {position["begin"]: (position["buffer"], Cursor(*position["cursor"]))}

    def sample(self, tokens: int, skip: int = 0) -> Float[Tensor, "tokens d_in"]:
        if self._sample is None:
            rows, _ = self.source.after(BEGINNING)
            order = torch.from_numpy(permute(np.arange(len(rows)), len(rows), self.seed * 1_000_003 - 1))
            self._sample = rows.tensors[f"x:{self.hook_in}"][order]
        return self._sample[skip : skip + tokens]

    def moments(self) -> Moments:
        moments = Moments(self.sample(1).shape[1])
        moments.update(self.sample(self.section.live_buffer_tokens))
        return moments


class ContextStream(Stream):
    """Whole contexts straight from the model, in the order of the text, for objectives that run the model themselves.

    Every batch has exactly ``batch_tokens`` kept positions: of the last context, surplus ones are left as the model has
    them. Held-out documents and excluded positions are never kept.
    """

    def __init__(
        self,
        model: LanguageModel,
        text: TextSection,
        section: HarvestSection,
        hook_in: str,
        batch_tokens: int,
        seed: int,
        source: Buffers | None = None,
    ):
        super().__init__(batch_tokens)
        self.model, self.text, self.section, self.hook_in = model, text, section, hook_in
        # Batch number -> the place in the text where it begins.
        self.cursors: dict[int, Cursor] = {0: BEGINNING}
        self.rows = LiveStream(model, text, section, hook_in, batch_tokens, seed, source)

    def produce(self, start: int) -> Iterator[Batch]:
        number = max(known for known in self.cursors if known <= start)
        pieces: list[Context] = []
        kept = 0
        for context in self._endless(self.cursors[number]):
            here = int(self._keep([context]).sum())
            # The model need not run where nothing is learned.
            if here:
                pieces.append(context)
            kept += here
            if kept >= self.batch_tokens:
                # Before the batch is handed out: whoever has it may ask for the position.
                self.cursors[number + 1] = context.cursor
                if number >= start:
                    yield self._batch(pieces)
                number, pieces, kept = number + 1, [], 0

    def _endless(self, cursor: Cursor) -> Iterator[Context]:
        while True:
            found = False
            for context in contexts(self.text, self.model.tokenizer, cursor):
                found = found or bool(self._keep([context]).any())
                yield context
            if not found and cursor == BEGINNING:
                raise ValueError("text: no token is left to train on. Give longer text, or lower text.context_length.")
            cursor = BEGINNING

    def _keep(self, pieces: list[Context]) -> np.ndarray:
        token_ids = np.stack([context.token_ids for context in pieces])
        document_ids = np.stack([context.document_ids for context in pieces])
        special = frozenset(self.model.tokenizer.all_special_ids)
        drop = harvest.excluded(token_ids, document_ids, special, self.section)
        return ~drop & ~are_heldout(document_ids, self.section.heldout)

    def _batch(self, pieces: list[Context]) -> Batch:
        document_ids = np.stack([context.document_ids for context in pieces])
        kept = self._keep(pieces)
        kept &= (np.cumsum(kept).reshape(kept.shape)) <= self.batch_tokens
        counted = kept[:, :-1] & (document_ids[:, 1:] == document_ids[:, :-1])
        device = self.model.device
        token_ids = torch.from_numpy(np.stack([context.token_ids for context in pieces])).long().to(device)
        origin = Origin(token_ids, torch.from_numpy(kept).to(device), torch.from_numpy(counted).to(device))
        x = self.model.activations(token_ids, (self.hook_in,))[self.hook_in][origin.kept].float()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{self.hook_in}: an activation is not finite. Set model.dtype: float32.")
        return Batch(x, origin=origin)

    def position(self) -> dict[str, Any]:
        return {"batches": self.batches, "cursor": list(self.cursors[self.batches])}

    def seek(self, position: dict[str, Any]) -> None:
        super().seek(position)
        self.cursors = {position["batches"]: Cursor(*position["cursor"])}

    def sample(self, tokens: int, skip: int = 0) -> Float[Tensor, "tokens d_in"]:
        return self.rows.sample(tokens, skip)

    def moments(self) -> Moments:
        return self.rows.moments()


class TensorStream(Stream):
    """Batches cut from any iterable of ``(tokens, d_in)`` tensors, in the order they come.

    Items may also be pairs of activations and the loss's gradients there, of equal shape. A list or a data set is passed
    over again and again; an iterator ends with its last full batch. Resuming reads the iterable from its beginning, so it
    must give the same tensors again.
    """

    def __init__(self, tensors: Iterable[Tensor | tuple[Tensor, Tensor]], batch_tokens: int):
        super().__init__(batch_tokens)
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        self.once = iter(tensors) is tensors
        self.tensors = tensors
        # What `sample` took from an iterator must still be handed out afterwards.
        self._head: list[Tensor | tuple[Tensor, Tensor]] = []

    def produce(self, start: int) -> Iterator[Batch]:
        skip, size = start * self.batch_tokens, self.batch_tokens
        carried: Batch | None = None
        for batch in self._endless():
            taken = min(skip, batch.x.shape[0])
            skip, batch = skip - taken, batch.rows(slice(taken, None))
            if carried is not None:
                missing = size - carried.x.shape[0]
                carried, batch = carried.followed_by(batch.rows(slice(missing))), batch.rows(slice(missing, None))
                if carried.x.shape[0] < size:
                    continue
                yield carried
            whole = batch.x.shape[0] // size * size
            for i in range(0, whole, size):
                yield batch.rows(slice(i, i + size))
            carried = batch.rows(slice(whole, None))

    def _endless(self) -> Iterator[Batch]:
        number = 0
        while True:
            seen = 0
            for item in itertools.chain(self._head, self.tensors) if self.once else self.tensors:
                for name, tensor in zip(("activations", "gradients"), _pair(item), strict=True):
                    if tensor is None:
                        continue
                    if tensor.ndim != 2 or tensor.shape != _pair(item)[0].shape:
                        raise ValueError(f"{name}: tensor {number}: expected (tokens, d_in), got {tuple(tensor.shape)}.")
                    if not bool(torch.isfinite(tensor).all()):
                        row = int((~torch.isfinite(tensor)).any(-1).nonzero()[0])
                        raise ValueError(f"{name}: tensor {number}: row {row} is not finite.")
                batch = _as_batch(item)
                number, seen = number + 1, seen + batch.x.shape[0]
                yield batch
            if self.once or not seen:
                return

    def sample(self, tokens: int, skip: int = 0) -> Float[Tensor, "tokens d_in"]:
        # Of an iterator only what was taken before training is there to be sampled: the rest is for the training.
        head = not self.once or self.batches == 0
        found: list[Tensor] = []
        seen = 0
        for item in self._sampled(skip + tokens) if head else self._head:
            x = _pair(item)[0]
            part = x[max(skip - seen, 0) : max(skip + tokens - seen, 0)]
            if len(part):
                found.append(part.float())
            seen += x.shape[0]
            if seen >= skip + tokens:
                break
        if not seen:
            raise ValueError("activations: expected at least one tensor (tokens, d_in), got none.")
        return torch.cat(found) if found else torch.empty(0, self.sample(1).shape[1])

    def _sampled(self, tokens: int) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Items from the beginning, of an iterator those that are kept aside; more of it are taken until there are enough."""
        if not self.once:
            yield from self.tensors
            return
        have = 0
        for item in self._head:
            have += _pair(item)[0].shape[0]
        source = iter(self.tensors)
        while have < tokens and (item := next(source, None)) is not None:
            self._head.append(item)
            have += _pair(item)[0].shape[0]
        yield from self._head

    def moments(self) -> Moments:
        sample = self.sample(32_768)
        moments = Moments(sample.shape[1])
        moments.update(sample)
        return moments


def _pair(item: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return item if isinstance(item, tuple) else (item, None)


def _as_batch(item: Tensor | tuple[Tensor, Tensor]) -> Batch:
    """An item of a user's iterable, in float32."""
    x, grad = _pair(item)
    return Batch(x.float(), grad=None if grad is None else grad.float())
