"""Start of several processes on this machine, by torch's own launcher."""

import logging
import os
import sys
import uuid


def launch(processes: int, arguments: list[str]) -> int:
    """Run ``python -m sparsary ARGUMENTS`` in several processes that form one run, and return the exit status.

    Cores are divided among the processes, unless ``OMP_NUM_THREADS`` is set. For several nodes, call ``torchrun`` itself.

    Args:
        processes: Number of processes; with GPUs, one for each.

    Raises:
        ValueError: If there are fewer GPUs than processes.
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
    # Each process tells its own error; the launcher's table of them adds nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
    try:
        elastic_launch(config, sys.executable)("-m", "sparsary", *arguments)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0
