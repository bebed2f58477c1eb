"""Comparison of sparsary's training step with its encoder product and other libraries' steps: plan, run, and report."""

import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...sae.encoders import ENCODERS
from ...sae.penalised import Penalised
from ...sae.suggestions import require_choice
from .environment import environment
from .rounds import WARMUP_ROUNDS, Competitor, ratio, slope, started, take_turns
from .steps import PURSUITS, recipe_of
from .worker import BenchTask

# Encoder -> libraries with a comparable step, which `peer_steps.py` describes.
PEERS = {
    "topk": ("sparsify", "sparsify_adam", "saelens", "dictionary_learning", "overcomplete"),
    "mutual_choice": ("saelens", "dictionary_learning"),
    "batch_topk": ("saelens", "dictionary_learning", "overcomplete"),
    "matryoshka": ("saelens", "dictionary_learning"),
    "relu": ("saelens",),
    "gated": ("saelens",),
    "jumprelu": ("saelens",),
    "matching_pursuit": ("saelens", "overcomplete"),
    "gradient_pursuit": ("dictionary_learning",),
}
PEERS_PYTHON = Path(".venv-peers/bin/python")
LIBRARIES = tuple(dict.fromkeys(library for libraries in PEERS.values() for library in libraries))


STEP_FAMILIES, PURSUIT_FAMILIES = tuple(ENCODERS), ("matching_pursuit", *PURSUITS)


class StepShape(NamedTuple):
    """Sizes of a training step."""

    tokens: int
    d_in: int
    n_latents: int
    k: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


STEP_SHAPE, PURSUIT_SHAPE, QUICK_SHAPE = (
    StepShape(2048, 768, 12288, 32),
    StepShape(2048, 512, 4096, 32),
    StepShape(64, 32, 256, 4),
)
# Sizes at which growth with n_latents and tokens is measured.
GROWTH = {"n_latents": [4096, 8192, 16384, 32768, 65536], "tokens": [512, 1024, 2048, 4096, 8192]}
QUICK_GROWTH = {"n_latents": [128, 256, 512], "tokens": [64, 128, 256]}


@dataclass(frozen=True)
class BenchPlan:
    """Settings of a benchmark run. ``variants`` are sets of recipe keys, each measured in addition to the step without them."""

    shapes: tuple[StepShape, ...]
    families: tuple[str, ...]
    rounds: int
    threads: int
    overrides: Mapping[str, Any]
    variants: tuple[Mapping[str, Any], ...] = ()
    peers_python: Path | None = None
    libraries: tuple[str, ...] = LIBRARIES

    def ours(self, shape: StepShape) -> list[BenchTask]:
        """Return the tasks of sparsary's processes; the first also times the encoder product.

        Raises:
            ValueError: If a recipe is invalid at this shape.
        """
        tasks = []
        for family in self.families:
            trained = family not in PURSUITS
            for variant in ({}, *self.variants) if trained else ({},):
                overrides = {**self.overrides, **variant} if trained else {}
                tasks.append(BenchTask("sparsary", family, *shape, self.threads, overrides=overrides))
                if trained:
                    recipe_of(tasks[-1])
                    # Without a budget a step's cost depends on the L0, which falls as training goes on.
                    if issubclass(ENCODERS[family], Penalised):
                        tasks.append(replace(tasks[-1], settled=True))
        return [replace(tasks[0], product=True), *tasks[1:]]

    def peers(self, shape: StepShape) -> list[BenchTask]:
        """Return the tasks of the peers' processes; none without a Python for them."""
        return [
            BenchTask(library, family, *shape, self.threads)
            for family in (self.families if self.peers_python else ())
            for library in PEERS.get(family, ())
            if library in self.libraries
        ]

    def command(self, task: BenchTask) -> list[str]:
        """Return the command that starts a task's process."""
        if task.library == "sparsary":
            # -P keeps the current folder, which may hold packages of the same names, off sys.path.
            return [sys.executable, "-P", "-m", "sparsary.training.bench.steps"]
        # -I isolates the process: neither sparsary nor this folder's modules may shadow the peers' packages.
        return [str(self.peers_python), "-I", str(Path(__file__).with_name("peer_steps.py"))]


def parse_shape(text: str) -> StepShape:
    """Parse a shape such as ``2048x768x12288x32``.

    Raises:
        ValueError: If the text is not a shape.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    if found is None or "0" in found.groups():
        raise ValueError(f"--shape: expected TOKENSxD_INxN_LATENTSxK, for example {STEP_SHAPE}, got {text!r}.")
    return StepShape(*map(int, found.groups()))


def require_choices(option: str, names: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Return the names without duplicates.

    Raises:
        ValueError: If a name is not among the choices.
    """
    return tuple(dict.fromkeys(require_choice(option, name, choices) for name in names))


def peers_python(given: str | None) -> Path | None:
    """Return the Python of the peers' environment: the given one, else that of ``make peers`` if it exists, else None.

    Raises:
        ValueError: If the given Python does not exist.
    """
    if given == "none":
        return None
    if given is None:
        # Not resolved: Python finds its environment through the symlink.
        return PEERS_PYTHON.absolute() if PEERS_PYTHON.exists() else None
    if not Path(given).is_file():
        raise ValueError(f"--peers: expected a Python that has the peers, or none, got {given!r}. make peers makes one.")
    return Path(given).absolute()


def bench_steps(plan: BenchPlan, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Measure all competitors at every shape and return the report; ``progress`` receives the number of finished rounds.

    Raises:
        ValueError: If one of sparsary's steps fails.
    """
    tasks = {shape: [*plan.ours(shape), *plan.peers(shape)] for shape in plan.shapes}
    finished = _counter(progress)
    shapes = []
    for shape in plan.shapes:
        with started([(task, plan.command(task)) for task in tasks[shape]]) as competitors:
            _require_ours(competitors)
            take_turns(competitors, plan.rounds, finished)
            _require_ours(competitors)
        shapes.append(shape_report(shape, competitors, plan))
    return {"environment": environment(plan.threads), "settings": _settings(plan), "shapes": shapes}


def rounds_of(plan: BenchPlan, growth: Mapping[str, list[int]] | None = None) -> int:
    """Return the total number of rounds of ``bench_steps`` or, with ``growth``, of ``bench_slopes``."""
    sizes = len(plan.shapes) if growth is None else len(plan.families) * sum(map(len, growth.values()))
    return sizes * (WARMUP_ROUNDS + plan.rounds)


def bench_slopes(
    plan: BenchPlan, growth: Mapping[str, list[int]], progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Measure the growth of step time, product time, and their ratio with n_latents and tokens.

    Other sizes are those of the plan's first shape.

    Raises:
        ValueError: If one of sparsary's steps fails.
    """
    finished = _counter(progress)
    sizes = [
        (family, axis, [plan.shapes[0]._replace(**{axis: size}) for size in values])
        for family in plan.families
        for axis, values in growth.items()
    ]
    tasks = {
        (family, shape): replace(plan, families=(family,), variants=()).ours(shape)
        for family, _, shapes in sizes
        for shape in shapes
    }
    slopes = []
    for family, axis, shapes in sizes:
        measured = []
        for shape in shapes:
            # Step and product of each size are timed together, so that their ratio is robust to background load.
            with started([(task, plan.command(task)) for task in tasks[family, shape]]) as competitors:
                _require_ours(competitors)
                take_turns(competitors, plan.rounds, finished)
                _require_ours(competitors)
            measured.append(competitors[0].seconds)
        slopes.append(
            {"family": family, "shape": plan.shapes[0]._asdict(), "axis": axis, **growth_report(growth[axis], measured)}
        )
    return {"environment": environment(plan.threads), "settings": _settings(plan), "slopes": slopes}


def growth_report(sizes: list[int], measured: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Return the growth exponents (slopes in log-log space) from the times at each size."""
    steps, products = ([statistics.median(times[order]) for times in measured] for order in ("step", "product"))
    ratios = [ratio(times["step"], times["product"]) for times in measured]
    return {
        "sizes": sizes,
        "seconds": measured,
        "median_step_seconds": steps,
        "median_product_seconds": products,
        "times_product": ratios,
        "step_slope": slope(sizes, steps),
        "product_slope": slope(sizes, products),
        "times_product_slope": slope(sizes, ratios),
    }


def shape_report(shape: StepShape, competitors: list[Competitor], plan: BenchPlan) -> dict[str, Any]:
    """Return the results of one shape, raw times included."""
    product = competitors[0].seconds["product"]
    output_bytes = 4 * shape.tokens * shape.n_latents
    rows = []
    # The base step without variants precedes all other competitors of its encoder.
    ours: dict[str, list[float]] = {}
    for competitor in competitors:
        task, steps = competitor.task, competitor.seconds["step"]
        compared = competitor.error is None
        variant = {key: value for key, value in task.overrides.items() if plan.overrides.get(key, ...) != value}
        if task.library == "sparsary":
            ours.setdefault(task.family, steps)
        memory = competitor.memory_bytes if compared else None
        rows.append(
            {
                "library": task.library,
                "version": competitor.version,
                "family": task.family,
                "variant": variant,
                "settled": task.settled,
                "l0": competitor.counted.get("l0"),
                "entries": competitor.counted.get("entries"),
                "error": competitor.error,
                "seconds": steps,
                "median_seconds": statistics.median(steps) if compared else None,
                "times_product": ratio(steps, product) if compared else None,
                "times_ours": ratio(steps, ours[task.family]) if compared else None,
                "memory_bytes": memory,
                "memory_over_output": None if memory is None else memory / output_bytes,
            }
        )
    return {
        "shape": shape._asdict(),
        "encoder_output_bytes": output_bytes,
        "product": {"seconds": product, "median_seconds": statistics.median(product)},
        "competitors": rows,
    }


class Table(NamedTuple):
    """Text table: title, column heads, rows, and notes printed below."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def tables(report: dict[str, Any]) -> list[Table]:
    """Return a report as tables; reports without steps or slopes become one table of numbers."""
    if report["bench"] not in ("step", "pursuit"):
        shown = {name: value for name, value in report.items() if name not in ("bench", "environment")}
        return [Table(report["bench"], ["", ""], _numbers(shown), [])]
    rounds = report["settings"]["rounds"]
    if "slopes" in report:
        return [_slope_table(found, rounds) for found in report["slopes"]]
    return [_shape_table(found, rounds) for found in report["shapes"]]


def _numbers(values: Mapping[str, Any], above: str = "") -> list[list[str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _numbers(value, f"{above}{name}.")
        else:
            rows.append([above + name, f"{value:.4g}" if isinstance(value, float) else str(value)])
    return rows


def _shape_table(found: dict[str, Any], rounds: int) -> Table:
    product = found["product"]["median_seconds"]
    rows = [["encoder product", "", _seconds(product), "1.00", "", "", "", "", ""]]
    notes = []
    for row in found["competitors"]:
        name = " ".join([row["library"], *(f"{key}={value}" for key, value in row["variant"].items())])
        if row["error"] is not None:
            notes.append(f"{name}, {row['family']}: left out: {row['error']}")
            continue
        name += " settled" if row["settled"] else ""
        memory = row["memory_bytes"]
        rows.append(
            [
                name,
                row["family"],
                _seconds(row["median_seconds"]),
                f"{row['times_product']:.2f}",
                f"{row['times_ours']:.2f}",
                "?" if memory is None else str(round(memory / 1e6)),
                "?" if memory is None else f"{row['memory_over_output']:.2f}",
                "" if row["l0"] is None else f"{row['l0']:.0f}",
                "" if row["entries"] is None else f"{row['entries']:.0f}",
            ]
        )
    shape = StepShape(**found["shape"])
    title = f"{shape.tokens} tokens, d {shape.d_in}, {shape.n_latents} latents, k {shape.k}; medians of {rounds} rounds"
    return Table(title, ["", "family", "seconds", "x product", "x sparsary", "MB", "x output", "l0", "entries"], rows, notes)


def _slope_table(found: dict[str, Any], rounds: int) -> Table:
    sizes = [f"{name} {value}" for name, value in found["shape"].items() if name != found["axis"]]
    rows = [
        [f"{size}", _seconds(step), _seconds(product), f"{times:.2f}"]
        for size, step, product, times in zip(
            found["sizes"], found["median_step_seconds"], found["median_product_seconds"], found["times_product"], strict=True
        )
    ]
    rows.append(["slope", *(f"{found[f'{name}_slope']:.3f}" for name in ("step", "product", "times_product"))])
    title = f"{found['family']}: {', '.join(sizes)}; medians of {rounds} rounds"
    return Table(title, [found["axis"], "step, s", "product, s", "x product"], rows, [])


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _settings(plan: BenchPlan) -> dict[str, Any]:
    python = None if plan.peers_python is None else str(plan.peers_python)
    return asdict(plan) | {"shapes": [str(shape) for shape in plan.shapes], "peers_python": python, "warmup": WARMUP_ROUNDS}


def _require_ours(competitors: list[Competitor]) -> None:
    for competitor in competitors:
        if competitor.error is not None and competitor.task.library == "sparsary":
            task = competitor.task
            shape = StepShape(task.tokens, task.d_in, task.n_latents, task.k)
            raise ValueError(f"bench, {task.family} at {shape}: {competitor.error}")


def _counter(progress: Callable[[int], None]) -> Callable[[], None]:
    done = 0

    def finished() -> None:
        nonlocal done
        done += 1
        progress(done)

    return finished
