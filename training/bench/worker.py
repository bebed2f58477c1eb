"""What a measured process does, ours or a peer's: it holds a step ready and takes it when told to.

Torch and the standard library only: a peer's process loads this file by its path, in an environment without our packages.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

BATCHES = 4
# What a kernel may count after a reset without having been asked for it: pages of this very look.
RESET_SLACK_BYTES = 4 << 20


@dataclass(frozen=True)
class BenchTask:
    """What one process measures; it travels as JSON on the command line. ``overrides`` are recipe keys, for ours only."""

    library: str
    family: str
    tokens: int
    d_in: int
    n_latents: int
    k: int
    threads: int
    product: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


def random_activations(tokens: int, d: int, generator: torch.Generator) -> Tensor:
    """Rows whose variance falls off as 1 / rank, as that of real activations roughly does; 1 per dimension on average."""
    scales = torch.arange(1, d + 1).float().rsqrt()
    return torch.randn(tokens, d, generator=generator) * (scales * (d / scales.pow(2).sum()).sqrt())


def held_bytes(parameters: Iterable[Tensor], state: Mapping[Any, Mapping[str, Any]]) -> int:
    """Size of parameters and optimizer state: what is there between steps as well."""
    moments = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
    distinct = {id(tensor): tensor for tensor in [*parameters, *moments]}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


class Turns:
    """This process's side of the conversation: an order a line comes in, an answer a line, in JSON, goes out."""

    def __init__(self, task: BenchTask):
        # Orders and answers have the pipes to themselves: what libraries print goes to stderr.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        torch.set_num_threads(task.threads)
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(0)
        self.batches = [random_activations(task.tokens, task.d_in, self.generator) for _ in range(BATCHES)]
        self._before: int | None = None
        self._peak_is_of_steps = False

    def build_from_here(self) -> None:
        """Libraries are imported and data are there: what memory is taken from now on is the model's and its step's."""
        # The first optimizer and the first backward pass load a good deal of torch, which is no library's doing.
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.sum().backward()
        torch.optim.Adam([weight]).step()
        self._before = memory_bytes("VmRSS")

    def steps(
        self, held: Callable[[], int], version: str | None = None, others: Mapping[str, Callable[[], object]] | None = None
    ) -> Iterator[Tensor]:
        """A batch for every step that is ordered; the step lasts until the next batch is asked for.

        ``held`` tells the bytes that stay between steps. ``others`` are further things that may be ordered, by name, and are
        timed alike.
        """
        self._answer(version=version)
        for number in itertools.count():
            self._wait(others or {})
            started = time.perf_counter()
            yield self.batches[number % BATCHES]
            seconds = time.perf_counter() - started
            self._answer(seconds=seconds, memory_bytes=self._step_bytes(held))

    def _wait(self, others: Mapping[str, Callable[[], object]]) -> None:
        """Return when a step is ordered; carry out everything else."""
        while order := sys.stdin.readline().strip():
            if order == "step":
                return
            if order == "settle":
                self._peak_is_of_steps = reset_peak()
                self._answer()
            else:
                started = time.perf_counter()
                others[order]()
                self._answer(seconds=time.perf_counter() - started)
        _leave()

    def _answer(self, **values: Any) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()

    def _step_bytes(self, held: Callable[[], int]) -> int | None:
        """Most bytes resident since the reset, less what was there before the model and what stays between steps."""
        peak = memory_bytes("VmHWM")
        if not self._peak_is_of_steps or peak is None or self._before is None:
            return None
        return peak - self._before - held()


def _leave() -> NoReturn:
    # Nobody is left to ask for anything. Whatever loop a library is in would go on to save what it trained.
    os._exit(0)


def memory_bytes(name: str) -> int | None:
    """VmRSS (resident now) or VmHWM (resident at most) of this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def reset_peak() -> bool:
    """Make VmHWM count from now on; False where that cannot be done, so that building the model would be counted too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    now, peak = memory_bytes("VmRSS"), memory_bytes("VmHWM")
    # Some sandboxes take the order and ignore it.
    return now is not None and peak is not None and peak <= now + RESET_SLACK_BYTES
