"""Shuffled batches of activations, from a store or from tensors a user brings; ``live.py`` has those from a live model.

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...sae.kernels.parallel import has_numba
from ...sae.metrics import Moments
from . import harvest
from .buffer_pool import Memory
from .contexts import Origin
from .shards import LABELS, ActivationStore, ColumnReader, RowReader

# Batches read together: enough for reads in ascending order to pay, little enough to forget.
WINDOW_BATCHES = 4
READ_AHEAD_BATCHES = 8
# Of tensors that a user brings.
MOMENT_TOKENS = 32_768


@dataclass(frozen=True)
class ActivationBatch:
    """Tokens for one training step: ``x`` and, where the training needs them, ``target``, ``grad`` and ``origin``.

    Without a ``target`` it is ``x`` that is to be reconstructed. ``grad`` is the loss's gradient at whichever it is.
    """

    x: Float[Tensor, "tokens d_in"]
    target: Float[Tensor, "tokens d_out"] | None = None
    grad: Float[Tensor, "tokens d_grad"] | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    origin: Origin | None = None

    def to(self, device: torch.device) -> "ActivationBatch":
        """The same batch on a device."""
        target = None if self.target is None else self.target.to(device, non_blocking=True)
        grad = None if self.grad is None else self.grad.to(device, non_blocking=True)
        return ActivationBatch(self.x.to(device, non_blocking=True), target, grad, self.labels, self.origin)

    def rows(self, part: slice | Tensor) -> "ActivationBatch":
        """Some of the rows. A batch of whole contexts cannot be cut."""
        return ActivationBatch(
            self.x[part],
            None if self.target is None else self.target[part],
            None if self.grad is None else self.grad[part],
            {key: values[part] for key, values in self.labels.items()},
        )

    @staticmethod
    def join(pieces: list["ActivationBatch"]) -> "ActivationBatch":
        """Activations, targets and gradients of several batches in one."""

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(piece, name) for piece in pieces]
            return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)

        x = joined("x")
        assert x is not None
        return ActivationBatch(x, joined("target"), joined("grad"))

    def split(self, pieces: int) -> list["ActivationBatch"]:
        """Equal consecutive parts, for gradient accumulation. A batch of whole contexts cannot be cut."""
        if pieces == 1:
            return [self]
        size = self.x.shape[0] // pieces
        return [self.rows(slice(i * size, (i + 1) * size)) for i in range(pieces)]


def side_by_side(columns: list[Tensor]) -> Tensor:
    """Tensors of the same tokens as one."""
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def moments_of(rows: Float[Tensor, "tokens d"]) -> Moments:
    """Mean and deviation of so many rows."""
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


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
    from ...sae.kernels.permuting import feistel

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


class ActivationStream(ABC):
    """Batches one after another; ``position()`` is all that a resume needs."""

    def __init__(self, batch_tokens: int):
        self.batch_tokens = batch_tokens
        self.batches = 0
        self.waited_seconds = 0.0
        self._queue: queue.Queue | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def produce(self, start: int) -> Iterator[ActivationBatch]:
        """Batches from number ``start`` on; runs in the background thread."""

    @abstractmethod
    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        """Up to so many shuffled inputs, and targets, for initialisation and calibration, without moving the stream."""

    @abstractmethod
    def moments(self) -> Moments:
        """Mean and deviation of the inputs: exact for a store, from a sample otherwise."""

    @abstractmethod
    def target_moments(self) -> Moments:
        """The same of what is to be reconstructed."""

    def position(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {"batches": self.batches}

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from where ``position`` was taken."""
        self.close()
        self.batches = position["batches"]

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> ActivationBatch:
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


class StoreStream(ActivationStream):
    """The rows of one split of a store, pass after pass, each pass in a new global order.

    ``x`` holds what ``hooks_in`` saw, side by side, and ``target`` what ``hooks_out`` saw, if those are others. With
    ``labels`` every batch also says token, document, position and offset of its rows; with ``gradients`` it holds the loss's
    gradient at ``hooks_out``.
    """

    def __init__(
        self,
        store: ActivationStore,
        hooks_in: tuple[str, ...],
        batch_tokens: int,
        seed: int,
        split: str = "train",
        hooks_out: tuple[str, ...] = (),
        labels: bool = False,
        gradients: bool = False,
    ):
        super().__init__(batch_tokens)
        self.store, self.seed = store, seed
        self.hooks_in, self.hooks_out = hooks_in, hooks_out or hooks_in
        store.require_hooks("dictionary.hook_in" if hooks_out else "dictionary.hook", self.hooks_in)
        store.require_hooks("dictionary.hook_out", self.hooks_out)
        names = {"x": [f"x:{hook}" for hook in self.hooks_in]}
        if self.hooks_out != self.hooks_in:
            names["target"] = [f"x:{hook}" for hook in self.hooks_out]
        if gradients:
            if store.manifest["gradients"] != harvest.GRADIENT_KIND:
                raise ValueError(
                    f"harvest.gradients: {store.directory} holds {store.manifest['gradients']}, expected "
                    f"{harvest.GRADIENT_KIND}. Choose a new harvest.store and run: sparsary harvest RECIPE"
                )
            names["grad"] = [f"grad:{hook}" for hook in self.hooks_out]
        self.rows = {role: ColumnReader(store, split, tensors) for role, tensors in names.items()}
        # Training does not look at them, and each would cost as many reads as the activations do.
        self.labels = {name: RowReader(store, split, name) for name in LABELS if labels}
        self.n = len(self.rows["x"])
        if batch_tokens > self.n:
            raise ValueError(
                f"batch_tokens: expected at most the {self.n} {split} tokens of {store.directory}, got {batch_tokens}. "
                "Lower batch_tokens or raise harvest.tokens."
            )

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        size = self.batch_tokens
        memory = {role: Memory(*reader.empty(WINDOW_BATCHES * size).shape) for role, reader in self.rows.items()}
        for window in itertools.count(start, WINDOW_BATCHES):
            rows = self.order(window * size, WINDOW_BATCHES * size)
            read = {role: self._read(role, rows, memory[role].take()) for role in self.rows}
            labels = {name: reader.gather(rows) for name, reader in self.labels.items()}
            for i in range(WINDOW_BATCHES):
                part = slice(i * size, (i + 1) * size)
                here = {role: values[part] for role, values in read.items()}
                yield ActivationBatch(here["x"], here.get("target"), here.get("grad"), {k: v[part] for k, v in labels.items()})

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
            bad, column = np.argwhere(~np.isfinite(out))[0].tolist()
            path, name, row = self.rows[role].locate(int(rows[bad]), column)
            raise ValueError(f"{path}: {name}: row {row} is not finite. Delete the store and harvest again.")
        return torch.from_numpy(out)

    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        # Pass -1: an order that training never uses.
        rows = permute(np.arange(skip, max(skip, min(skip + tokens, self.n))), self.n, self.seed * 1_000_003 - 1)
        sides = {
            role: self._read(role, rows, self.rows[role].empty(len(rows))) for role in ("x", "target") if role in self.rows
        }
        return ActivationBatch(sides["x"], sides.get("target"))

    def moments(self) -> Moments:
        return self.store.moments_of(self.hooks_in)

    def target_moments(self) -> Moments:
        return self.store.moments_of(self.hooks_out)

    def release(self) -> None:
        """Close the shards' files; the stream is over."""
        self.close()
        for reader in (*self.rows.values(), *self.labels.values()):
            reader.close()


# What a user may bring: activations, with gradients, or by name.
Item = Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor]


class TensorStream(ActivationStream):
    """Batches cut from any iterable of ``(tokens, d_in)`` tensors, in the order they come.

    Items may also be pairs of activations and the loss's gradients there, or mappings with ``x``, ``target`` and ``grad``,
    of which ``target`` is required if ``targets`` are, and refused if not. A list or a data set is passed over again and
    again; an iterator ends with its last full batch. Resuming reads the iterable from its beginning, so it must give the
    same tensors again.
    """

    def __init__(self, tensors: Iterable[Item], batch_tokens: int, targets: bool = False):
        super().__init__(batch_tokens)
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        self.once = iter(tensors) is tensors
        self.tensors, self.targets = tensors, targets
        # What `sample` took from an iterator must still be handed out afterwards.
        self._head: list[Item] = []
        self._widths: dict[str, int] = {}

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        skip, size = start * self.batch_tokens, self.batch_tokens
        carried: ActivationBatch | None = None
        for batch in self._endless():
            taken = min(skip, batch.x.shape[0])
            skip, batch = skip - taken, batch.rows(slice(taken, None))
            if carried is not None:
                missing = size - carried.x.shape[0]
                carried, batch = ActivationBatch.join([carried, batch.rows(slice(missing))]), batch.rows(slice(missing, None))
                if carried.x.shape[0] < size:
                    continue
                yield carried
            whole = batch.x.shape[0] // size * size
            for i in range(0, whole, size):
                yield batch.rows(slice(i, i + size))
            carried = batch.rows(slice(whole, None))

    def _endless(self) -> Iterator[ActivationBatch]:
        number = 0
        while True:
            seen = 0
            for item in itertools.chain(self._head, self.tensors) if self.once else self.tensors:
                batch = self._checked(item, number)
                number, seen = number + 1, seen + batch.x.shape[0]
                yield batch
            if self.once or not seen:
                return

    def _checked(self, item: Item, number: int) -> ActivationBatch:
        """An item of the iterable in float32.

        Raises:
            ValueError: If it is not what was agreed on, naming the tensor.
        """
        where = f"tensor {number}"
        named = _by_name(item)
        if "x" not in named or named.keys() - {"x", "target", "grad"}:
            raise ValueError(f"activations: {where}: expected x, target and grad, the last two if needed, got {list(named)}.")
        if self.targets and "target" not in named:
            raise ValueError(
                f'targets: {where}: a transcoder needs them, got activations only. Give {{"x": ..., "target": ...}}.'
            )
        if not self.targets and "target" in named:
            raise ValueError(
                f"targets: {where}: expected none, because an SAE reconstructs x. Leave them out, or set dictionary.kind."
            )
        x, like = named["x"], named.get("target", named["x"])
        forms = {"x": ("activations", "(tokens, d_in)"), "target": ("targets", "(tokens, d_out)")}
        for key, tensor in named.items():
            name, form = forms.get(key, ("gradients", "(tokens, d_out)" if self.targets else "(tokens, d_in)"))
            rows = "" if key == "x" or x.ndim != 2 else f" of {x.shape[0]} tokens"
            if tensor.ndim != 2 or tensor.shape[0] != x.shape[0] or (key == "grad" and tensor.shape != like.shape):
                raise ValueError(f"{name}: {where}: expected {form}{rows}, got {tuple(tensor.shape)}.")
            width = self._widths.setdefault(key, tensor.shape[1])
            if tensor.shape[1] != width:
                raise ValueError(f"{name}: {where}: expected width {width}, as before, got {tensor.shape[1]}.")
            if not bool(torch.isfinite(tensor).all()):
                row = int((~torch.isfinite(tensor)).any(-1).nonzero()[0])
                raise ValueError(f"{name}: {where}: row {row} is not finite.")
        values = {key: tensor.float() for key, tensor in named.items()}
        return ActivationBatch(values["x"], values.get("target"), values.get("grad"))

    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        # Of an iterator only what was taken before training is there to be sampled: the rest is for the training.
        head = not self.once or self.batches == 0
        found: list[ActivationBatch] = []
        seen = 0
        for number, item in enumerate(self._sampled(skip + tokens) if head else self._head):
            size = _by_name(item)["x"].shape[0]
            if seen + size > skip:
                batch = self._checked(item, number)
                found.append(batch.rows(slice(max(skip - seen, 0), skip + tokens - seen)))
            seen += size
            if seen >= skip + tokens:
                break
        if not seen:
            raise ValueError("activations: expected at least one tensor (tokens, d_in), got none.")
        together = ActivationBatch.join(found) if found else self.sample(1).rows(slice(0))
        return ActivationBatch(together.x, together.target)

    def _sampled(self, tokens: int) -> Iterator[Item]:
        """Items from the beginning, of an iterator those that are kept aside; more of it are taken until there are enough."""
        if not self.once:
            yield from self.tensors
            return
        have = 0
        for item in self._head:
            have += _by_name(item)["x"].shape[0]
        source = iter(self.tensors)
        while have < tokens and (item := next(source, None)) is not None:
            self._head.append(item)
            have += _by_name(item)["x"].shape[0]
        yield from self._head

    def moments(self) -> Moments:
        return moments_of(self.sample(MOMENT_TOKENS).x)

    def target_moments(self) -> Moments:
        sample = self.sample(MOMENT_TOKENS)
        return moments_of(sample.x if sample.target is None else sample.target)


def _by_name(item: Item) -> dict[str, Tensor]:
    if isinstance(item, Mapping):
        return dict(item)
    return dict(zip(("x", "grad"), item, strict=True)) if isinstance(item, tuple) else {"x": item}
