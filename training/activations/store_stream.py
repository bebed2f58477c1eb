"""Stream of shuffled batches from a store, in a new global order for every pass."""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...sae.metrics import Moments
from ..content import Content
from .buffer_pool import Memory
from .shards import GRADIENT_KIND, LABELS, ActivationStore, ColumnReader, RowReader
from .shuffle import permute
from .stream import WHOLE, ActivationBatch, ActivationStream, BatchPart

# Batches read at once: enough for sorted reads to pay off, few enough for their memory not to matter.
WINDOW_BATCHES = 4


class StoreStream(ActivationStream):
    """Stream over the rows of one split of a store, in a new global order for every pass.

    ``x`` holds the activations at ``hooks_in``, concatenated along the feature axis, and ``target`` those at ``hooks_out`` if
    they differ. ``labels`` adds token, document, position and offset of every row; ``gradients`` adds the gradient of the LM
    loss at ``hooks_out``.
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
        part: BatchPart = WHOLE,
    ):
        super().__init__(batch_tokens, part)
        self.store, self.seed = store, seed
        # Counted by the harvest. Values in a store that are not finite were damaged later.
        self.skipped = Counter(store.manifest.get("skipped", {}))
        self.hooks_in, self.hooks_out = hooks_in, hooks_out or hooks_in
        store.require_hooks("dictionary.hook_in" if hooks_out else "dictionary.hook", self.hooks_in)
        store.require_hooks("dictionary.hook_out", self.hooks_out)
        names = {"x": [f"x:{hook}" for hook in self.hooks_in]}
        if self.hooks_out != self.hooks_in:
            names["target"] = [f"x:{hook}" for hook in self.hooks_out]
        if gradients:
            if store.manifest["gradients"] != GRADIENT_KIND:
                raise ValueError(
                    f"harvest.gradients: {store.directory} holds {store.manifest['gradients']}, expected "
                    f"{GRADIENT_KIND}. Choose a new harvest.store and run: sparsary harvest RECIPE"
                )
            names["grad"] = [f"grad:{hook}" for hook in self.hooks_out]
        self.rows = {role: ColumnReader(store, split, tensors) for role, tensors in names.items()}
        # Read only on request: training does not use them, and each costs as many reads as the activations.
        self.labels = {name: RowReader(store, split, name) for name in LABELS if labels}
        self.n = len(self.rows["x"])
        if batch_tokens > self.n:
            raise ValueError(
                f"batch_tokens: expected at most the {self.n} {split} tokens of {store.directory}, got {batch_tokens}. "
                "Lower batch_tokens or raise harvest.tokens."
            )

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        own = self.part.places(self.batch_tokens)
        size = len(own)
        memory = {role: Memory(*reader.empty(WINDOW_BATCHES * size).shape) for role, reader in self.rows.items()}
        for window in itertools.count(start, WINDOW_BATCHES):
            places = np.arange(window, window + WINDOW_BATCHES)[:, None] * self.batch_tokens + own
            rows = self.rows_at(places.reshape(-1))
            read = {role: self._read(role, rows, memory[role].take()) for role in self.rows}
            labels = {name: reader.gather(rows) for name, reader in self.labels.items()}
            for i in range(WINDOW_BATCHES):
                part = slice(i * size, (i + 1) * size)
                here = {role: values[part] for role, values in read.items()}
                yield ActivationBatch(here["x"], here.get("target"), here.get("grad"), {k: v[part] for k, v in labels.items()})

    def order(self, start: int, count: int) -> np.ndarray:
        """Return the row numbers of tokens ``start`` to ``start + count`` of the endless stream."""
        return self.rows_at(np.arange(start, start + count))

    def rows_at(self, places: np.ndarray) -> np.ndarray:
        """Return the row numbers at ascending places of the endless stream."""
        bounds = np.arange(places[0] // self.n, places[-1] // self.n + 1)
        parts = np.split(places, np.searchsorted(places, bounds[1:] * self.n))
        passes = zip(bounds.tolist(), parts, strict=True)
        return np.concatenate([permute(part - i * self.n, self.n, self.seed * 1_000_003 + i) for i, part in passes])

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

    def hook_widths(self) -> dict[str, int]:
        return {hook: self.store.width(hook) for hook in (*self.hooks_in, *self.hooks_out)}

    def heldout(self, tokens: int) -> ActivationBatch | None:
        if not self.store.tokens("heldout"):
            return None
        rows = StoreStream(self.store, self.hooks_in, 1, self.seed, "heldout", self.hooks_out)
        found = rows.sample(tokens)
        rows.release()
        return found

    def moments(self) -> Moments:
        return self.store.moments_of(self.hooks_in)

    def target_moments(self) -> Moments:
        return self.store.moments_of(self.hooks_out)

    def content(self) -> Content | None:
        return self.store.manifest.get("content")

    def release(self) -> None:
        """Close the shard files; the stream cannot be used afterwards."""
        self.close()
        for reader in (*self.rows.values(), *self.labels.values()):
            reader.close()
