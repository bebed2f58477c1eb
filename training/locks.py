"""Locks of folders that one process at a time may write to, and of a process that one run at a time may train in."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"


@dataclass(frozen=True, eq=False)
class _Run:
    """The run that trains in a process: its directory, and the name of its thread."""

    out_dir: str
    thread: str


class OneRun:
    """Process-wide lock of the run that is training. A second run is refused, and never waits.

    accelerate and torch's random generators have one state per process, so that runs in two threads would change each other's
    precision, gradient accumulation and random numbers.
    """

    def __init__(self) -> None:
        # By process, because a fork copies the entry, but not the thread that would remove it.
        self._runs: dict[int, _Run] = {}

    @contextmanager
    def training(self, out_dir: str) -> Iterator[None]:
        """Hold the lock while the context is open.

        Raises:
            ValueError: If another run of this process holds it.
        """
        own = _Run(out_dir, threading.current_thread().name)
        # Atomic, also among threads.
        other = self._runs.setdefault(os.getpid(), own)
        if other is not own:
            raise ValueError(
                f"{out_dir}: expected one run at a time in a process, got a second while {other.out_dir} trains in thread "
                f"{other.thread}. Wait for it, train both as one recipe with a grid, or start another process."
            )
        try:
            yield
        finally:
            del self._runs[os.getpid()]


@contextmanager
def locked(directory: Path, key: str) -> Iterator[None]:
    """Lock ``directory``, which is created if necessary, while the context is open.

    The lock belongs to the operating system and ends with the process, even if that is killed.

    Args:
        key: Recipe key of the directory, for error messages.

    Raises:
        ValueError: If another process holds the lock, or the directory is not writable.
    """
    lock = FileLock(directory / LOCK_FILE)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{key}: {directory} is in use by another process. Wait for it, or choose another {key}.") from None
    except OSError as error:
        raise _unwritable(directory, key, error) from None
    try:
        yield
    finally:
        lock.release()


def existing_parent(folder: Path) -> Path:
    """Return the folder itself or its nearest existing ancestor."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def require_writable(folder: Path, key: str) -> None:
    """Check that a folder can be written or created, without leaving anything behind.

    Args:
        key: Recipe key of the folder, for error messages.

    Raises:
        ValueError: If it cannot; the message gives the reason.
    """
    try:
        above = existing_parent(folder)
        # Permission bits are not enough: a superuser has them all, even on a read-only file system.
        with tempfile.TemporaryDirectory(prefix=".sparsary-", dir=above) as probe:
            Path(probe, *folder.absolute().relative_to(above).parts).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, key, error) from None


def _unwritable(folder: Path, key: str, error: OSError) -> ValueError:
    return ValueError(f"{key}: {folder} cannot be written ({error.strerror}). Choose another {key}.")
