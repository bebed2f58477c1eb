"""Machines: what one device can do, what its connections carry, and the seconds that work takes on it."""

from dataclasses import dataclass

from .mesh import MeshShape, RankStep, Traffic, Work

# Assumed for connections if figures of a device are given without them: a network card of 200 Gbit/s for each device.
LINK_BANDWIDTH, LINK_LATENCY = 25e9, 20e-6


@dataclass(frozen=True)
class Costs:
    """Seconds that one unit of every kind of ``Work`` takes on one device."""

    mac: float
    score: float
    row_number: float
    entry_number: float
    update_number: float
    step: float

    def of(self, work: Work) -> float:
        """Return the seconds of some work."""
        return (
            work.macs * self.mac
            + work.scores * self.score
            + work.row_numbers * self.row_number
            + work.entry_numbers * self.entry_number
            + work.update_numbers * self.update_number
            + work.dictionaries * self.step
        )


def given_costs(flops: float, bandwidth: float, half: bool) -> Costs:
    """Return the costs on a device of so many operations and bytes per second.

    All work but the encoder product moves memory: a score is written and read once, in 16 bits with ``half``.
    """
    number = 4 / bandwidth
    return Costs(2 / flops, (1 if half else 2) * number, number, number, number, 0.0)


@dataclass(frozen=True)
class Link:
    """Connection between two ranks: seconds until a message arrives, and bytes per second in one direction."""

    latency: float
    bandwidth: float

    def seconds(self, traffic: Traffic) -> float:
        return traffic.rounds * self.latency + traffic.bytes_ / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """Devices and their connections.

    ``crowd`` is the number of processes for each core that they need at a time, 1 on GPUs. ``shares_memory`` is True on CPUs,
    where everything of all processes is in main memory.
    """

    about: str
    memory_bytes: int
    costs: Costs
    near: Link
    far: Link
    devices_per_node: int
    shares_memory: bool = False
    crowd: float = 1.0

    def link(self, mesh: MeshShape, axis: str) -> Link:
        """Return the slowest connection of an axis. Ranks that share tokens are neighbours, within a node if they fit."""
        span = mesh.latents if axis == "latents" else mesh.devices
        return self.near if span <= self.devices_per_node else self.far


@dataclass(frozen=True)
class StepSeconds:
    """Predicted seconds of a step by part; nothing overlaps."""

    forward: float
    update: float
    exchange: float
    model: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.update + self.exchange + self.model


def step_seconds(machine: Machine, mesh: MeshShape, step: RankStep, model: float = 0.0) -> StepSeconds:
    """Return the seconds of a step; ``model`` are those in which the language model computes the batch."""
    exchange = machine.link(mesh, "data").seconds(step.data) + machine.link(mesh, "latents").seconds(step.latents)
    parts = (machine.costs.of(step.forward), machine.costs.of(step.update), exchange, model)
    return StepSeconds(*(machine.crowd * part for part in parts))
