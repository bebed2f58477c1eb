"""Batches of tensors that a user brings."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...sae.metrics import Moments
from .stream import ActivationBatch, ActivationStream, moments_of

MOMENT_TOKENS = 32_768


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
        self._pass_tokens = 0

    @property
    def distinct_tokens(self) -> int:
        return self._pass_tokens

    def seek(self, position: dict[str, Any]) -> None:
        super().seek(position)
        self._pass_tokens = position.get("distinct", self._pass_tokens)

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
            self._pass_tokens = seen

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
