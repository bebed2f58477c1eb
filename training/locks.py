"""Folders that one process at a time may write to."""

import tempfile
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
        raise _unwritable(directory, key, error) from None
    try:
        yield
    finally:
        lock.release()


def existing_parent(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def require_writable(folder: Path, key: str) -> None:
    """Check that a folder can be written, or made; nothing is left behind.

    Args:
        key: The recipe's key that names the folder, for messages.

    Raises:
        ValueError: If it cannot, with the reason.
    """
    try:
        above = existing_parent(folder)
        # Asking for permissions would not do: a superuser has them all, also where nothing can be written.
        with tempfile.TemporaryDirectory(prefix=".sparsary-", dir=above) as probe:
            Path(probe, *folder.absolute().relative_to(above).parts).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, key, error) from None


def _unwritable(folder: Path, key: str, error: OSError) -> ValueError:
    return ValueError(f"{key}: {folder} cannot be written ({error.strerror}). Choose another {key}.")
