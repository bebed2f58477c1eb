"""Compiled loops over rows, shared out among threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

# More parts than threads, so that a thread that is disturbed holds up the others only briefly.
PARTS_PER_THREAD = 4


@cache
def has_numba() -> bool:
    """Whether the compiler is installed; importing it takes a second and is left to the first use."""
    return find_spec("numba") is not None


def over_rows(kernel: Callable[..., None], rows: int, *arguments: Any, least: int = 1) -> None:
    """``kernel(first, last, *arguments)`` for parts of ``range(rows)``, on as many threads as torch may use.

    The kernel releases Python's lock and writes only to its own rows, so its results do not depend on the parts. ``least``
    rows are worth a part of their own. Numba's own threads are not used: theirs may not be entered from two of Python's.
    """
    threads = torch.get_num_threads()
    size = max(least, -(-rows // (threads * PARTS_PER_THREAD)))
    if threads == 1 or rows <= size:
        kernel(0, rows, *arguments)
        return
    # An iterator gives each part to one thread.
    parts = iter(range(0, rows, size))

    def work() -> None:
        for first in parts:
            kernel(first, min(first + size, rows), *arguments)

    others = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork: every process has its own."""
    return ThreadPoolExecutor(thread_name_prefix="sparsary-kernel")
