"""Stop requests by signal. This module imports nothing slow, because the command line imports it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised when a signal stopped a run early; the same command resumes it.

    Args:
        kept: Sentence on where the run stopped, and what of it is saved.
    """

    def __init__(self, signal_number: int, kept: str):
        super().__init__(f"Stopped {kept} The same command continues.")
        self.signal_number = signal_number


class StopRequest:
    """Stop flag of a run, set by SIGINT and SIGTERM.

    Args:
        agree: Returns the largest signal number of all processes, given this one's, or 0.
    """

    def __init__(self, agree: Callable[[int], int] = int) -> None:
        self.signal_number: int | None = None
        self.agree = agree

    @property
    def requested(self) -> bool:
        """Return True if this process, or with ``agree`` any process of the run, got a signal; all ask in the same step."""
        self.signal_number = self.agree(self.signal_number or 0) or None
        return self.signal_number is not None

    @contextmanager
    def signals_deferred(self) -> Iterator[None]:
        """Defer SIGINT and SIGTERM to the end of the current step; a second signal interrupts immediately.

        Outside the main thread, as in a web application, signals are left alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, _frame: Any) -> None:
            if self.signal_number is not None:
                raise KeyboardInterrupt
            self.signal_number = number

        # A handler that was not installed from Python cannot be restored.
        ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
        previous = {number: signal.signal(number, request) for number in ours}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
