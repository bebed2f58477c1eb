"""How a run is asked to stop, and how it says that it did; imports nothing that takes time, as the command line imports it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal ended the run early, after it had saved itself; the same command continues it."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"Stopped at step {step}; everything is saved. The same command continues.")
        self.signal_number = signal_number


class StopRequest:
    """``requested`` is set by SIGINT and SIGTERM."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def signals_deferred(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the loop after the current step instead of the process; a second one does not wait.

        In another thread than the main one, as in a web application, signals are left to whoever has the main one.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, _frame: Any) -> None:
            if self.signal_number is not None:
                raise KeyboardInterrupt
            self.signal_number = number

        # A handler that was not set from Python could not be put back.
        ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
        previous = {number: signal.signal(number, request) for number in ours}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
