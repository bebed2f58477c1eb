"""On what something was measured: said with every figure, because seconds mean nothing without it."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions, processor, threads (torch's own number if not given), commit, date."""
    from ..run import git_commit

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sparsary": sparsary_version(),
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
    }


def sparsary_version() -> str | None:
    """As installed; None from a source tree that is not."""
    try:
        return metadata.version("sparsary")
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """What the processor calls itself, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
