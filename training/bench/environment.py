"""Description of the hardware and software of a measurement, stored with every result."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(threads: int | None = None) -> dict[str, Any]:
    """Return versions, CPU, number of threads (torch's if not given), commit, and date."""
    from ..versions import git_commit

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
    """Return the installed version; None for an uninstalled source tree."""
    try:
        return metadata.version("sparsary")
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """Return the CPU's model name, or None if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
