"""Stream of batches from user-supplied tensors."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...sae.metrics import Moments
from ...sae.rows import as_rows
from ..bad_rows import NOT_FINITE, BadTokens
from ..content import Content
from ..recipe import HarvestSection
from .stream import WHOLE, ActivationBatch, ActivationStream, BatchPart, moments_of
from .vector_files import VectorFiles

MOMENT_TOKENS = 32_768
NAMES = ("x", "target", "grad")
DEFAULTS = HarvestSection()
FORMS = "tensors or arrays (tokens, d_in), pairs of them, or mappings with x, target and grad"

HINTS = {
    1: " Give tokens in batches: DataLoader(data, batch_size=1024), or tensor[None] for a single one.",
    3: " Join batch and position: tensor.flatten(0, 1).",
}
SLICE_TOKENS = 8192

# User-supplied activations: an iterable of `FORMS`, or one of them. Anything else raises an error that says so.
Activations = Any


class TensorStream(ActivationStream):
    """Stream of batches cut from any iterable of ``(tokens, d_in)`` tensors or arrays, in their order.

    Items may also be pairs: activations and the gradients of the loss there or, with ``targets``, activations, targets and
    optionally gradients. Or mappings with ``x``, ``target`` and ``grad``; ``target`` is required with ``targets`` and refused
    without. The key of a mapping with one entry is arbitrary. Pairs may be lists, as a ``DataLoader`` yields them.

    A list or a dataset is iterated repeatedly; an iterator ends with its last full batch. Resuming reads the iterable from
    its beginning, so it must yield the same tensors again. Tokens that are not finite are dropped and counted, subject to
    the limits in ``section``.
    """

    def __init__(
        self,
        tensors: Activations,
        batch_tokens: int,
        targets: bool = False,
        section: HarvestSection = DEFAULTS,
        part: BatchPart = WHOLE,
    ):
        super().__init__(batch_tokens, part)
        self.tensors, self.targets, self.section = _items(tensors), targets, section
        self.once = isinstance(self.tensors, Iterator)
        # Items that `sample` took from an iterator: training must still receive them.
        self._head: list[dict[str, Tensor]] = []
        # Where the last sample of an iterable ended: the item, and those after it.
        self._sampled_to: _Sampled | None = None
        self._sampling: Iterator[tuple[int, dict[str, Tensor]]] = iter(())
        self._widths: dict[str, int] = {}
        self._pass_tokens = 0

    def content(self) -> Content | None:
        return self.tensors.content if isinstance(self.tensors, VectorFiles) else None

    @property
    def distinct_tokens(self) -> int:
        return self._pass_tokens

    def seek(self, position: dict[str, Any]) -> None:
        super().seek(position)
        self._pass_tokens = position.get("distinct", self._pass_tokens)

    def produce(self, start: int) -> Iterator[ActivationBatch]:
        return map(self.part.of, self._whole_batches(start))

    def _whole_batches(self, start: int) -> Iterator[ActivationBatch]:
        skip, size = start * self.batch_tokens, self.batch_tokens
        carried: ActivationBatch | None = None
        skipped: Counter[str] = Counter()
        for batch in self._endless():
            if not skip:
                # Bad rows before a token already handed out were counted then.
                skipped += batch.skipped
            taken = min(skip, batch.x.shape[0])
            skip, batch = skip - taken, batch.rows(slice(taken, None))
            if carried is not None:
                missing = size - carried.x.shape[0]
                carried, batch = ActivationBatch.join([carried, batch.rows(slice(missing))]), batch.rows(slice(missing, None))
                if carried.x.shape[0] < size:
                    continue
                yield replace(carried, skipped=skipped)
                skipped = Counter()
            whole = batch.x.shape[0] // size * size
            for i in range(0, whole, size):
                yield replace(batch.rows(slice(i, i + size)), skipped=skipped)
                skipped = Counter()
            carried = batch.rows(slice(whole, None))

    def _endless(self) -> Iterator[ActivationBatch]:
        """Yield items, pass after pass; bad rows are counted in the first pass."""
        bad, passes = BadTokens(self.section), 0
        while True:
            # Every pass repeats the same rows, so their share is counted per pass.
            seen = bad.rows = bad.bad = 0
            head = self._head if self.once else []
            items = itertools.chain(head, map(self._named, self.tensors, itertools.count(len(head))))
            for number, item in enumerate(items):
                before = bad.bad
                batch = self._checked(item, number, bad)
                seen += batch.x.shape[0]
                yield replace(batch, skipped=+Counter({NOT_FINITE: 0 if passes else bad.bad - before}))
            passes += 1
            if self.once or not seen:
                return
            self._pass_tokens = seen

    def _named(self, item: Any, number: int) -> dict[str, Tensor]:
        """Return the tensors of item ``number`` by their names, in float32 on the CPU.

        Raises:
            ValueError: If it is none of ``FORMS``.
        """
        where = f"tensor {number}"
        if isinstance(item, Mapping):
            entries = {str(key): value for key, value in item.items()}
            if len(entries) == 1:
                # Datasets may use any name.
                entries = {"x": next(iter(entries.values()))}
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes) and 0 < len(item) <= len(NAMES):
            entries = dict(zip(NAMES if self.targets else ("x", "grad", "?"), item, strict=False))
        else:
            entries = {"x": item}
        if "x" not in entries or entries.keys() - set(NAMES):
            got = list(item) if isinstance(item, Mapping) else f"{len(entries)} parts"
            raise ValueError(f"activations: {where}: expected x, and target and grad if needed, got {got}.")
        if self.targets and "target" not in entries:
            raise ValueError(
                f'targets: {where}: expected targets for a transcoder, got activations only. Give {{"x": ..., "target": ...}}.'
            )
        if not self.targets and "target" in entries:
            raise ValueError(
                f"targets: {where}: expected none, because an SAE reconstructs x. Leave them out, or set dictionary.kind."
            )
        return {key: as_rows(value, f"activations: {where}") for key, value in entries.items()}

    def _checked(self, named: dict[str, Tensor], number: int, bad: BadTokens) -> ActivationBatch:
        """Return an item of the iterable as a batch, without the tokens that are not finite.

        Raises:
            ValueError: If a shape is wrong; the message names the tensor.
        """
        where = f"tensor {number}"
        x, like = named["x"], named.get("target", named["x"])
        forms = {"x": ("activations", "(tokens, d_in)"), "target": ("targets", "(tokens, d_out)")}
        for key, tensor in named.items():
            name, form = forms.get(key, ("gradients", "(tokens, d_out)" if self.targets else "(tokens, d_in)"))
            rows = "" if key == "x" or x.ndim != 2 else f" of {x.shape[0]} tokens"
            if tensor.ndim != 2 or tensor.shape[0] != x.shape[0] or (key == "grad" and tensor.shape != like.shape):
                raise ValueError(
                    f"{name}: {where}: expected {form}{rows}, got {tuple(tensor.shape)}.{HINTS.get(tensor.ndim, '')}"
                )
            width = self._widths.setdefault(key, tensor.shape[1])
            if tensor.shape[1] != width:
                raise ValueError(f"{name}: {where}: expected width {width}, as before, got {tensor.shape[1]}.")
        good = bad.usable(named.values())
        if good is None:
            bad.count(len(x))
        else:
            row = int((~good).nonzero()[0])
            name = next(key for key, tensor in named.items() if not bool(torch.isfinite(tensor[row]).all()))
            name = forms.get(name, ("gradients", ""))[0]
            bad.count(len(x), int((~good).sum()), f"{name}: {where}: row {row} is not finite", "Leave such tokens out.")
            named = {key: tensor[good] for key, tensor in named.items()}
        return ActivationBatch(named["x"], named.get("target"), named.get("grad"))

    def sample(self, tokens: int, skip: int = 0) -> ActivationBatch:
        found: list[ActivationBatch] = []
        seen, items = self._from(skip, tokens)
        for number, item in items:
            size = item["x"].shape[0]
            if seen + size > skip:
                # Bad tokens are counted when training reads them.
                batch = self._checked(item, number, BadTokens(self.section))
                found.append(batch.rows(slice(max(skip - seen, 0), skip + tokens - seen)))
            self._sampled_to = _Sampled(seen, number, item)
            seen += size
            if seen >= skip + tokens:
                break
        if not seen:
            raise ValueError("activations: expected at least one tensor (tokens, d_in), got none.")
        together = ActivationBatch.join(found) if found else self.sample(1).rows(slice(0))
        return ActivationBatch(together.x, together.target)

    def first(self, tokens: int) -> Tensor:
        """Return up to ``tokens`` first rows of the inputs as they are, with those that are not finite."""
        found: list[Tensor] = []
        for number, item in self._from(0, tokens)[1]:
            found.append(item["x"])
            self._sampled_to = _Sampled(sum(map(len, found[:-1])), number, item)
            if sum(map(len, found)) >= tokens:
                break
        return torch.cat(found)[:tokens]

    def _from(self, skip: int, tokens: int) -> tuple[int, Iterator[tuple[int, dict[str, Tensor]]]]:
        """Return numbered items and the tokens before them; consecutive samples read an iterable once, not from its start."""
        if self.once:
            # Once training has begun, only the items kept aside can be sampled: training needs the rest.
            return 0, enumerate(self._sampled(skip + tokens) if self.batches == 0 else self._head)
        last = self._sampled_to
        if last is not None and last.before <= skip:
            return last.before, itertools.chain([(last.number, last.item)], self._sampling)
        self._sampling = enumerate(map(self._named, self.tensors, itertools.count()))
        return 0, self._sampling

    def _sampled(self, tokens: int) -> Iterator[dict[str, Tensor]]:
        """Yield an iterator's items from the beginning; they are kept aside for training."""
        have = sum(item["x"].shape[0] for item in self._head)
        source = iter(self.tensors)
        while have < tokens and (item := next(source, None)) is not None:
            self._head.append(self._named(item, len(self._head)))
            have += self._head[-1]["x"].shape[0]
        yield from self._head

    def moments(self) -> Moments:
        return moments_of(self.sample(MOMENT_TOKENS).x)

    def target_moments(self) -> Moments:
        sample = self.sample(MOMENT_TOKENS)
        return moments_of(sample.x if sample.target is None else sample.target)


class _Sampled(NamedTuple):
    """The last item that was sampled from, its number, and the tokens before it."""

    before: int
    number: int
    item: dict[str, Tensor]


class _Slices:
    """Iterable over slices of an array, which can be iterated repeatedly."""

    def __init__(self, array: Any):
        self.array = array

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.array), SLICE_TOKENS):
            yield self.array[start : start + SLICE_TOKENS]


def _items(tensors: Activations) -> Any:
    """Return user-supplied activations as an iterable of items.

    Raises:
        ValueError: If they are not iterable.
    """
    if isinstance(tensors, Tensor | Mapping):
        # A single item.
        return [tensors]
    if hasattr(tensors, "__array__") and hasattr(tensors, "shape"):
        # Arrays of any library, possibly memory-mapped from a file larger than memory: read in slices.
        values = getattr(tensors, "values", tensors) if hasattr(tensors, "iloc") else tensors
        return _Slices(values) if len(values.shape) == 2 else [values]
    if isinstance(tensors, str | bytes | Path) or not (hasattr(tensors, "__iter__") or hasattr(tensors, "__getitem__")):
        hint = " Call it: activations=f()." if callable(tensors) else " Read files first: torch.load, numpy.load."
        raise ValueError(f"activations: expected an iterable of {FORMS}, got {type(tensors).__name__}.{hint}")
    return tensors
