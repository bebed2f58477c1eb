"""Ranks that are threads of one process, for tests of what ranks compute together."""

import copy
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from sparsary.sae.ranks import Ranks, Shards


class ThreadRanks(Ranks):
    """Rank of a group of threads; every collective meets at a barrier."""

    def __init__(self, rank, board, barrier, letters=None):
        super().__init__()
        self.rank, self.size = rank, barrier.parties
        self.board, self.barrier, self.letters = board, barrier, letters

    def gather(self, own):
        if self.size == 1:
            return [own]
        self.board[self.rank] = own.detach().clone()
        self.barrier.wait()
        shapes = {(tuple(part.shape), part.dtype) for part in self.board}
        assert len(shapes) == 1, f"ranks gather different tensors: {shapes}"
        parts = [part.clone() for part in self.board]
        self.barrier.wait()
        self.sent_bytes += own.numel() * own.element_size() * (self.size - 1)
        return parts

    def gather_into(self, room, own):
        torch.cat(self.gather(own), out=room)

    def exchange(self, own, counts):
        if self.size == 1:
            return own
        assert len(own) == sum(counts[self.rank])
        parts = [part.split(list(row))[self.rank] for part, row in zip(self.gather_objects(own.detach()), counts, strict=True)]
        return torch.cat(parts)

    def sum(self, own):
        return own if self.size == 1 else torch.stack(self.gather(own)).sum(0, dtype=own.dtype)

    def gather_objects(self, own):
        if self.size == 1:
            return [own]
        self.board[self.rank] = own
        self.barrier.wait()
        parts = copy.deepcopy(self.board)
        self.barrier.wait()
        return parts

    def from_first(self, own):
        return self.gather_objects(own)[0]

    def pass_on(self, numbers):
        self.letters[(self.rank + 1) % self.size].put(list(numbers))

    def passed_on(self, count):
        while True:
            try:
                numbers = self.letters[self.rank].get(timeout=0.2)
            except queue.Empty:
                if self.barrier.broken:
                    raise threading.BrokenBarrierError from None
                continue
            assert len(numbers) == count
            return numbers

    def _device(self):
        return torch.device("cpu")


class ThreadShards(ThreadRanks, Shards):
    """Shard of the latents, by threads."""

    def __init__(self, rank, board, barrier, world=None):
        ThreadRanks.__init__(self, rank, board, barrier)
        self.world = world or self


def on_mesh(parts, shards, function):
    """Return ``function(ranks, shards)`` of every rank of a mesh, in the order of the world's ranks."""
    boards = {("part", p): [None] * shards for p in range(parts)} | {("shard", s): [None] * parts for s in range(shards)}
    barriers = {key: threading.Barrier(len(board), timeout=600) for key, board in boards.items()}

    def run(world):
        part, shard = divmod(world.rank, shards)
        ranks = ThreadRanks(part, boards["shard", shard], barriers["shard", shard])
        try:
            return function(ranks, ThreadShards(shard, boards["part", part], barriers["part", part], world))
        except BaseException:
            for barrier in barriers.values():
                barrier.abort()
            raise

    return on_ranks(parts * shards, run)


def on_ranks(size, function):
    """Return ``function(ranks)`` of every rank. A rank that fails ends the others."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=600)
    letters = [queue.SimpleQueue() for _ in range(size)]

    def run(rank):
        try:
            return function(ThreadRanks(rank, board, barrier, letters))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(run, rank) for rank in range(size)]
        errors = [job.exception() for job in jobs]
    found = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    if found or any(errors):
        raise (found or [error for error in errors if error])[0]
    return [job.result() for job in jobs]
