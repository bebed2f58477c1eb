"""Compiled loops over rows, divided among threads."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

# More parts than threads, so that an interrupted thread delays the others only briefly.
PARTS_PER_THREAD = 4


@cache
def has_numba() -> bool:
    """Return True if numba is installed and works; checked at first use, because importing it takes a second."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        # An installed numba may be incompatible with the installed numpy.
        if find_spec("numba") is not None:
            log.warning("numba cannot be used (%s). torch code is used instead, which is slower.", error)
        return False
    return True


class _Loop(NamedTuple):
    """Compiled loop over ``rows``, and the minimum number of rows per part."""

    kernel: Callable[..., None]
    rows: int
    arrays: list[Any]
    least: int


# The loops that a thread has put off in `loops_together`.
_put_off = threading.local()


def over_rows(kernel: Callable[..., None], rows: int, *arguments: Any, least: int = 1) -> None:
    """Run ``kernel(first, last, *arguments)`` on parts of ``range(rows)``, on as many threads as torch may use.

    Tensors are passed as arrays that share their memory. The kernel releases Python's lock and writes only to its own rows, so
    results do not depend on the partition. ``least`` is the minimum number of rows per part. Numba's own threads are not used,
    because they cannot be entered from two Python threads.
    """
    loop = _Loop(kernel, rows, [_array(each) if isinstance(each, Tensor) else each for each in arguments], least)
    waiting: list[_Loop] | None = getattr(_put_off, "loops", None)
    if waiting is None:
        _run([loop])
    else:
        waiting.append(loop)


@contextmanager
def loops_together() -> Iterator[None]:
    """Put off all loops of this thread to the end of the block, where threads share them out as if they were one.

    Waking threads and waiting for the last takes about as long as a small loop. The loops must not need each other's results,
    nor the block theirs.
    """
    if getattr(_put_off, "loops", None) is not None:
        yield
        return
    loops: list[_Loop] = []
    _put_off.loops = loops
    try:
        yield
    finally:
        _put_off.loops = None
    _run(loops)


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()


def _run(loops: list[_Loop]) -> None:
    """Run loops on as many threads as torch may use."""
    threads = torch.get_num_threads()
    parts: list[tuple[_Loop, int, int]] = []
    for loop in loops:
        size = loop.rows if threads == 1 else max(loop.least, -(-loop.rows // (threads * PARTS_PER_THREAD)))
        parts += [(loop, first, min(first + size, loop.rows)) for first in range(0, loop.rows, max(size, 1))]
    # An iterator gives each part to one thread.
    coming = iter(parts)

    def work() -> None:
        for loop, first, last in coming:
            loop.kernel(first, last, *loop.arrays)

    others = [_pool(os.getpid()).submit(work) for _ in range(min(threads, len(parts)) - 1)]
    try:
        work()
    finally:
        # No thread may use the arrays after this call, even if it fails.
        for other in others:
            other.result()


@cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return this process's threads: threads do not survive a fork."""
    return ThreadPoolExecutor(thread_name_prefix="sparsary-kernel")
