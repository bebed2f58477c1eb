"""A run's prediction from its recipe: sizes from the model's configuration, costs from a probe or from given figures."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..activations.model import resolve_device
from ..recipe import Recipe
from .machine import LINK_BANDWIDTH, LINK_LATENCY, Link, Machine, given_costs
from .prediction import RunPrediction, predict_run
from .probe import measured_machine, probe_machine, probe_task
from .sizes import Given, RunSizes, named_recipes, run_sizes

log = logging.getLogger(__name__)
DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class Device:
    """Figures of a device in bytes, operations and seconds; ``None`` if not given."""

    memory: float | None = None
    bandwidth: float | None = None
    flops: float | None = None
    link: float | None = None
    node_link: float | None = None
    latency: float | None = None
    per_node: int = DEVICES_PER_NODE

    def check(self) -> None:
        """Raise ``ValueError`` unless the figures are positive, and complete if there are any of speed."""
        for name in ("memory", "bandwidth", "flops", "link", "node_link", "latency", "per_node"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{_OPTIONS[name]}: expected more than 0, got {value:g}.")
        speeds = {name: getattr(self, name) for name in ("memory", "bandwidth", "flops")}
        missing = [f"--{name}" for name, value in speeds.items() if value is None]
        if (self.flops is not None or self.bandwidth is not None) and missing:
            raise ValueError(
                f"{' and '.join(missing)}: expected all of --memory, --bandwidth and --flops, or none, which measures this "
                "machine, got a part. Give the rest."
            )


_OPTIONS = {
    "memory": "memory",
    "bandwidth": "bandwidth",
    "flops": "flops",
    "link": "link",
    "node_link": "node-link",
    "latency": "latency",
    "per_node": "devices-per-node",
}


def plan_run(
    recipes: Sequence[Recipe], devices: int, device: Device, given: Given, threads: int | None = None
) -> RunPrediction:
    """Predict the run of recipes that train together on so many devices.

    Args:
        given: Figures for a language model that cannot be loaded.
        threads: Threads of a process on a CPU; as many as ``--processes`` gives it if ``None``.

    Raises:
        ValueError: For every error that the user can fix; the message says how.
    """
    if devices < 1:
        raise ValueError(f"--devices: expected at least 1, got {devices}.")
    device.check()
    run = run_sizes(recipes, given)
    on_gpu = device.flops is not None or resolve_device(recipes[0].model.device).type == "cuda"
    run = replace(run, half=recipes[0].precision == "bf16" or (recipes[0].precision == "auto" and on_gpu))
    machine = _measured(recipes, devices, run, given, threads) if device.flops is None else given_machine(device, run.half)
    return predict_run(run, _with_links(machine, device), devices)


def given_machine(device: Device, half: bool) -> Machine:
    """Return the machine of given figures; its connections are assumed until they are given too."""
    assert device.memory is not None
    assert device.bandwidth is not None
    assert device.flops is not None
    assumed = Link(LINK_LATENCY, LINK_BANDWIDTH)
    about = f"as given: {device.memory / 1e9:g} GB, {device.bandwidth / 1e9:g} GB/s, {device.flops / 1e12:g} TFLOP/s"
    costs = given_costs(device.flops, device.bandwidth, half)
    return Machine(about, int(device.memory), costs, assumed, assumed, device.per_node)


def _with_links(machine: Machine, device: Device) -> Machine:
    """Return a machine with the figures of memory and connections that are given."""
    near = Link(
        machine.near.latency if device.latency is None else device.latency,
        machine.near.bandwidth if device.link is None else device.link,
    )
    far = Link(near.latency, machine.far.bandwidth if device.node_link is None else device.node_link)
    if device.link is not None and device.node_link is None:
        far = replace(far, bandwidth=min(far.bandwidth, near.bandwidth))
    memory = machine.memory_bytes if device.memory is None else int(device.memory)
    return replace(machine, near=near, far=far, memory_bytes=memory)


def _measured(recipes: Sequence[Recipe], devices: int, run: RunSizes, given: Given, threads: int | None) -> Machine:
    recipe, widths = named_recipes(recipes[:1], given)[0]
    task = probe_task(recipe, widths, run, devices, given.l0)
    if threads is not None:
        task = replace(task, threads=threads)
    log.info(
        "plan: measuring steps of %d and %d tokens at %d latents in %d process%s",
        task.few,
        task.many,
        task.n_latents,
        task.processes,
        "es" if task.processes > 1 else "",
    )
    threads = torch.get_num_threads()
    try:
        return measured_machine(task, run, probe_machine(task), devices)
    finally:
        torch.set_num_threads(threads)
