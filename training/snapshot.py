"""Copy of a run's tensors in host memory, from which a state is written while training continues."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .memory import free_bytes


class Snapshot:
    """Copy of named tensors in host memory, in buffers that later copies reuse. Tensors of a GPU are copied to pinned memory.

    >>> weights = torch.ones(2)
    >>> copied = Snapshot().take({"weights": weights})
    >>> weights.zero_(), copied["weights"]
    (tensor([0., 0.]), tensor([1., 1.]))
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if there is memory for a copy, or already a buffer for each tensor."""
        needed = sum(tensor.nbytes for name, tensor in tensors.items() if not self._fitting(name, tensor))
        return needed == 0 or needed <= free_bytes(torch.device("cpu"))

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the tensors, complete after ``wait``; the copies of an earlier call are overwritten."""
        copies = {}
        for name, tensor in tensors.items():
            if not self._fitting(name, tensor):
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            # In the order of the GPU's work, the next step comes after this copy.
            copies[name] = self._buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Wait until the GPU has made the copies of the last ``take``; may be called by another thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fitting(self, name: str, tensor: Tensor) -> bool:
        buffer = self._buffers.get(name)
        return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
