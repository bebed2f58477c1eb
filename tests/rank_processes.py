"""Ranks that are processes, forked from a server that has imported the libraries, for tests of what only processes do."""

import multiprocessing
import socket
import sys

# What every script begins with; `environment` is that of a launcher.
BEGIN = """
import os
os.environ.update(environment)
import torch
torch.set_num_threads(1)
"""


def preloaded():
    """Return the modules that processes need not import anew: those for training that this one has imported.

    Not all that tests before this one have imported: every architecture's modules, the evaluations and their libraries take
    longer than they save.
    """
    skipped = ("transformers.models.", "sparsary.eval")
    kept = ("transformers.models.auto", "transformers.models.gpt2")
    names = [name for name in list(sys.modules) if name.partition(".")[0] in ("torch", "transformers", "numba", "sparsary")]
    return [name for name in names if not name.startswith(skipped) or name.startswith(kept)]


def run_ranks(size, script, values):
    """Run a script in so many processes that form one run, and return their exit statuses.

    Args:
        values: Global names of the script; ``environment`` and ``rank`` are added. ``hanging`` is a rank that is killed as soon
            as all others have ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded())
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = []
    for rank in range(size):
        environment = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = values | {"environment": environment, "rank": rank}
        started.append(context.Process(target=exec, args=(BEGIN + script, given)))
        started[-1].start()
    # One that hangs on purpose ends when the others have.
    for rank, process in enumerate(started):
        if rank != values.get("hanging"):
            process.join()
    if "hanging" in values:
        started[values["hanging"]].kill()
        started[values["hanging"]].join()
    return [process.exitcode for process in started]
