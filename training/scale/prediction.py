"""Prediction of a run on every mesh of its devices, and the choice of the best."""

from dataclasses import asdict, dataclass
from typing import Any

from ..stages import duration, rounded
from .machine import Machine, StepSeconds, step_seconds
from .memory import DeviceMemory, device_memory
from .mesh import MeshShape, RankStep, meshes, rank_step, refusal
from .sizes import RunSizes

DAY = 86_400


@dataclass(frozen=True)
class MeshPrediction:
    """Prediction for one mesh; ``refused`` says why it is not possible, and is empty if it is."""

    mesh: MeshShape
    refused: str
    memory: DeviceMemory | None = None
    step: RankStep | None = None
    seconds: StepSeconds | None = None

    @property
    def step_seconds(self) -> float:
        return float("inf") if self.seconds is None else self.seconds.total


@dataclass(frozen=True)
class RunPrediction:
    """Predictions for all meshes of some devices, and what does not depend on the mesh."""

    run: RunSizes
    machine: Machine
    devices: int
    tried: tuple[MeshPrediction, ...]
    harvest_seconds: float
    store_bytes: int
    checkpoint_bytes: int

    @property
    def best(self) -> MeshPrediction | None:
        """Fastest mesh that fits; of equally fast ones, the one with the fewest ranks along latents. ``None`` if none fits."""
        return min((each for each in self.tried if not each.refused), key=lambda each: each.step_seconds, default=None)

    @property
    def steps(self) -> int:
        return -(-self.run.tokens // self.run.batch_tokens)

    def tokens_per_day(self, mesh: MeshPrediction) -> float:
        return DAY * self.run.batch_tokens / mesh.step_seconds

    def run_seconds(self, mesh: MeshPrediction) -> float:
        """Return the seconds of the whole run, harvest included."""
        return self.harvest_seconds + self.steps * mesh.step_seconds


def predict_run(run: RunSizes, machine: Machine, devices: int) -> RunPrediction:
    """Predict a run on so many devices.

    Raises:
        ValueError: If there is no device.
    """
    if devices < 1:
        raise ValueError(f"--devices: expected at least 1, got {devices}.")
    return RunPrediction(
        run=run,
        machine=machine,
        devices=devices,
        tried=tuple(_predict(run, machine, mesh) for mesh in meshes(devices)),
        # Devices divide the shards of a store.
        harvest_seconds=0.0 if run.live else model_seconds(run, machine, run.harvest_tokens) / devices,
        store_bytes=0 if run.live else round(run.harvest_tokens * run.stored_bytes_per_token),
        # Saved state and dictionary, and the state that replaces the one before.
        checkpoint_bytes=(12 + 4 + 12) * run.parameters,
    )


def _predict(run: RunSizes, machine: Machine, mesh: MeshShape) -> MeshPrediction:
    if refused := refusal(run, mesh):
        return MeshPrediction(mesh, refused)
    memory, step = device_memory(run, mesh, machine.shares_memory), rank_step(run, mesh)
    # All ranks divide the contexts among them.
    model = model_seconds(run, machine, round(run.batch_tokens * run.read_per_token)) / mesh.devices if run.live else 0.0
    seconds = step_seconds(machine, mesh, step, model)
    needed = memory.all if machine.shares_memory else memory.device
    refused = f"needs {size_words(needed)} of {size_words(machine.memory_bytes)}" if needed > machine.memory_bytes else ""
    return MeshPrediction(mesh, refused, memory, step, seconds)


def model_seconds(run: RunSizes, machine: Machine, tokens: int) -> float:
    """Return the seconds in which one device runs the language model on so many tokens, up to the last hook."""
    if run.model is None:
        return 0.0
    # One multiply-add for each parameter and token.
    return run.model.parameters * run.model.share * tokens * machine.costs.mac


def fields_of(found: RunPrediction) -> list[tuple[str, str]]:
    """Return a prediction for display, as pairs of a name and a value."""
    run, machine, best = found.run, found.machine, found.best
    costs = machine.costs
    rates = f"product {rounded(2 / costs.mac / 1e12)} TFLOP/s, update {rounded(4 / costs.update_number / 1e9)} GB/s"
    links = ""
    if found.devices > 1:
        links = f", link {rounded(machine.near.bandwidth / 1e9)} GB/s and {rounded(machine.near.latency * 1e6)} us"
    if found.devices > machine.devices_per_node:
        links += f", between nodes {rounded(machine.far.bandwidth / 1e9)} GB/s"
    shown = [
        ("dictionary", _dictionary_words(run)),
        ("machine", machine.about),
        ("rates", rates + links),
    ]
    if best is not None:
        assert best.seconds is not None
        assert best.memory is not None
        seconds, memory, latents = best.seconds, best.memory, best.mesh.latents
        recipe_key = f"  (distributed.latents={latents})" if latents > 1 else ""
        if latents != run.latents:
            recipe_key += f"; the recipe has distributed.latents {run.latents}"
        shown += [
            ("mesh", f"{best.mesh}: {best.mesh.data} along data, {latents} along latents{recipe_key}"),
            (
                "step",
                f"{milliseconds(seconds.total)}: forward and backward {milliseconds(seconds.forward)}, "
                f"update {milliseconds(seconds.update)}, exchange {milliseconds(seconds.exchange)}"
                + (f", language model {milliseconds(seconds.model)}" if seconds.model else ""),
            ),
            (
                "memory",
                f"{size_words(memory.device)} on each device: weights and moments {size_words(memory.weights)}, "
                f"gradients {size_words(memory.gradients)}, step {size_words(memory.working)}"
                + (f", language model {size_words(memory.model)}" if memory.model else "")
                + f"; {size_words(memory.host)} of main memory for each",
            ),
            (
                "tokens",
                f"{short_number(found.tokens_per_day(best))} a day; {short_number(run.tokens)} in "
                f"{duration(found.run_seconds(best))}"
                + (f", of which harvest {duration(found.harvest_seconds)}" if found.harvest_seconds else ""),
            ),
        ]
    shown.append(
        (
            "disk",
            f"checkpoints {size_words(found.checkpoint_bytes)}"
            + (f", store {size_words(found.store_bytes)}" if found.store_bytes else ""),
        )
    )
    return shown


def _dictionary_words(run: RunSizes) -> str:
    first = run.dictionaries[0]
    many = f"{len(run.dictionaries)} dictionaries, each " if len(run.dictionaries) > 1 else ""
    layers = f", {len(first.blocks)} layers" if len(first.blocks) > 1 else ""
    return (
        f"{many}{first.d_in:,} -> {first.n_latents:,} -> {first.d_out:,}{layers}; {run.parameters:,} parameters in all, "
        f"batches of {run.batch_tokens:,}"
    )


HEAD = ["data x latents", "step", "forward", "update", "exchange", "received", "memory", "verdict"]


def table_of(found: RunPrediction) -> list[list[str]]:
    """Return one row for each mesh, under ``HEAD``."""
    best, rows = found.best, []
    for each in found.tried:
        if each.seconds is None or each.memory is None or each.step is None:
            rows.append([str(each.mesh), *[""] * 6, each.refused])
            continue
        seconds, received = each.seconds, each.step.data.bytes_ + each.step.latents.bytes_
        slower = "" if best is None else f"slower: {each.step_seconds / best.step_seconds:.2f} x"
        verdict = each.refused or ("best" if each is best else slower)
        memory = each.memory.all if found.machine.shares_memory else each.memory.device
        parts = (seconds.total, seconds.forward, seconds.update, seconds.exchange)
        rows.append([str(each.mesh), *map(milliseconds, parts), size_words(received), size_words(memory), verdict])
    return rows


def require_fit(found: RunPrediction) -> None:
    """Raise ``ValueError`` if no mesh fits, saying what comes nearest."""
    if found.best is not None:
        return
    machine = found.machine
    possible = [each for each in found.tried if each.memory is not None]
    if not possible:
        raise ValueError(f"--devices: expected a number that divides the run, got {found.devices}: {found.tried[0].refused}.")
    sizes = [each.memory.all if machine.shares_memory else each.memory.device for each in possible if each.memory is not None]
    raise ValueError(
        f"--devices: expected enough memory on {found.devices}, got {size_words(machine.memory_bytes)} each, of at least "
        f"{size_words(min(sizes))}. Give more devices, or lower dictionary.n_latents or batch_tokens."
    )


def plan_as_json(found: RunPrediction) -> dict[str, Any]:
    """Return a prediction as JSON values, in bytes and seconds."""
    best = found.best
    return {
        "devices": found.devices,
        "machine": asdict(found.machine),
        "best": None if best is None else [best.mesh.data, best.mesh.latents],
        "tokens_per_day": None if best is None else found.tokens_per_day(best),
        "run_seconds": None if best is None else found.run_seconds(best),
        "harvest_seconds": found.harvest_seconds,
        "store_bytes": found.store_bytes,
        "checkpoint_bytes": found.checkpoint_bytes,
        "meshes": [
            {
                "data": each.mesh.data,
                "latents": each.mesh.latents,
                "refused": each.refused,
                "seconds": None if each.seconds is None else asdict(each.seconds) | {"total": each.seconds.total},
                "memory": None if each.memory is None else asdict(each.memory),
                "received_bytes": None if each.step is None else each.step.data.bytes_ + each.step.latents.bytes_,
                "dense_gradients": None if each.step is None else each.step.dense,
            }
            for each in found.tried
        ],
    }


def milliseconds(seconds: float) -> str:
    """Format seconds, below one second in milliseconds, with three significant digits."""
    return f"{rounded(seconds * 1000)} ms" if seconds < 0.9995 else f"{rounded(seconds)} s"


def size_words(size: float) -> str:
    """Format bytes with three significant digits.

    >>> size_words(1_234_000_000), size_words(999)
    ('1.23 GB', '999 B')
    """
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def short_number(number: float) -> str:
    """Format a count with three significant digits.

    >>> short_number(2_500_000_000), short_number(640)
    ('2.5 billion', '640')
    """
    for name, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,.0f}"
