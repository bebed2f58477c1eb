"""Start of several processes on this machine, by torch's own launcher."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

# Path of a file that a rank makes when it prints the message that ends the run; without one, the launcher tells.
TOLD_VARIABLE = "SPARSARY_TOLD"


def launch(processes: int, arguments: list[str]) -> int:
    """Run ``python -m sparsary ARGUMENTS`` in several processes that form one run, and return the exit status.

    Cores are divided among the processes, unless ``OMP_NUM_THREADS`` is set. For several nodes, call ``torchrun`` itself.

    Args:
        processes: Number of processes; with GPUs, one for each.

    Raises:
        ValueError: If there are fewer GPUs than processes.
        SystemExit: With a message, if a rank ended and none told why; without one, if a signal stopped the run and a rank
            told so.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if processes < 1:
        raise ValueError(f"--processes: expected at least 1, got {processes}.")
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"--processes: expected at most {torch.cuda.device_count()}, the GPUs of this machine, got {processes}."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # A launcher that is told to stop waits this long for the ranks to save.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    # Each process tells its own error; the launcher's table of them adds nothing.
    for name in list(logging.root.manager.loggerDict):
        # torch gives each of its loggers a level of its own.
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    with tempfile.TemporaryDirectory(prefix="sparsary-") as folder:
        told = Path(folder) / "told"
        os.environ[TOLD_VARIABLE] = str(told)
        try:
            elastic_launch(config, sys.executable)("-m", "sparsary", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if not told.exists():
                raise SystemExit(_ended(rank, processes, failure.exitcode)) from None
            # As a shell reports the death by a signal.
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        except SignalException as stopped:
            if told.exists():
                raise SystemExit(128 + int(stopped.sigval)) from None
            return 128 + int(stopped.sigval)
    return 0


def _ended(rank: int, processes: int, status: int) -> str:
    """Return the message on a rank that ended before any rank could tell why."""
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}, without a message"
    memory = " The system ends processes like this when memory runs out." if status == -signal.SIGKILL else ""
    return f"sparsary: rank {rank} of {processes} ended {how}.{memory} What was saved is kept; the same command continues."
