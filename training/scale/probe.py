"""Probe of this machine: the phases of the recipe's own step, the encoder product, and messages between processes.

Processes run at the same time, as in training, so that they share caches and memory bandwidth. Every figure is the least of
several rounds. On a CPU phases are timed by the processor time of the process, divided by its threads, so that other load on
the machine hardly counts; messages, which are waiting, by the clock.
"""

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import psutil
import torch
import torch.distributed as dist

from ...sae.checkpoint import build_dictionary
from ...sae.ranks import Ranks
from ..activations.model import resolve_device
from ..activations.stream import ActivationBatch, moments_of
from ..bench.worker import random_activations
from ..fused_adam import build_optimizer
from ..objective import AuxSettings, Objective
from ..phases import Phases
from ..recipe import Recipe
from ..recipe.encoder_checks import with_budget
from ..resolve_hooks import dictionary_arguments
from ..state import Randomness, TrainState
from .machine import Costs, Link, Machine
from .mesh import forward_work, update_work
from .sizes import RunSizes, sizes_of

# Multiply-adds of one probed step, and share of the free memory that all processes take: a larger recipe is probed in part.
MOST_MACS, MEMORY_SHARE = 1 << 37, 0.25
# Bytes of a parameter in a probe: weights, moments, a gradient.
PARAMETER_BYTES = 16
# Bytes of the two messages whose times give a connection's latency and bandwidth.
SMALL_MESSAGE, LARGE_MESSAGE = 1 << 10, 1 << 22
# Phases that are measured: the encoder product alone, encoding, forward and backward with it, and the optimizer.
PHASES = ("product", "encode", "passes", "update")
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 40, 20.0


@dataclass(frozen=True)
class ProbeTask:
    """Task of one probing process: a recipe with named hooks at ``n_latents`` (per layer) and two numbers of tokens."""

    recipe: Recipe
    widths: dict[str, int]
    n_latents: int
    few: int
    many: int
    l0: float | None
    processes: int
    threads: int
    rounds: int
    meeting: str = ""


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase of the step on few and on many tokens."""

    few: float
    many: float

    def line(self, few: int, many: int) -> tuple[float, float]:
        """Return the constant seconds and those of each token."""
        slope = max(0.0, self.many - self.few) / (many - few) if many > few else 0.0
        return max(0.0, self.few - slope * few), slope


@dataclass(frozen=True)
class ProbedCosts:
    """Seconds of one process: phases of the step, and messages to one neighbour of ``SMALL_MESSAGE`` and ``LARGE_MESSAGE``."""

    product: Phase
    encode: Phase
    passes: Phase
    update: Phase
    small: float
    large: float
    rounds: int


def mean_of(found: Sequence[ProbedCosts]) -> ProbedCosts:
    """Return the mean of the figures of processes, which do the same and differ by other load only."""
    phases = {}
    for name in PHASES:
        few, many = ([getattr(getattr(each, name), size) for each in found] for size in ("few", "many"))
        phases[name] = Phase(fmean(few), fmean(many))
    small, large = fmean(each.small for each in found), fmean(each.large for each in found)
    return ProbedCosts(**phases, small=small, large=large, rounds=min(each.rounds for each in found))


def probe_task(recipe: Recipe, widths: dict[str, int], run: RunSizes, devices: int, l0: float | None) -> ProbeTask:
    """Return a probe of a recipe that fits this machine: with fewer latents, and then fewer tokens, if it must.

    Args:
        recipe: Recipe with named hooks.
        run: Sizes of the run.
        devices: Number of devices to plan for; at most one process for each core is probed, and two of several.
    """
    cores = usable_cores()
    on_cpu = resolve_device(recipe.model.device).type == "cpu"
    most = max(2, cores) if on_cpu else torch.cuda.device_count()
    processes = min(devices, most)
    sizes = sizes_of(recipe, widths, l0)
    many = recipe.batch_tokens // recipe.accumulate
    free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info()[0] * processes
    room = MEMORY_SHARE * free / processes / PARAMETER_BYTES
    macs_per_token = forward_work(sizes, 1).macs
    shrink = max(1.0, sizes.parameters / room)
    # Small batches would hide the speed of the product.
    least_tokens = min(many, 512)
    shrink = max(shrink, macs_per_token * least_tokens / MOST_MACS)
    least = max(1, round(max(block.active for block in sizes.blocks)))
    n_latents = max(min(least, sizes.least_split), round(sizes.least_split / shrink))
    many = max(least_tokens, min(many, int(MOST_MACS / max(1, macs_per_token / shrink))))
    few = max(1, min(many // max(2, devices), many // 2))
    return ProbeTask(
        recipe, widths, n_latents, few, many, l0, processes, max(1, cores // devices) if on_cpu else cores, MOST_ROUNDS
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def probe_machine(task: ProbeTask) -> ProbedCosts:
    """Run a probe in its processes and return their mean figures.

    Raises:
        RuntimeError: If a process fails.
    """
    if task.processes == 1:
        threads = torch.get_num_threads()
        try:
            return _measure(task, None)
        finally:
            torch.set_num_threads(threads)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=task.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    # A failing process tells its own error; the launcher's table of them adds nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = elastic_launch(config, _probe_rank)(replace(task, meeting=str(Path(folder) / "meeting")))
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return mean_of(list(found.values()))


def _probe_rank(task: ProbeTask) -> ProbedCosts:
    """Measure in one of several processes."""
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{task.meeting}",
        rank=rank,
        world_size=task.processes,
    )
    try:
        assert dist.group.WORLD is not None
        return _measure(task, Ranks(dist.group.WORLD))
    finally:
        dist.destroy_process_group()


def _measure(task: ProbeTask, ranks: Ranks | None) -> ProbedCosts:
    torch.set_num_threads(task.threads)
    device = resolve_device(task.recipe.model.device)
    step = ProbedStep(task, device)
    seconds: dict[tuple[str, int], float] = {}
    began, rounds = time.perf_counter(), 0
    while rounds < task.rounds:
        for tokens in (task.few, task.many):
            for name, phase in step.phases(tokens):
                _keep_least(seconds, (name, tokens), phase, device)
        # The first round compiles kernels.
        if not rounds:
            seconds.clear()
            began = time.perf_counter()
        rounds += 1
        over = time.perf_counter() - began > SECONDS and rounds > LEAST_ROUNDS
        if ranks is not None:
            # All stop together, because they measure while the others work.
            over = ranks.largest(int(over)) > 0
        if over:
            break
    small = large = 0.0
    if ranks is not None:
        rest = ranks.size - 1
        small, large = (_message_seconds(ranks, size, device) / rest for size in (SMALL_MESSAGE, LARGE_MESSAGE))
    phases = {name: Phase(seconds[name, task.few], seconds[name, task.many]) for name in PHASES}
    return ProbedCosts(**phases, small=small, large=large, rounds=rounds - 1)


def _keep_least(
    seconds: dict[tuple[str, int], float], key: tuple[str, int], phase: Callable[[], object], device: torch.device
) -> None:
    _finish(device)
    began = _busy_seconds(device)
    phase()
    _finish(device)
    seconds[key] = min(_busy_seconds(device) - began, seconds.get(key, float("inf")))


def _busy_seconds(device: torch.device) -> float:
    """Return the clock of the phases: processor time for each thread, and on an accelerator the time of day."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _message_seconds(ranks: Ranks, size: int, device: torch.device) -> float:
    own, least = torch.zeros(size, dtype=torch.uint8, device=device), float("inf")
    # As rows of tokens, which are most of what is sent, are gathered.
    room = own.new_zeros(ranks.size * size)
    for _ in range(MOST_ROUNDS):
        ranks.wait()
        _finish(device)
        began = time.perf_counter()
        ranks.gather_into(room, own)
        _finish(device)
        least = min(least, time.perf_counter() - began)
    return float(ranks.largest(int(least * 1e9))) / 1e9


class ProbedStep:
    """The recipe's training step on random activations, phase by phase."""

    def __init__(self, task: ProbeTask, device: torch.device):
        section = task.recipe.dictionary.model_copy(update={"n_latents": task.n_latents})
        recipe = task.recipe.model_copy(update={"dictionary": section})
        torch.manual_seed(0)
        with device:
            self.dictionary = build_dictionary(dictionary_arguments(recipe, task.widths))
        generator = torch.Generator().manual_seed(0)
        two_sided = recipe.dictionary.two_sided

        def rows(width: int) -> torch.Tensor:
            return random_activations(task.many, width, generator).to(device)

        d = self.dictionary
        self.batch = ActivationBatch(rows(d.d_in), rows(d.d_out) if two_sided else None, rows(d.d_out))
        spec = with_budget(recipe.dictionary.known_encoder)
        if "k" not in spec:
            self._activate(task.l0 or spec["target_l0"])
        self.half = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
        phases = Phases(d, recipe)
        self.optimizer = build_optimizer(d, phases.to(device), recipe)
        self.state = TrainState(d.n_latents, recipe.dead_after_tokens, device, Randomness(0))
        variance = d.error_scale(moments_of(self.batch.x if self.batch.target is None else self.batch.target))
        self.objective = Objective(d, variance, AuxSettings(recipe.auxk_weight, max(1, d.d_out // 2))).to(device)
        d.train()

    @torch.no_grad()
    def _activate(self, l0: float) -> None:
        """Shift encoder biases so that about ``l0`` latents of every block are active, as later in a run."""
        seen = self.dictionary.normalised(self.batch.x[:256])
        for block in self.dictionary.blocks:
            bias = block.weights.b_enc
            if bias is not None:
                scores = seen[:, block.reads] @ block.weights.W_enc.T + bias
                budget = max(1, min(scores.numel(), round(l0 * len(scores))))
                bias -= scores.reshape(-1).topk(budget).values.amin()

    def phases(self, tokens: int) -> list[tuple[str, Callable[[], object]]]:
        """Return the phases of a step on so many tokens, to be run in this order."""
        batch, terms = self.batch.rows(slice(0, tokens)), []

        def forward() -> None:
            with self._autocast():
                loss, found = self.objective(batch, self.state.usage)
            loss.backward()
            terms.append(found)

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.advance(tokens, terms[-1])

        phases: tuple[Callable[[], object], ...] = (
            lambda: self._product(batch.x),
            lambda: self._encode(batch),
            forward,
            update,
        )
        return list(zip(PHASES, phases, strict=True))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.dictionary.device.type, torch.bfloat16, enabled=self.half)

    @torch.no_grad()
    def _encode(self, batch: ActivationBatch) -> None:
        with self._autocast():
            self.dictionary.encode(batch.x, batch.grad)

    @torch.no_grad()
    def _product(self, x: torch.Tensor) -> None:
        with self._autocast():
            for block in self.dictionary.blocks:
                W = block.weights.W_enc
                # As wide as a tile, so that the result stays in cache as it does in the step.
                width = max(256, (1 << 22) // len(x))
                for first in range(0, len(W), width):
                    torch.mm(x[:, block.reads], W[first : first + width].T)


def measured_machine(task: ProbeTask, run: RunSizes, found: ProbedCosts, devices: int) -> Machine:
    """Return this machine as the probe found it, for so many processes or GPUs.

    Args:
        run: Sizes of the run, for what an update does.
    """
    section = task.recipe.dictionary.model_copy(update={"n_latents": task.n_latents})
    sizes = sizes_of(task.recipe.model_copy(update={"dictionary": section}), task.widths, task.l0)
    on_cpu = resolve_device(task.recipe.model.device).type == "cpu"
    one = forward_work(sizes, 1)
    product = found.product.many / task.many
    # Selection is what encoding takes beyond the product; the rest of forward and backward what both take beyond encoding.
    encode = Phase(*(max(a, b) for a, b in ((found.encode.few, found.product.few), (found.encode.many, found.product.many))))
    rest = Phase(max(0.0, found.passes.few - encode.few), max(0.0, found.passes.many - encode.many))
    encode_constant, encode_slope = encode.line(task.few, task.many)
    rest_constant, rest_slope = rest.line(task.few, task.many)
    update_constant, update_slope = found.update.line(task.few, task.many)
    change = update_work(sizes, 1, run, dense=not run.fused)
    costs = Costs(
        mac=product / one.macs,
        score=max(0.0, encode_slope - product) / one.scores,
        row_number=rest_slope / one.row_numbers,
        entry_number=update_slope / max(1, change.entry_numbers),
        update_number=max(update_constant, 1e-9) / change.update_numbers,
        step=encode_constant + rest_constant,
    )
    cores, crowd = usable_cores(), 1.0
    if on_cpu:
        crowd = max(1.0, devices * task.threads / cores) / max(1.0, task.processes * task.threads / cores)
    link = Link(found.small, (LARGE_MESSAGE - SMALL_MESSAGE) / max(1e-9, found.large - found.small))
    name = "this CPU" if on_cpu else torch.cuda.get_device_name()
    memory = psutil.virtual_memory().total if on_cpu else torch.cuda.get_device_properties(0).total_memory
    about = f"{name}, measured: {cores} cores, {task.threads} thread{'s' * (task.threads > 1)} a process" if on_cpu else name
    return Machine(about, memory // (devices if on_cpu else 1), costs, link, link, devices, on_cpu, crowd)
