"""Pool of reusable arrays. Fresh memory costs a page fault every 4 KB, which can take longer than filling it."""

import weakref

import numpy as np


class Memory:
    """Pool of float32 arrays of one shape; an array is reused once nothing refers to it."""

    def __init__(self, *shape: int):
        self.shape = shape
        self._free: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """Return an array with arbitrary contents."""
        owner = self._free.pop() if self._free else np.empty(self.shape, np.float32)
        handed = owner.view()
        # Tensors and views made from `handed` keep it alive: once it is collected, nothing refers to the memory.
        weakref.finalize(handed, self._free.append, owner).atexit = False
        return handed
