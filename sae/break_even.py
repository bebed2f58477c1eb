"""Break-even density of sparse codes: above it dense products are faster; measured on the machine at hand at first use."""

import math
import threading
import time
from collections.abc import Callable

import torch

# Repetitions of each trial, in turn, so that other work on the machine slows both; the first one compiles and is not counted.
TRIALS = 3
# Shares are rounded to powers of two, so that the noise of measurements seldom changes them.
LEAST, MOST = 1 / 64, 1 / 2

_known: dict[str, float] = {}
_lock = threading.Lock()


# Returns work whose time is proportional to the density, the same work by dense products, and the density of the former.
Trial = Callable[[], tuple[Callable[[], object], Callable[[], object], float]]


def break_even(name: str, trial: Trial, device: torch.device) -> float:
    """Return the density at which two ways of computing the same take equally long, measured once per name and process.

    Args:
        name: Identifies what is measured: device, sizes, precision, threads.
        trial: Called if it has to be measured.
        device: Device of the work.
    """
    with _lock:
        if name not in _known:
            sparse, dense, share = trial()
            seconds = [[_timed(work, device) for work in (sparse, dense)] for _ in range(1 + TRIALS)][1:]
            slow, fast = (min(column) for column in zip(*seconds, strict=True))
            _known[name] = rounded_share(share * fast / max(slow, 1e-9))
        return _known[name]


def rounded_share(share: float) -> float:
    """Return the nearest power of two of a share, within the limits.

    >>> rounded_share(0.06), rounded_share(3.0), rounded_share(0.0)
    (0.0625, 0.5, 0.015625)
    """
    return 2.0 ** round(math.log2(min(max(share, LEAST), MOST)))


def known_break_evens() -> dict[str, float]:
    """Return what this process has measured; a training state keeps it, so that a resumed run takes the same paths."""
    return dict(_known)


def restore_break_evens(known: dict[str, float]) -> None:
    """Take over what another process has measured."""
    with _lock:
        _known.update(known)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
