"""Memory of large temporary matrices, kept from step to step: fresh pages cost more time than the passes over them."""

import sys
import threading
import time

import numpy as np
import torch
from torch import Tensor

# Fresh memory is mapped page by page and zeroed: a product into it takes 1.2 to 1.7 times as long. More than this is not kept.
KEPT_BYTES = 1 << 30
# Codes become sparse as training goes on; what no step has used for so long is freed.
IDLE_SECONDS = 10.0
NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.bool: np.bool_}


class _Room:
    """Array that tensors are made from; torch holds a reference to it while a tensor shares its memory."""

    def __init__(self, size: int, kind: np.dtype):
        self.numbers = np.empty(size, kind)
        self.taken_at = time.monotonic()
        self._idle_count = self._references()

    @property
    def unused(self) -> bool:
        return self._references() == self._idle_count

    def _references(self) -> int:
        return sys.getrefcount(self.numbers)


class KeptMemory:
    """Pool of uninitialized matrices in main memory; one is handed out again once no tensor uses its memory.

    On other devices, and for dtypes that NumPy lacks, ``take`` allocates as torch does, and nothing is kept.

    >>> pool = KeptMemory()
    >>> first = pool.take(2, 3, torch.zeros(1))
    >>> place = first.data_ptr()
    >>> view = first[1:]
    >>> del first
    >>> pool.take(2, 3, torch.zeros(1)).data_ptr() == place  # The view is in use.
    False
    >>> del view
    >>> pool.take(3, 2, torch.zeros(1)).data_ptr() == place
    True

    Args:
        most_bytes: Size up to which memory is kept.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES):
        self.most_bytes = most_bytes
        self._rooms: list[_Room] = []
        self._lock = threading.Lock()

    def take(self, rows: int, columns: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialized ``(rows, columns)`` matrix on the device of ``like``, and of its dtype by default."""
        dtype = dtype or like.dtype
        if like.device.type != "cpu" or dtype not in NUMPY_DTYPES:
            return torch.empty(rows, columns, dtype=dtype, device=like.device)
        kind, size = np.dtype(NUMPY_DTYPES[dtype]), rows * columns
        with self._lock:
            for room in self._rooms:
                if room.numbers.size == size and room.numbers.dtype == kind and room.unused:
                    room.taken_at = time.monotonic()
                    return torch.from_numpy(room.numbers).view(rows, columns)
            room = _Room(size, kind)
            self._rooms.append(room)
            self._limit()
            return torch.from_numpy(room.numbers).view(rows, columns)

    def free_idle(self, seconds: float = IDLE_SECONDS) -> None:
        """Free the memory that was not taken for some time and that no tensor uses."""
        latest = time.monotonic() - seconds
        with self._lock:
            self._rooms = [room for room in self._rooms if room.taken_at > latest]

    @property
    def kept_bytes(self) -> int:
        """Size of all memory that the pool holds."""
        return sum(room.numbers.nbytes for room in self._rooms)

    def _limit(self) -> None:
        """Forget the oldest rooms, in use or not, until what is kept is small enough."""
        kept, total = [], 0
        for room in reversed(self._rooms):
            if total + room.numbers.nbytes <= self.most_bytes:
                kept.insert(0, room)
                total += room.numbers.nbytes
        self._rooms = kept


# Codes of a training step and their gradients.
kept_memory = KeptMemory()
