"""Watch of ranks to each other while each works on a part of its own: signals, requests to stop, ranks that hang.

Ranks in step with each other, as in training, learn all this from their collectives.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ..sae.ranks import RanksLostError
from .processes import TIMEOUT, beat, beats, heed
from .signals import Stopped, StopRequest

T = TypeVar("T")
# How often a waiting rank looks for signals, and any rank at the progress of the others.
POLL_SECONDS, WATCH_SECONDS = 0.1, 1.0


class Watch:
    """Watch of this rank to signals, and to the other ranks of its process group if it has joined one.

    Args:
        stop: Signals of this process.
        kept: Returns what is kept of the work if it is stopped, for the message.
    """

    def __init__(self, stop: StopRequest, kept: Callable[[], str]):
        self.stop, self.kept = stop, kept
        # Last beat of each other rank, and when it was first seen.
        self._seen: dict[int, tuple[str, float]] = {}
        self._looked = time.monotonic()

    def beat(self, place: str) -> None:
        """Record that this rank has reached a place of its work.

        Raises:
            Stopped: If this process, or another rank, was told to stop.
            RanksLostError: If another rank has made no progress for longer than the ranks' timeout, or has lost one.
        """
        beat(place)
        if number := heed(self.stop.signal_number):
            raise Stopped(number, self.kept())
        self._require_progress()

    def wait(self, call: Callable[[], T]) -> T:
        """Return the result of a call that waits for other ranks, for as long as they make progress.

        Raises:
            Stopped, RanksLostError: As ``beat`` does, and whatever the call raises.
        """
        if not dist.is_initialized():
            return call()
        ended: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                ended.put((call(), None))
            except BaseException as error:  # noqa: BLE001 - raised by the waiting thread
                ended.put((None, error))

        # A thread in a call of the process group hears no signal. It ends with the process at the latest.
        threading.Thread(target=run, name="sparsary-wait", daemon=True).start()
        while True:
            try:
                found, error = ended.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self.beat("waiting for another rank")
                continue
            if error is not None:
                raise error
            return found  # pyright: ignore[reportReturnType] - the result of `call`

    def _require_progress(self) -> None:
        """Raise ``RanksLostError`` if a rank has not beaten for longer than the timeout, by this rank's clock."""
        now = time.monotonic()
        if now - self._looked < WATCH_SECONDS:
            return
        if now - self._looked > 3 * WATCH_SECONDS:
            # This rank was held up itself and does not know for how long the others are silent.
            self._seen.clear()
        self._looked = now
        for rank, latest in beats().items():
            if latest != self._seen.get(rank, (None,))[0]:
                self._seen[rank] = (latest, now)
            elif now - self._seen[rank][1] > TIMEOUT.total_seconds():
                raise RanksLostError(f"rank {rank} made no progress for {TIMEOUT.total_seconds():.0f} s")
