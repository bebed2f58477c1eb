"""Folders that one process at a time may write to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"


@contextmanager
def locked(directory: Path, key: str) -> Iterator[None]:
    """Hold ``directory``, which is created if need be, while the context is open.

    The lock is the operating system's: it ends with the process that has it, however that ends.

    Args:
        key: The recipe's key that names the directory, for messages.

    Raises:
        ValueError: If another process holds it, or it is not writable.
    """
    lock = FileLock(directory / LOCK_FILE)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{key}: {directory} is in use by another process. Wait for it, or choose another {key}.") from None
    except OSError as error:
        raise ValueError(f"{key}: {directory} cannot be written ({error.strerror}). Choose another {key}.") from None
    try:
        yield
    finally:
        lock.release()
