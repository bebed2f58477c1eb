"""Ranks: the processes that share the work on a training batch."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

# Sums of more bytes than this take the group's own all-reduce, whose traffic per rank does not grow with the number of ranks.
GATHERED_BYTES = 1 << 20
DIGIT_BITS = 8
T = TypeVar("T")


class RanksLostError(RuntimeError):
    """Raised when other ranks do not answer: they ended, hang, or lost their connection."""


class Ranks:
    """Processes that each hold an equal part of a batch; by default this process alone, with the whole batch.

    All methods are collective: every rank calls them in the same order with tensors of the same shape. Results are the same on
    all ranks, bit for bit, because every rank adds the same numbers in the order of the ranks. ``sent_bytes`` counts the bytes
    that this rank has sent.

    >>> import torch
    >>> alone = Ranks()
    >>> alone.size, alone.rank, alone.mean(torch.tensor(3.0))
    (1, 0, tensor(3.))

    Args:
        group: Process group of ``torch.distributed``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sent_bytes = 0
        self._sending: deque[tuple[Tensor, dist.Work]] = deque()

    def gather(self, own: Shaped[Tensor, "*shape"]) -> list[Tensor]:
        """Return the tensor of every rank, in the order of the ranks; shapes must be equal."""
        if self.size == 1:
            return [own]
        own = own.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with naming_lost_ranks():
            dist.all_gather(parts, own, group=self.group)
        self.sent_bytes += own.numel() * own.element_size() * (self.size - 1)
        return parts

    def gather_rows(self, own: Shaped[Tensor, "rows *width"], counts: Sequence[int] | None = None) -> list[Tensor]:
        """Return the tensor of every rank; the number of rows may differ.

        Args:
            counts: Number of rows of every rank, if known; otherwise the ranks exchange them.
        """
        if self.size == 1:
            return [own]
        if counts is None:
            counts = [int(count) for count in self.gather(torch.tensor(len(own), device=own.device))]
        most = max(counts)
        padded = own.detach() if len(own) == most else torch.cat([own.detach(), own.new_zeros(most - len(own), *own.shape[1:])])
        return [part[:count] for part, count in zip(self.gather(padded), counts, strict=True)]

    def gather_into(self, room: Shaped[Tensor, "all *width"], own: Shaped[Tensor, "rows *width"]) -> None:
        """Write the tensors of all ranks, of equal shapes, one after another into ``room``: no copies, and no new memory."""
        own = own.detach().contiguous()
        # all_gather_into_tensor is its name before torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with naming_lost_ranks():
            gather(room, own, group=self.group)
        self.sent_bytes += own.numel() * own.element_size() * (self.size - 1)

    def exchange(self, own: Shaped[Tensor, "rows *width"], counts: Sequence[Sequence[int]]) -> Shaped[Tensor, "some *width"]:
        """Return the rows that all ranks send to this one, in the order of the ranks; gradients do not flow through it.

        Args:
            own: Rows for every rank, one after another.
            counts: ``counts[i][j]`` rows go from rank ``i`` to rank ``j``.
        """
        if self.size == 1:
            return own
        received = [row[self.rank] for row in counts]
        # As bytes: not every backend sends all types.
        sent = own.detach().contiguous().flatten(1) if own.ndim > 1 else own.detach().contiguous().unsqueeze(1)
        sent = sent.view(torch.uint8)
        room = sent.new_empty(sum(received), sent.shape[1])
        with naming_lost_ranks():
            dist.all_to_all_single(room, sent, received, list(counts[self.rank]), group=self.group)
        self.sent_bytes += (len(sent) - counts[self.rank][self.rank]) * sent.shape[1]
        return room.view(own.dtype).view(-1, *own.shape[1:]) if own.ndim > 1 else room.view(own.dtype).squeeze(1)

    def sum(self, own: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return the sum over ranks; gradients do not flow through it."""
        if self.size == 1:
            return own
        bytes_ = own.numel() * own.element_size()
        if bytes_ * self.size <= GATHERED_BYTES:
            return torch.stack(self.gather(own)).sum(0, dtype=own.dtype)
        total = own.detach().clone(memory_format=torch.contiguous_format)
        with naming_lost_ranks():
            dist.all_reduce(total, group=self.group)
        self.sent_bytes += 2 * bytes_ * (self.size - 1) // self.size
        return total

    def mean(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the mean over ranks; gradients do not flow through it."""
        return own if self.size == 1 else self.sum(own) / self.size

    def whole(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the mean over ranks with the gradient of this rank's part.

        A function of it, averaged over ranks, has the gradient of the function of the whole batch's mean.
        """
        return own if self.size == 1 else own + (self.mean(own) - own).detach()

    def reduced(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the sum over ranks of their contributions, each of which gets the sum's gradient."""
        return own if self.size == 1 else _Reduced.apply(own, self)  # pyright: ignore[reportReturnType]

    def shared(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the tensor itself, equal on all ranks; its gradient is the sum of those of all ranks' uses."""
        return own if self.size == 1 else _Shared.apply(own, self)  # pyright: ignore[reportReturnType]

    def least(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the minimum over ranks."""
        return own if self.size == 1 else torch.stack(self.gather(own)).amin(0)

    def total(self, count: int) -> int:
        """Return the sum of every rank's count, on the host."""
        return count if self.size == 1 else int(self.sum(torch.tensor(count, device=self._device())))

    def largest(self, own: int) -> int:
        """Return the largest of every rank's number, on the host."""
        return own if self.size == 1 else max(int(each) for each in self.gather(torch.tensor(own, device=self._device())))

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        self.total(0)

    def gather_objects(self, own: T) -> list[T]:
        """Return the picklable object of every rank, in the order of the ranks."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        with naming_lost_ranks():
            dist.all_gather_object(found, own, group=self.group)
        return found

    def from_first(self, own: T) -> T:
        """Return the first rank's picklable object on every rank."""
        if self.size == 1:
            return own
        shared = [own]
        with naming_lost_ranks():
            dist.broadcast_object_list(shared, group_src=0, group=self.group)
        return shared[0]

    def pass_on(self, numbers: Sequence[int]) -> None:
        """Send integers to the next rank, the last rank to the first, without waiting until they are received."""
        sent = torch.tensor(numbers, device=self._device())
        with naming_lost_ranks():
            work = dist.isend(sent, group_dst=(self.rank + 1) % self.size, group=self.group)
        assert work is not None
        # A tensor must exist until it is sent.
        self._sending.append((sent, work))
        while self._sending[0][1].is_completed() and len(self._sending) > 1:
            self._sending.popleft()
        self.sent_bytes += sent.nbytes

    def passed_on(self, count: int) -> list[int]:
        """Return the next ``count`` integers that the previous rank passed on; wait for them."""
        received = torch.empty(count, dtype=torch.long, device=self._device())
        with naming_lost_ranks():
            dist.recv(received, group_src=(self.rank - 1) % self.size, group=self.group)
        return received.tolist()

    def _device(self) -> torch.device:
        """Return the device of tensors that the group's backend sends."""
        return (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        )


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(grads[0]), None


class Shards(Ranks):
    """Ranks that hold equal numbers of a dictionary's latents, in order, and work on the same tokens.

    Args:
        group: Process group of ``torch.distributed``.
        world: All ranks of the run: those of all shards and all parts of the batch.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, world: Ranks | None = None):
        super().__init__(group)
        self.world = world or Ranks()

    def selecting(self, ranks: Ranks) -> Ranks:
        """Return the ranks that choose together from a batch that is spread over ``ranks``."""
        return ranks if self.size == 1 else self.world

    def part(self, rows: Shaped[Tensor, "n_latents *width"], blocks: int = 1) -> Shaped[Tensor, "some *width"]:
        """Return this rank's rows of a tensor with one row per latent of the whole dictionary.

        Args:
            blocks: Number of equal blocks of latents, each of which is divided among the ranks.
        """
        if self.size == 1:
            return rows
        return rows.unflatten(0, (blocks, -1)).chunk(self.size, dim=1)[self.rank].flatten(0, 1)

    def joined(self, own: Shaped[Tensor, "some *width"], blocks: int = 1) -> Shaped[Tensor, "n_latents *width"]:
        """Return the rows of all ranks, of which ``part`` returned this one's; on the host, unless this rank has all."""
        if self.size == 1:
            return own
        return torch.cat([part.cpu().unflatten(0, (blocks, -1)) for part in self.gather(own)], dim=1).flatten(0, 1)


ALONE = Ranks()
UNDIVIDED = Shards()


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn an error of the process group into a ``RanksLostError``."""
    try:
        yield
    except RuntimeError as error:
        raise RanksLostError(" ".join(str(error).split())[:200]) from error


@torch.no_grad()
def largest_of_all(values: Float[Tensor, " n"], budget: int, ranks: Ranks) -> Bool[Tensor, " n"]:
    """Return a mask of the local values among the ``budget`` largest of all ranks; lower ranks win ties, then the first.

    The smallest value kept is found digit by digit: every rank counts its values by their next eight bits, and the sums of
    these counts say in which bin the budget ends. Communication: 2 KB per eight bits of the values' type, however many values
    there are, which may differ between ranks.
    """
    keys = ordered_keys(values)
    bits = 8 * values.element_size()
    prefix = torch.zeros((), dtype=torch.long, device=values.device)
    left = torch.tensor(budget, dtype=torch.long, device=values.device)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        here = (keys >> (shift + DIGIT_BITS)) == prefix
        digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
        counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.long, device=values.device).index_add_(0, digits, here.long())
        # Values with this digit or a larger one, from the largest digit down.
        from_top = ranks.sum(counts).flip(0).cumsum(0)
        place = (from_top < left).sum().clamp_max(len(from_top) - 1)
        left = left - torch.where(place > 0, from_top[place - 1], 0)
        prefix = (prefix << DIGIT_BITS) | (len(from_top) - 1 - place)
    over, equal = keys > prefix, keys == prefix
    if ranks.size > 1:
        tied = torch.stack(ranks.gather(equal.sum()))
        left = left - tied[: ranks.rank].sum()
    return over | (equal & (equal.cumsum(0) <= left))


@torch.no_grad()
def largest_of_shards(values: Float[Tensor, "tokens some"], k: int, shards: Ranks) -> Bool[Tensor, "tokens some"]:
    """Return a mask of each token's candidates that are among its ``k`` largest of all shards; lower shards win ties.

    Every shard passes its own ``k`` largest, or all its latents if there are fewer. Communication: these values.
    """
    everywhere = shards.gather(values)
    most = torch.cat(everywhere, dim=1)
    smallest = most.topk(min(k, most.shape[1]), dim=1, sorted=False).values.amin(1, keepdim=True)
    over, equal = values > smallest, values == smallest
    left = k - (most > smallest).sum(1, keepdim=True)
    before = sum((each == smallest).sum(1, keepdim=True) for each in everywhere[: shards.rank])
    # A NaN exceeds nothing; it stays, so that the loss shows it.
    return over | (equal & (equal.cumsum(1) + before <= left)) | values.isnan()


def ordered_keys(values: Float[Tensor, " n"]) -> Tensor:
    """Return non-negative integers in the order of floating-point values; NaN is above infinity, as in ``torch.topk``."""
    bits = 8 * values.element_size()
    if bits == 64:
        raise ValueError("values: expected 32 bits or fewer, got float64. Train in float32 on several processes.")
    # -0.0 equals 0.0, and a NaN may have a sign.
    values = torch.where(values.isnan(), torch.nan, values + 0.0)
    raw = values.view({16: torch.int16, 32: torch.int32}[bits]).long() & ((1 << bits) - 1)
    negative = raw >> (bits - 1) == 1
    return torch.where(negative, ((1 << bits) - 1) ^ raw, raw | (1 << (bits - 1)))
