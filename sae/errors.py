"""Errors in one line: what was being done, which file, what is safe and what helps."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What helps where the operating system refuses a file.
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
    """A file could not be written. The message names it, and says what is safe and what helps.

    Args:
        path: The file that was to be there.
        reason: What the operating system said.
        remedy: What helps, as a sentence without its end.
        safe: What is not lost, in sentences.
    """

    def __init__(self, path: str | Path, reason: str, remedy: str, safe: str = "What was there before is unchanged."):
        super().__init__(f"{path}: could not be written ({reason}). {safe} {remedy}; then the same command goes on.")
        self.path, self.reason, self.remedy = path, reason, remedy

    def keeping(self, safe: str) -> "WriteError":
        """Return the same error with another account of what is not lost."""
        error = WriteError(self.path, self.reason, self.remedy, safe)
        error.errno = self.errno
        return error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name a file in the operating system's errors while it is written.

    Raises:
        WriteError: In place of every ``OSError``, with its ``errno``.
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
    """Note on errors that pass what was being done: ``doing("loading the model gpt2")``. Also a decorator."""
    try:
        yield
    except Exception as error:
        # The command line shows the first of these notes, the innermost.
        error.add_note(f"while {what}")
        raise


def operating_system_message(error: OSError) -> str:
    """Return what an error of the operating system means to a person: the file, the reason and what helps."""
    if error.errno is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    remedy = REMEDIES.get(error.errno)
    return f"{files}: {_reason(error)}.".removeprefix(": ") + (f" {remedy}; then the same command goes on." if remedy else "")


def _reason(error: OSError) -> str:
    return error.strerror or (os.strerror(error.errno) if error.errno else " ".join(str(error).split()))
