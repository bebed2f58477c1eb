"""Processes of a run that are started without a launcher's delay, and what goes wrong in one of them at a chosen step.

A fork server imports the libraries once; each rank is a fork of it that calls the command line, with the environment that
``torchrun`` gives it. The caller holds the ranks' key-value store, as the launcher's agent does.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

# The caller decides how long a rank may be silent.
RANKS_TIMEOUT = "5"
# For hangs alone: far above what any fault takes on a busy machine.
LIMIT_SECONDS = 180.0


@dataclass(frozen=True)
class Sabotage:
    """A fault in one rank: ``what`` is the name of a function of this module, called when ``rank`` has finished ``step``."""

    what: str
    rank: int
    step: int
    # Instead of a step: the number of times that a file was synced, its tensors written, or a batch of text run.
    where: str = "step"


@dataclass(frozen=True)
class Ended:
    """Exit status of every rank, what they printed together, the parts of each, and the seconds until the last one ended."""

    statuses: list[int | None]
    output: str
    parts: list[str]
    seconds: float


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Stop answering, as a process that waits for a disk or a device for ever."""
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    """Stop working, while the process's other threads still answer."""
    time.sleep(LIMIT_SECONDS)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise ZeroDivisionError("something nobody foresaw")


def no_memory() -> None:
    raise MemoryError


def leave_early() -> None:
    """End without a word, as a library that calls exit()."""
    os._exit(3)


def cut_connections() -> None:
    """Shut down every connection to the other ranks; that to the key-value store stays."""
    kept = int(os.environ["MASTER_PORT"])
    for entry in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue
        with one:
            try:
                if kept not in (one.getpeername()[1], one.getsockname()[1]):
                    one.shutdown(socket.SHUT_RDWR)
            except (OSError, IndexError):
                continue


def disturb_weights() -> None:
    """Set a flag on which ``_arm`` changes a weight, as faulty memory would."""
    DISTURBED.append(True)


DISTURBED: list[bool] = []


def _arm(sabotage: Sabotage) -> None:
    """Let the training loop, or the writer of files, call the fault."""
    import torch

    from sparsary.sae import files
    from sparsary.training import loop
    from sparsary.training.activations import harvest

    if sabotage.where != "step":
        places = {"sync": (os, "fsync"), "write": (files, "_memory"), "batch": (harvest, "rows_of")}
        home, name = places[sabotage.where]
        real, calls = getattr(home, name), [0]

        def counted(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == sabotage.step:
                globals()[sabotage.what]()
            return real(*arguments)

        setattr(home, name, counted)
        return
    real_step = loop.step

    def step(member: Any, batch: Any, accelerator: Any) -> Any:
        terms = real_step(member, batch, accelerator)
        if member.state.step == sabotage.step:
            globals()[sabotage.what]()
            if DISTURBED:
                with torch.no_grad():
                    member.dictionary.W_dec[0, 0] += 1e-3
                DISTURBED.clear()
        return terms

    loop.step = step


def _rank(rank: int, size: int, port: int, arguments: list[str], output: str, sabotage: Sabotage | None, clock: float) -> None:
    """Be one rank of a run."""
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - the process's own
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["sparsary", *arguments]
    import sparsary

    if clock:
        real = time.time
        time.time = lambda: real() + clock
    if sabotage is not None and sabotage.rank == rank:
        _arm(sabotage)
    sparsary.main()


class RankServer:
    """Starter of ranks; makes the fork server at the first start."""

    def __init__(self) -> None:
        os.environ["SPARSARY_RANKS_TIMEOUT"] = RANKS_TIMEOUT
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.processes = multiprocessing.get_context("forkserver")
        self.started = False

    def _preload(self) -> None:
        """Let the fork server import, once, what the caller has imported: after a run of its own, all that a rank needs."""
        libraries = ("torch", "transformers", "numba", "accelerate", "sparsary", "rich", "pyarrow", "typer")
        self.processes.set_forkserver_preload([name for name in list(sys.modules) if name.partition(".")[0] in libraries])
        self.started = True

    def run(
        self,
        arguments: list[list[str]],
        folder: Path,
        sabotage: Sabotage | None = None,
        clocks: tuple[float, ...] = (),
        meanwhile: Any = None,
    ) -> Ended:
        """Run a command in as many ranks as there are lists of arguments, and return how they ended.

        Args:
            folder: Receives what each rank prints.
            sabotage: Fault in one of them.
            clocks: Seconds by which each rank's clock is wrong.
            meanwhile: Called with the list of processes once they run.
        """
        import torch.distributed as dist

        if not self.started:
            self._preload()
        size, begun = len(arguments), time.monotonic()
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False) if size > 1 else None
        outputs = [folder / f"rank{rank}.txt" for rank in range(size)]
        for output in outputs:
            output.unlink(missing_ok=True)
        started = []
        for rank, own in enumerate(arguments):
            clock = clocks[rank] if clocks else 0.0
            given = (rank, size, store.port if store else 0, own, str(outputs[rank]), sabotage, clock)
            started.append(self.processes.Process(target=_rank, args=given))
            started[-1].start()
        try:
            if meanwhile is not None:
                meanwhile(started)
            self._wait(started, sabotage)
        finally:
            statuses = [process.exitcode for process in started]
            for process in started:
                process.kill()
                process.join()
            del store
        parts = [output.read_text(encoding="utf-8", errors="replace") if output.exists() else "" for output in outputs]
        return Ended(statuses, "".join(parts), parts, time.monotonic() - begun)

    def _wait(self, started: list[Any], sabotage: Sabotage | None) -> None:
        """Wait for all ranks but one that hangs on purpose."""
        hanging = sabotage.rank if sabotage is not None and sabotage.what in ("hang", "sleep") else None
        deadline = time.monotonic() + LIMIT_SECONDS
        for rank, process in enumerate(started):
            if rank != hanging:
                process.join(max(0.0, deadline - time.monotonic()))
