"""Compiled loops over rows, divided among threads."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

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


def over_rows(kernel: Callable[..., None], rows: int, *arguments: Any, least: int = 1) -> None:
    """Run ``kernel(first, last, *arguments)`` on parts of ``range(rows)``, on as many threads as torch may use.

    Tensors are passed as arrays that share their memory. The kernel releases Python's lock and writes only to its own rows, so
    results do not depend on the partition. ``least`` is the minimum number of rows per part. Numba's own threads are not used,
    because they cannot be entered from two Python threads.
    """
    arrays = [each.detach().numpy() if isinstance(each, Tensor) else each for each in arguments]
    threads = torch.get_num_threads()
    size = max(least, -(-rows // (threads * PARTS_PER_THREAD)))
    if threads == 1 or rows <= size:
        kernel(0, rows, *arrays)
        return
    # An iterator gives each part to one thread.
    parts = iter(range(0, rows, size))

    def work() -> None:
        for first in parts:
            kernel(first, min(first + size, rows), *arrays)

    others = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
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
