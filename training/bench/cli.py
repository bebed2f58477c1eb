"""Command line of ``sparsary bench``, one subcommand per benchmark."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import print_table

if TYPE_CHECKING:
    from .comparison import BenchPlan, StepShape

log = logging.getLogger(__name__)
app = typer.Typer(help="Measure speed, as ratios within one run, and recovery of known features.", no_args_is_help=True)
BenchKeys = Annotated[
    list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="Recipe keys of our steps: accumulate=2.")
]
BenchShape = Annotated[
    list[str] | None, typer.Option("--shape", metavar="TOKENSxD_INxN_LATENTSxK", help="Sizes of a step; repeatable.")
]
BenchFamily = Annotated[list[str] | None, typer.Option("--family", help="Which encoder's step; repeatable.")]
BenchVariant = Annotated[
    list[str] | None,
    typer.Option("--variant", metavar="KEYS", help="Measure our steps with these recipe keys too; repeatable."),
]
BenchRounds = Annotated[int, typer.Option("--rounds", min=1, help="Counted steps of each; two more come first.")]
BenchThreads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of every step; as many as torch takes if not given.")
]
BenchPeers = Annotated[
    str | None,
    typer.Option(
        "--peers", metavar="PYTHON", help="A Python that has the peers (.venv-peers/bin/python if it is there), or none."
    ),
]
BenchPeer = Annotated[list[str] | None, typer.Option("--peer", help="Only this peer; repeatable.")]
BenchQuick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, three rounds: to see that it works.")]
BenchJson = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything here, every time included.")]


@app.command("step")
def _bench_step(
    overrides: BenchKeys = None,
    shape: BenchShape = None,
    family: BenchFamily = None,
    variant: BenchVariant = None,
    rounds: BenchRounds = 7,
    threads: BenchThreads = None,
    peers: BenchPeers = None,
    peer: BenchPeer = None,
    slopes: Annotated[
        bool, typer.Option("--slopes", help="How time grows with n_latents and with tokens, instead of one shape.")
    ] = False,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Compare a training step with its encoder matrix product and with other libraries' steps, in alternating processes."""
    log.info("bench step: loading torch")
    from ..stages import stage
    from .comparison import GROWTH, QUICK_GROWTH, STEP_FAMILIES, STEP_SHAPE, bench_slopes, bench_steps, rounds_of

    names = family or ["topk"]
    plan = _bench_plan(overrides, shape, STEP_SHAPE, names, STEP_FAMILIES, variant, rounds, threads, peers, peer, quick)
    growth = (QUICK_GROWTH if quick else GROWTH) if slopes else None
    with stage("bench step", rounds_of(plan, growth), "rounds") as shown:
        report = bench_steps(plan, shown.update) if growth is None else bench_slopes(plan, growth, shown.update)
    _bench_report("step", report, json)


@app.command("pursuit")
def _bench_pursuit(
    overrides: BenchKeys = None,
    shape: BenchShape = None,
    family: BenchFamily = None,
    variant: BenchVariant = None,
    rounds: BenchRounds = 7,
    threads: BenchThreads = None,
    peers: BenchPeers = None,
    peer: BenchPeer = None,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Compare matching pursuit training steps, and inference with other pursuit algorithms, in the same way as `step`."""
    log.info("bench pursuit: loading torch")
    from ..stages import stage
    from .comparison import PURSUIT_FAMILIES, PURSUIT_SHAPE, bench_steps, rounds_of

    names = family or ["matching_pursuit", "gradient_pursuit"]
    plan = _bench_plan(overrides, shape, PURSUIT_SHAPE, names, PURSUIT_FAMILIES, variant, rounds, threads, peers, peer, quick)
    with stage("bench pursuit", rounds_of(plan), "rounds") as shown:
        report = bench_steps(plan, shown.update)
    _bench_report("pursuit", report, json)


@app.command("stream")
def _bench_stream(
    width: Annotated[int, typer.Option(min=1, help="Width of an activation.")] = 768,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Measure the read speed of activation stores in the page cache, in GB/s of float32, for every store dtype."""
    log.info("bench stream: loading torch")
    from .data import bench_stream

    measured = _measured(
        "stream", lambda: bench_stream(width, 8192, 256, 2, 3) if quick else bench_stream(width, repeats=rounds)
    )
    _bench_report("stream", measured, json)


@app.command("harvest")
def _bench_harvest(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    dtype: Annotated[str, typer.Option(help="What the store holds: float32, bfloat16, float16, int8.")] = "float32",
    model: Annotated[str, typer.Option(help="Language model (hub id or directory).")] = "embedded",
    hook: Annotated[str, typer.Option(help="Hook of the model.")] = "transformer.h.2:out",
    text: Annotated[list[str] | None, typer.Option(help="Text file; repeatable. Default: the embedded model's text.")] = None,
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of a harvest.")] = 50_000,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Compare a harvest with the forward passes alone of its model, up to its hook, on the same contexts, in turn."""
    log.info("bench harvest: loading torch")
    from .data import bench_harvest

    tokens = 2000 if quick else tokens

    def measure() -> dict[str, Any]:
        return bench_harvest(model, hook, tokens, dtype=dtype, repeats=rounds, text_files=tuple(text or ()))

    _bench_report("harvest", _measured("harvest", measure), json)


@app.command("loading")
def _bench_loading(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Measure time and memory to load a 16k x 2304 dictionary in other libraries' formats, relative to reading its bytes."""
    log.info("bench loading: loading torch")
    from .loading import bench_loading

    measured = _measured("loading", lambda: bench_loading(64, 32, 1) if quick else bench_loading(rounds=rounds))
    _bench_report("loading", measured, json)


@app.command("grid")
def _bench_grid(
    members: Annotated[int, typer.Option(min=2, help="Dictionaries trained together.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Compare training several dictionaries on one activation stream with training one, in turn, for several shapes."""
    log.info("bench grid: loading torch")
    from .grid import SHAPES, bench_grid

    shapes = dict([*SHAPES.items()][:1]) if quick else SHAPES
    _bench_report("grid", _measured("grid", lambda: bench_grid(members, rounds, shapes)), json)


@app.command("cross-layer")
def _bench_cross_layer(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Compare a training step of a cross-layer transcoder with its encoder products, in turn, for several shapes."""
    log.info("bench cross-layer: loading torch")
    from .cross_layer import QUICK, SHAPES, bench_cross_layer

    measured = _measured("cross-layer", lambda: bench_cross_layer(rounds, QUICK if quick else SHAPES))
    _bench_report("cross-layer", measured, json)


@app.command("gpu")
def _bench_gpu(
    shape: Annotated[str, typer.Option("--shape", metavar="TOKENSxD_INxN_LATENTSxK", help="Sizes of the step.")] = (
        "8192x4096x131072x64"
    ),
    json: BenchJson = None,
) -> None:
    """Measure a TopK training step on a CUDA GPU in bf16, relative to its encoder matrix product."""
    log.info("bench gpu: loading torch")
    from .comparison import parse_shape
    from .gpu import bench_gpu_step

    _bench_report("gpu", _measured("gpu", lambda: bench_gpu_step(*parse_shape(shape))), json)


def _bench_plan(
    overrides: list[str] | None,
    shape: list[str] | None,
    default: "StepShape",
    family: list[str],
    families: tuple[str, ...],
    variant: list[str] | None,
    rounds: int,
    threads: int | None,
    peers: str | None,
    peer: list[str] | None,
    quick: bool,
) -> "BenchPlan":
    import torch

    from ..recipe import parse_overrides
    from .comparison import LIBRARIES, QUICK_SHAPE, BenchPlan, parse_shape, peers_python, require_choices

    return BenchPlan(
        shapes=tuple(map(parse_shape, shape)) if shape else (QUICK_SHAPE if quick else default,),
        families=require_choices("--family", family, families),
        rounds=3 if quick else rounds,
        threads=threads or torch.get_num_threads(),
        overrides=parse_overrides(overrides or []),
        variants=tuple(parse_overrides(keys.split()) for keys in variant or []),
        peers_python=peers_python(peers),
        libraries=require_choices("--peer", peer or LIBRARIES, LIBRARIES),
    )


def _measured(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a benchmark that reports no rounds, as one stage."""
    from ..stages import stage

    with stage(f"bench {name}", 1, "benchmarks") as shown:
        report = measure()
        shown.update(1)
    return report


def _bench_report(name: str, report: dict[str, Any], json: str | None) -> None:
    """Print the report as tables and write it to ``json`` if given."""
    from ...sae.files import write_json
    from .comparison import tables
    from .environment import environment

    report = {"bench": name, "environment": environment()} | report
    about = report["environment"]
    cpu = f"{about['cpu']}, " if about["cpu"] else ""
    print(f"{cpu}{about['threads']} threads, torch {about['torch']}")
    for table in tables(report):
        print(f"\n{table.title}")
        print_table(table.head, table.rows)
        for note in table.notes:
            print(note)
    if json is not None:
        write_json(Path(json), report)
