"""Versions of the code that runs: of the package, and of the checkout if it is one."""

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


def own_version() -> str | None:
    """Return the version of the installed package; ``None`` if it is not installed."""
    try:
        return metadata.version("sparsary")
    except metadata.PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """Return the commit of this source checkout; ``None`` if it is not a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=False
        )
    except OSError:
        return None
    # For a copy installed inside another repository, git would report that repository's commit.
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else None
