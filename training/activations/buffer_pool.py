"""Memory used again. Fresh memory costs a page fault every 4 KB, which can take longer than filling it."""

import weakref

import numpy as np


class Memory:
    """float32 arrays of one shape, handed out again once nothing refers to them any more."""

    def __init__(self, *shape: int):
        self.shape = shape
        self._free: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """An array with arbitrary contents."""
        owner = self._free.pop() if self._free else np.empty(self.shape, np.float32)
        handed = owner.view()
        # Tensors and views made from it keep `handed` alive: when it goes, nobody can see the memory any more.
        weakref.finalize(handed, self._free.append, owner).atexit = False
        return handed
