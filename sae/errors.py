"""One-line errors: the operation, the file, what is safe, and the remedy."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Remedies by error number of the operating system.
REMEDIES = {
    errno.ENOSPC: "Free space on that disk",
    errno.EDQUOT: "Free space, or raise the quota",
    errno.EFBIG: "Raise the limit on the size of files",
    errno.EACCES: "Make it writable, or choose another place",
    errno.EPERM: "Make it writable, or choose another place",
    errno.EROFS: "Choose a place that can be written",
    errno.EIO: "Check the disk",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
}
ANY_REMEDY = "Make room for it there, or choose another place"


class WriteError(OSError):
    """Error that a file could not be written; the message names the file, what is safe, and the remedy.

    Args:
        path: File that was to be written.
        reason: Message of the operating system.
        remedy: Remedy, as a sentence without the period.
        safe: What is not lost, in full sentences.
    """

    def __init__(self, path: str | Path, reason: str, remedy: str, safe: str = "What was there before is unchanged."):
        super().__init__(f"{path}: could not be written ({reason}). {safe} {remedy}; then the same command continues.")
        self.path, self.reason, self.remedy = path, reason, remedy

    def keeping(self, safe: str) -> "WriteError":
        """Return the same error with a different statement of what is not lost."""
        error = WriteError(self.path, self.reason, self.remedy, safe)
        error.errno = self.errno
        return error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the operating system's errors inside the block into ``WriteError`` for ``path``.

    Raises:
        WriteError: For every ``OSError``, with its ``errno``.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        written = WriteError(path, _reason(error), REMEDIES.get(error.errno or 0, ANY_REMEDY))
        written.errno = error.errno
        raise written from error


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Add a note of the current operation to exceptions that pass: ``doing("loading the model gpt2")``. Also a decorator."""
    try:
        yield
    except Exception as error:
        # The command line shows the first note, the innermost.
        error.add_note(f"while {what}")
        raise


def operating_system_message(error: OSError) -> str:
    """Return a readable message for an operating system error: file, reason, and remedy."""
    if error.errno is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    remedy = REMEDIES.get(error.errno)
    return f"{files}: {_reason(error)}.".removeprefix(": ") + (f" {remedy}; then the same command continues." if remedy else "")


def _reason(error: OSError) -> str:
    return error.strerror or (os.strerror(error.errno) if error.errno else " ".join(str(error).split()))
