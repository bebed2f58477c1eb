"""Worker side of a benchmarked process, sparsary's or a peer's: it prepares a step and runs it on request.

Uses only torch and the standard library: a peer's process loads this file by path, in an environment without sparsary.
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
# Memory that may be counted right after a reset: the pages used to read the counter.
RESET_SLACK_BYTES = 4 << 20


@dataclass(frozen=True)
class BenchTask:
    """Measurement of one process, passed as JSON on the command line.

    ``overrides`` are recipe keys, for sparsary only. With ``settled`` the data are sums of ``k`` of the dictionary's own
    directions and thresholds are such that ``k`` latents fire, as late in training; otherwise everything is as at its start.
    """

    library: str
    family: str
    tokens: int
    d_in: int
    n_latents: int
    k: int
    threads: int
    product: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    settled: bool = False


def random_activations(tokens: int, d: int, generator: torch.Generator) -> Tensor:
    """Return Gaussian rows with variance proportional to 1 / rank, roughly as in real activations, and 1 on average."""
    scales = torch.arange(1, d + 1).float().rsqrt()
    return torch.randn(tokens, d, generator=generator) * (scales * (d / scales.pow(2).sum()).sqrt())


def planted_directions(n_latents: int, d: int) -> Tensor:
    """Return random unit directions, the same ones in every call."""
    return torch.nn.functional.normalize(torch.randn(n_latents, d, generator=torch.Generator().manual_seed(1)), dim=-1)


def planted_activations(tokens: int, directions: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return rows that are sums of ``k`` random directions of exponentially distributed lengths, with a little noise."""
    n_latents, d = directions.shape
    chosen = torch.rand(tokens, n_latents, generator=generator).topk(k, dim=1).indices
    lengths = torch.empty(tokens, k).exponential_(generator=generator) + 0.5
    rows = torch.zeros(tokens, n_latents).scatter_(1, chosen, lengths) @ directions
    return rows + torch.randn(tokens, d, generator=generator) * (0.05 * rows.std())


def held_bytes(parameters: Iterable[Tensor], state: Mapping[Any, Mapping[str, Any]]) -> int:
    """Return the size of parameters and optimizer state, which persist between steps."""
    moments = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
    distinct = {id(tensor): tensor for tensor in [*parameters, *moments]}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def activations(task: BenchTask, tokens: int, generator: torch.Generator) -> Tensor:
    """Return rows like those that the task's steps train on."""
    if task.settled:
        return planted_activations(tokens, planted_directions(task.n_latents, task.d_in), task.k, generator)
    return random_activations(tokens, task.d_in, generator)


class Turns:
    """Worker end of the protocol: reads one order per line from stdin and writes one JSON answer per line to stdout."""

    def __init__(self, task: BenchTask):
        # Libraries that print to stdout must not disturb the protocol, so their output goes to stderr.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        torch.set_num_threads(task.threads)
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(0)
        self.batches = [activations(task, task.tokens, self.generator) for _ in range(BATCHES)]
        self._before: int | None = None
        self._peak_is_of_steps = False

    def build_from_here(self) -> None:
        """Record the memory baseline, after imports and data: memory used from now on belongs to the model and its steps."""
        # The first optimizer and backward pass load parts of torch, which should not count for any library.
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.sum().backward()
        torch.optim.Adam([weight]).step()
        self._before = memory_bytes("VmRSS")

    def steps(
        self,
        held: Callable[[], int],
        version: str | None = None,
        others: Mapping[str, Callable[[], object]] | None = None,
        counted: Mapping[str, float] | None = None,
    ) -> Iterator[Tensor]:
        """Yield a batch for each ordered step; a step lasts until the next batch is requested.

        Args:
            held: Returns the bytes that persist between steps.
            version: Version of the library, included in the first answer.
            others: Other named operations that may be ordered; they are timed in the same way.
            counted: Figures that the steps so far have filled in, included in every answer.
        """
        self._answer(version=version)
        for number in itertools.count():
            self._wait(others or {})
            started = time.perf_counter()
            yield self.batches[number % BATCHES]
            seconds = time.perf_counter() - started
            self._answer(seconds=seconds, memory_bytes=self._step_bytes(held), counted=dict(counted or {}))

    def _wait(self, others: Mapping[str, Callable[[], object]]) -> None:
        """Execute other orders until a step is ordered."""
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
        """Return the peak resident memory since the reset, minus the baseline and the bytes that persist between steps."""
        peak = memory_bytes("VmHWM")
        if not self._peak_is_of_steps or peak is None or self._before is None:
            return None
        return peak - self._before - held()


def _leave() -> NoReturn:
    # Exit at once: the library's training loop would otherwise go on and save its model.
    os._exit(0)


def memory_bytes(name: str) -> int | None:
    """Return VmRSS (resident now) or VmHWM (peak resident) of this process; None if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def reset_peak() -> bool:
    """Reset VmHWM; return False if that is impossible, so that the peak would include building the model."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    now, peak = memory_bytes("VmRSS"), memory_bytes("VmHWM")
    # Some sandboxes accept the write and ignore it.
    return now is not None and peak is not None and peak <= now + RESET_SLACK_BYTES
