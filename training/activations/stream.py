"""Batches of activations and the base class of their streams; each source has its own stream in a file of its own.

A stream is endless if its source allows, reads ahead in a background thread, and resumes exactly from the number of batches
that were handed out.
"""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...sae.metrics import Moments
from ..content import Content
from .contexts import Origin

READ_AHEAD_BATCHES = 8
T = TypeVar("T")


@dataclass(frozen=True)
class ActivationBatch:
    """Tokens for one training step: ``x`` and, if training needs them, ``target``, ``grad`` and ``origin``.

    Without a ``target``, ``x`` itself is reconstructed. ``grad`` is the gradient of the LM loss with respect to the
    reconstructed tensor. ``skipped`` counts the bad rows between the previous batch and this one.
    """

    x: Float[Tensor, "tokens d_in"]
    target: Float[Tensor, "tokens d_out"] | None = None
    grad: Float[Tensor, "tokens d_grad"] | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    origin: Origin | None = None
    skipped: Counter[str] = field(default_factory=Counter)

    def to(self, device: torch.device) -> "ActivationBatch":
        """Return the batch on a device."""
        target = None if self.target is None else self.target.to(device, non_blocking=True)
        grad = None if self.grad is None else self.grad.to(device, non_blocking=True)
        return ActivationBatch(self.x.to(device, non_blocking=True), target, grad, self.labels, self.origin)

    def rows(self, part: slice | Tensor) -> "ActivationBatch":
        """Return some of the rows. A batch of whole contexts cannot be split."""
        return ActivationBatch(
            self.x[part],
            None if self.target is None else self.target[part],
            None if self.grad is None else self.grad[part],
            {key: values[part] for key, values in self.labels.items()},
        )

    @staticmethod
    def join(pieces: list["ActivationBatch"]) -> "ActivationBatch":
        """Concatenate activations, targets and gradients of several batches."""

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(piece, name) for piece in pieces]
            return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)

        x = joined("x")
        assert x is not None
        return ActivationBatch(x, joined("target"), joined("grad"))

    def split(self, pieces: int) -> list["ActivationBatch"]:
        """Return equal consecutive parts, for gradient accumulation. A batch of whole contexts cannot be split."""
        if pieces == 1:
            return [self]
        size = self.x.shape[0] // pieces
        return [self.rows(slice(i * size, (i + 1) * size)) for i in range(pieces)]


def side_by_side(columns: list[Tensor]) -> Tensor:
    """Concatenate tensors of the same tokens along the feature axis."""
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def moments_of(rows: Float[Tensor, "tokens d"]) -> Moments:
    """Return mean and deviation of the rows."""
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


@dataclass(frozen=True)
class BatchPart:
    """Rows of every batch that one rank trains on: an equal, consecutive part of each of the batch's ``pieces``.

    Micro-batches of all ranks together are then those of a single process.

    >>> BatchPart(rank=1, ranks=2, pieces=2).places(8)
    array([2, 3, 6, 7])
    """

    rank: int = 0
    ranks: int = 1
    pieces: int = 1

    def places(self, tokens: int) -> np.ndarray:
        """Return the rows of a batch of ``tokens`` rows."""
        return np.arange(tokens).reshape(self.pieces, self.ranks, -1)[:, self.rank].reshape(-1)

    def of_all(self, world: int) -> list["BatchPart"]:
        """Return the parts of all ranks of a run, of which consecutive ones have the same part if they divide the latents."""
        return [replace(self, rank=rank * self.ranks // world) for rank in range(world)]

    def of(self, batch: ActivationBatch) -> ActivationBatch:
        """Return this rank's part of a whole batch."""
        if self.ranks == 1:
            return batch
        return replace(batch.rows(torch.from_numpy(self.places(len(batch.x)))), skipped=batch.skipped)


WHOLE = BatchPart()


class ReadAhead(Iterator[T]):
    """Iterator that a background thread is at most ``size`` items ahead of; its errors are raised where they are read."""

    def __init__(self, items: Iterator[T], size: int):
        self._room, self._stop = threading.Semaphore(size), threading.Event()
        self._queue: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, args=(items,), daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        item = self._queue.get()
        self._room.release()
        if isinstance(item, BaseException):
            raise item
        return item

    def _read(self, items: Iterator[T]) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stop.is_set():
                    return
                self._queue.put(next(items))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer raises it; StopIteration too
            self._queue.put(error)

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._room.release()
        if self._thread is not threading.current_thread():
            self._thread.join()


class ActivationStream(ABC):
    """Iterator over batches; ``position()`` is all that a resume needs. ``skipped`` counts the bad rows met so far.

    Args:
        batch_tokens: Tokens per training step, of all ranks.
        part: Part of every batch that the stream yields.
    """

    # False if batches are made as they are asked for, because the ranks exchange rows for them: in the order of the steps.
    reads_ahead = True
    # Number of batches that all runs together take, if known: nothing is computed ahead for later ones.
    needed: int | None = None

    def __init__(self, batch_tokens: int, part: BatchPart = WHOLE):
        self.batch_tokens, self.part = batch_tokens, part
        self.batches = 0
        self.skipped: Counter[str] = Counter()
        self.waited_seconds = 0.0
        self._coming: Iterator[ActivationBatch] | None = None

    @abstractmethod
    def produce(self, start: int) -> Iterator[ActivationBatch]:
        """Yield this rank's part of the batches from number ``start`` on; runs in a background thread if it ``reads_ahead``."""

    @abstractmethod
    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        """Return up to ``tokens`` shuffled rows for initialization and calibration, without moving the stream."""

    def start_sample(self, tokens: int) -> ActivationBatch:
        """Return a sample that initializes a run; from sources that cost compute, not more than a short run warrants."""
        return self.sample(tokens)

    @abstractmethod
    def moments(self) -> Moments:
        """Return mean and deviation of the inputs: exact for a store, estimated from many tokens otherwise."""

    @abstractmethod
    def target_moments(self) -> Moments:
        """Return mean and deviation of the reconstruction targets."""

    def hook_widths(self) -> dict[str, int]:
        """Return the widths of the hooks, empty if the source has none."""
        return {}

    def heldout(self, tokens: int) -> ActivationBatch | None:
        """Return up to ``tokens`` held-out rows, always the same; ``None`` if the source holds nothing out."""
        return None

    def content(self) -> Content | None:
        """Return the content of model, tokenizer and the text read so far; ``None`` if it is unknown."""
        return None

    @property
    def distinct_tokens(self) -> int:
        """Number of tokens in one pass over a source that is not a store; 0 until its end has been reached."""
        return 0

    def position(self) -> dict[str, Any]:
        """Return the position of the stream as JSON; includes the tokens per pass once the source has been repeated."""
        again = 0 < self.distinct_tokens < self.batches * self.batch_tokens
        skipped = {"skipped": dict(self.skipped)} if self.skipped else {}
        return {"batches": self.batches} | skipped | ({"distinct": self.distinct_tokens} if again else {})

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a saved ``position``."""
        self.close()
        self.batches, self.skipped = position["batches"], Counter(position.get("skipped", {}))

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> ActivationBatch:
        if self._coming is None:
            made = self.produce(self.batches)
            self._coming = ReadAhead(made, READ_AHEAD_BATCHES) if self.reads_ahead else made
        started = time.perf_counter()
        try:
            item = next(self._coming)
        except BaseException:
            self.close()
            raise
        self.waited_seconds += time.perf_counter() - started
        self.batches += 1
        self.skipped += item.skipped
        return item

    def close(self) -> None:
        """Stop the background thread; the next batch restarts it."""
        coming, self._coming = self._coming, None
        if isinstance(coming, ReadAhead | Generator):
            coming.close()
