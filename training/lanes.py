"""Threads on which members of a grid take their steps at the same time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Self, TypeVar

import torch

Result = TypeVar("Result")


class Lanes:
    """Threads for tasks that are independent of each other, each with an equal share of torch's threads.

    A step of a small dictionary is too little work for several threads: half of the members after one another on each of two
    threads take much less time than all of them, one after the other, on both. A task rounds as it would alone with so many
    threads as a lane has.

    >>> with Lanes(3) as lanes:
    ...     lanes.run([lambda: "a", lambda: "b", lambda: "c"])
    ['a', 'b', 'c']

    Args:
        most: Number of lanes; torch's number of threads, if that is less.
    """

    def __init__(self, most: int):
        threads = torch.get_num_threads()
        self.count = max(1, min(threads, most))
        self.threads = max(1, threads // self.count)

    def __enter__(self) -> Self:
        # torch counts threads for each thread that calls it.
        start = partial(torch.set_num_threads, self.threads)
        self._pool = ThreadPoolExecutor(self.count, "sparsary-lane", start) if self.count > 1 else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run tasks and return their results in order; all of them end before the error of one is raised."""
        if self._pool is None:
            return [task() for task in tasks]
        with _torch_threads(self.threads):
            running = [self._pool.submit(task) for task in tasks]
            wait(running)
        return [each.result() for each in running]


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Limit torch to ``count`` threads: the limit of its matrix library holds for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
