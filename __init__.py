"""sparsary: train, load and judge sparse dictionaries of language-model activations. The public names and the command line."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from .training.signals import Stopped

__all__ = ["convert", "evaluate", "features", "load", "push_to_hub", "train"]


def load(
    path: str,
    device: str = "cpu",
    revision: str | None = None,
    *,
    hook: str | None = None,
    format: str | None = None,  # noqa: A002
    subfolder: str | None = None,
    dtype: str = "float32",
    **missing: Any,
) -> Any:
    """The dictionary of a checkpoint directory, a file, or a hub repository id, in eval mode; ours, or another library's.

    Where there are several, one for each hook, it is the ``Stack`` of them all, or, with ``hook``, one of them. ``format``
    overrides what the files say they are. ``missing`` is what the files may leave open: ``scale``, ``k``, ``threshold``,
    ``model``, ``subtract_b_dec`` (see ``sae.formats.Options``). Other libraries' dictionaries compute in ``dtype``, ``auto``
    being their files'.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    from .sae.formats import ReadOptions

    # Its import also makes transcoders known to `load_dictionary`.
    from .transcoders.load import load as run

    return run(path, device, revision, subfolder, format, ReadOptions(hook=hook, **missing), dtype)[0]


def convert(
    source: str,
    destination: str,
    to: str = "sparsary",
    *,
    format: str | None = None,  # noqa: A002
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: str = "float32",
    **missing: Any,
) -> Any:
    """Write a dictionary, whoever wrote it, as our checkpoint or in another library's format; what was done, in words.

    Several, one for each hook, become a directory of them. ``to`` is ``sparsary`` or a format of ``docs/formats.md``; the
    other arguments are those of ``load``. Whatever is there already stays: ``destination`` must be empty or new.
    """
    from .sae.formats import ReadOptions
    from .transcoders.convert import convert as run

    given = {"format": format, "revision": revision, "subfolder": subfolder, "dtype": dtype}
    return run(source, destination, to, options=ReadOptions(**missing), **given)


def push_to_hub(directory: str, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint's files, ours or another library's, to the Hugging Face hub; returns the repository's address."""
    from .sae.hub import push

    return push(directory, repo_id, private)


def train(recipe: str, activations: Iterable[Any] | None = None, **overrides: Any) -> Path:
    """Run a recipe and return the checkpoint's directory.

    ``overrides`` are recipe keys; nested ones come with double underscores (``dictionary__n_latents=512``) or as a dict
    splat of dotted names. ``activations`` is any iterable of ``(tokens, d_in)`` tensors, or of mappings with ``x`` and
    ``target`` for transcoders, in place of a model. With a ``grid``, the directory is the one above the members' checkpoints.
    """
    from .training.recipe.grid import load_grid
    from .training.resolve_hooks import resolve_recipes
    from .training.run import train_all

    grid = load_grid(recipe, {key.replace("__", "."): value for key, value in overrides.items()})
    train_all(resolve_recipes(grid.recipes), activations)
    return Path(grid.out_dir)


def evaluate(
    directory: str, out: str | None = None, activations: Any = None, tokens: int | None = None, **given: Any
) -> dict[str, Any]:
    """Judge a checkpoint on held-out documents, write ``report.json`` and ``report.html``, and return the report.

    ``activations``, a ``(tokens, d_in)`` tensor, takes the place of the model; what needs the model is then left out. For a
    transcoder they are a pair, with the ``(tokens, d_out)`` targets. A directory of checkpoints is judged with all of them in
    place at once, and each alone, and so is a cross-layer transcoder. ``given`` is what other libraries' files leave open:
    ``model``, ``text`` (a tuple of files), ``hook`` and so on (see ``eval.opened.Given``).
    """
    from .eval.checkpoint import CheckpointOptions
    from .eval.report.evaluate import evaluate as run

    return run(directory, out, activations, tokens, given=CheckpointOptions(**given))


def features(directory: str, out: str | None = None, tokens: int | None = None, **given: Any) -> dict[str, Any]:
    """Describe every latent of a checkpoint on held-out documents; returns where it comes from, and medians of its scores.

    Writes ``features.jsonl`` (one latent a line), ``features.json`` (what is returned) and ``features.html`` (to browse) into
    ``out``, or the folder ``features`` of the checkpoint.
    """
    from .eval.checkpoint import CheckpointOptions
    from .eval.features.run import features as run

    return run(directory, out, tokens, given=CheckpointOptions(**given))


app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="Recipe keys to override.")]


# What another library's files may leave open, or there is to choose among.
Format = Annotated[str | None, typer.Option("--from", metavar="FORMAT", help="The files' format, in place of what they say.")]
Hook = Annotated[str | None, typer.Option(help="Which of several; or which hook it is for, MODULE:SIDE, if no file says it.")]
Subfolder = Annotated[str | None, typer.Option(help="Where in the directory or repository.")]
Revision = Annotated[str | None, typer.Option(help="The hub repository's revision.")]
GivenK = Annotated[int | None, typer.Option("--k", help="Latents per token, if no file says it.")]
GivenScale = Annotated[float | None, typer.Option("--scale", help="What inputs are multiplied by, if no file says it.")]
GivenThreshold = Annotated[float | None, typer.Option("--threshold", help="What latents must exceed, if no file says it.")]
# The options of every command that reads dictionaries and runs their model.
GIVEN: dict[str, Any] = {
    "model": Annotated[str | None, typer.Option(help="The language model (hub id or directory), in place of what files say.")],
    "text": Annotated[list[str] | None, typer.Option(help="Text to judge on (.txt, .jsonl, .parquet); repeatable.")],
    "settings": Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A recipe's key: text.context_length=256, harvest.exclude_leading=0."),
    ],
    "hook": Hook,
    "hook_out": Annotated[str | None, typer.Option(help="Of a transcoder, where it writes, if no file says it.")],
    "format": Format,
    "subfolder": Subfolder,
    "revision": Revision,
    "k": GivenK,
    "scale": GivenScale,
    "threshold": GivenThreshold,
}


def _reads_dictionaries(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options ``GIVEN`` that it lacks, which it gets as one argument, ``given``."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        from .eval.checkpoint import CheckpointOptions
        from .training.recipe import parse_overrides

        said = {name: arguments.pop(name) for name in options}
        said |= {"text": tuple(said["text"] or ()), "settings": parse_overrides(said["settings"] or [])}
        command(**arguments, given=CheckpointOptions(**said))

    own = [parameter for name, parameter in signature(command).parameters.items() if name != "given"]
    options = {name: option for name, option in GIVEN.items() if name not in signature(command).parameters}
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=option) for name, option in options.items()]
    vars(run).pop("__wrapped__")
    run.__signature__ = Signature([*own, *more])  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *more)}
    return run


@app.command("harvest")
def _harvest(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Store the activations a recipe asks for; an interrupted harvest goes on."""
    from .training.recipe import parse_overrides
    from .training.recipe.grid import load_grid
    from .training.resolve_hooks import resolve_recipes
    from .training.run import run_harvest

    with _progress("harvest") as progress:
        # One store serves all members of a grid.
        member = resolve_recipes(load_grid(recipe, parse_overrides(overrides or [])).recipes)[0]
        store = run_harvest(member, progress(member.recipe.harvest.tokens or 0))
    print(f"{store.directory}: {store.tokens('train'):,} training and {store.tokens('heldout'):,} held-out tokens")


@app.command("train")
def _train(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan, then stop.")] = False,
) -> None:
    """Harvest if need be, then train, all members of a grid side by side; the same command continues an interrupted run."""
    from .training.preflight import grid_lines, preflight_all
    from .training.recipe import parse_overrides
    from .training.recipe.grid import load_grid
    from .training.resolve_hooks import resolve_recipes
    from .training.run import train_all

    grid = load_grid(recipe, parse_overrides(overrides or []))
    recipes = resolve_recipes(grid.recipes)
    plans = preflight_all(recipes)
    _table(grid_lines(grid, recipes, plans))
    if dry_run:
        return
    with _progress("harvest") as progress:
        directories = train_all(recipes, progress=progress(recipes[0].recipe.harvest.tokens or 0), plans=plans)
    for directory in directories:
        print(f"{directory}: done. Judge it with: sparsary eval {directory}")


@app.command("eval")
@_reads_dictionaries
def _eval(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoint directories, directories of them (all at once), or hub ids; of one model, they share its passes.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Where the report goes; beside the checkpoint if not given. Of several, each has a folder in it."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Held-out tokens to judge on; the recipe's eval_tokens if not given.")
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option("--oracle", help="Let a gradient SAE choose by the gradient of the loss that is measured; needs --out."),
    ] = False,
    pursuit: Annotated[
        str | None, typer.Option(help="Find codes anew from the atoms: matching_pursuit, orthogonal_..., gradient_pursuit.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Latents per token, with --pursuit, or if no file says it.")] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure everything anew, whatever eval_cache beside the checkpoint holds.")
    ] = False,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Fit the linear map of the error without a constant.")] = False,
    ridge: Annotated[
        list[float] | None,
        typer.Option(help="Ridge of that map, in mean squares of what it reads; of several, documents choose. Repeatable."),
    ] = None,
    authors: Annotated[
        bool, typer.Option("--authors", help="Also split the error as its authors' scripts do (arXiv:2410.14670): authors_*.")
    ] = False,
    given: Any = None,
) -> None:
    """Judge dictionaries on held-out documents: report.json and report.html."""
    from .eval.checkpoint import folders
    from .eval.report.evaluate import InferenceMode, evaluate_all
    from .eval.report.summary import report_summary

    outs = folders(checkpoints, out)
    fitted: dict[str, Any] = {"bias": False} if no_bias else {}
    fitted |= {"ridge": ridge[0] if len(ridge) == 1 else ridge} if ridge else {}
    given = given if pursuit is not None else replace(given, k=k)
    options = {"linear_error": fitted | ({"authors": True} if authors else {}), "error_cost": fitted}
    with _progress("eval") as progress:
        reports = evaluate_all(
            checkpoints,
            outs,
            tokens,
            InferenceMode(oracle, pursuit, k if pursuit is not None else None),
            not no_cache,
            progress,
            options,
            given,
        )
    for report in reports:
        _table(report_summary(report))
        print(f"report: {report['report_path']}")


@app.command("features")
@_reads_dictionaries
def _features(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id.")],
    out: Annotated[str | None, typer.Option(help="Where it goes; the checkpoint's folder 'features' if not given.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens to read; 200,000 if not given.")] = None,
    explainer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Let this language model explain latents: its name, or a local directory."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The OpenAI-compatible endpoint that has it, e.g. http://localhost:8000/v1."),
    ] = None,
    explain: Annotated[int, typer.Option(help="With --explainer: how many latents.")] = 20,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key.")] = "OPENAI_API_KEY",
    requests_per_minute: Annotated[float | None, typer.Option(help="At most so many requests to the endpoint.")] = None,
    given: Any = None,
) -> None:
    """Describe every latent on held-out documents: features.jsonl, and features.html to browse and search."""
    from .eval.features.run import DEFAULT_TOKENS, Explainer, features_summary
    from .eval.features.run import features as run

    if address is not None and explainer is None:
        raise ValueError("--explainer: required with --address: the name by which the endpoint knows the model.")
    asked = None if explainer is None else Explainer(explainer, address, explain, key_env, requests_per_minute)
    with _progress("features") as progress:
        about = run(checkpoint, out, tokens, progress=progress(tokens or DEFAULT_TOKENS), explainer=asked, given=given)
    _table(features_summary(about))
    print(f"page: {about['page_path']}")


@app.command("probe")
@_reads_dictionaries
def _probe(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="factors, supervised, sparse_probing, scr, tpp or absorption; repeatable. All that can run."
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labelled text (JSONL: text, label, perhaps spurious) in place of the embedded corpus.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Where results go; CHECKPOINT/probing if not given.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens for factors and absorption.")] = None,
    seed: Annotated[int, typer.Option(help="Decides splits, prompts and resampling.")] = 0,
    given: Any = None,
) -> None:
    """Judge latents by what is known of the text: probing.json, and SAEBench's result files."""
    from .eval.probing.run import probe

    found = probe(checkpoint, task, labels, out, tokens, seed, given)
    for head, rows in found.tables:
        _columns(head, rows)
        print()
    if found.lines:
        _table(found.lines)
    print(f"results: {found.path}")


@app.command("circuits")
@_reads_dictionaries
def _circuits(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...", help="Checkpoint directories, directories of them (all hooks at once), or hub ids."
        ),
    ],
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task by name, or a file of pairs (JSONL); repeatable. ioi.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Repeatable. attribution, relevance and random if not given.")
    ] = None,
    ablation: Annotated[str, typer.Option(help="resample, mean, zero or optimal.")] = "resample",
    corruption: Annotated[str | None, typer.Option(help="What is changed in a prompt; the task's own default.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs: half choose circuits, the other half judge them.")] = 100,
    edges: Annotated[bool, typer.Option("--edges", help="Also the edges between heads and MLPs.")] = False,
    out: Annotated[str | None, typer.Option(help="Where results go; CHECKPOINT/circuits if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Decides prompts, random features and resampling.")] = 0,
    prompt: Annotated[
        str | None, typer.Option(help="Draw the attribution graph of this text instead; for transcoders.")
    ] = None,
    given: Any = None,
) -> None:
    """Are the latents the model's own parts? Circuits of them, against neurons, heads and random features: circuits.html."""
    if prompt is not None:
        from .eval.attribution_graphs.run import run_graph

        if task or method or len(checkpoints) > 1:
            raise ValueError("--prompt: expected one CHECKPOINT and neither --task nor --method: it draws one text's graph.")
        _table(
            [(key.replace("_", " "), str(value)) for key, value in run_graph(checkpoints[0], prompt, out, given=given).items()]
        )
        return
    from .eval.circuits.benchmark import Settings, benchmark, best_rows, n_steps

    chosen = {"tasks": tuple(task) if task else None, "methods": tuple(method) if method else None}
    settings = Settings(
        ablation=ablation,
        corruption=corruption,
        pairs=pairs,
        seed=seed,
        edges=edges,
        **{key: value for key, value in chosen.items() if value is not None},
    )
    with _progress("circuits") as progress:
        found = benchmark(checkpoints, settings, out, progress(n_steps(len(checkpoints), settings)), given)
    _columns(*best_rows(found))
    print(f"results: {found['path']}")
    print(f"page: {found['page_path']}")


@app.command("compare")
def _compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... | RECIPE_OR_DIRECTORY... [key.sub=value ...]",
            help="Checkpoints or reports to set side by side; or recipe files, or directories of them (their *.yaml without "
            "base.yaml), and keys to override in all.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Train every recipe with seeds 0, 1, ..., so many.")] = 3,
    out: Annotated[str, typer.Option(help="Where the comparison goes, and runs (RECIPE/seed-N).")] = "runs/comparison",
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Judge all runs on so many held-out tokens; without it, those not judged yet.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure runs anew, whatever eval_cache holds.")] = False,
) -> None:
    """Runs side by side, or recipes trained and judged over one store: comparison.json and comparison.html."""
    from .eval.compare import recipes
    from .eval.compare import runs as side_by_side
    from .training.recipe import parse_overrides

    named = [argument for argument in arguments if "=" not in argument]
    overrides = parse_overrides([argument for argument in arguments if "=" in argument])
    runs = side_by_side.runs_among(named)
    if runs is not None:
        if overrides:
            raise ValueError(f"{next(iter(overrides))}: expected no recipe keys with runs, which are trained already.")
        with _progress("eval") as progress:
            comparison = side_by_side.compare_runs(runs, out, tokens, not no_cache, progress)
        head, *rows = side_by_side.runs_summary(comparison)
        _columns(head, rows)
        print(f"report: {comparison['page_path']}")
        return
    if tokens is not None or no_cache:
        raise ValueError("compare: --tokens and --no-cache: expected runs, got recipes. Override eval_tokens=N instead.")
    with _progress("harvest") as progress:
        comparison = recipes.compare(named, overrides, seeds, out, progress)
    head, *rows = recipes.recipes_summary(comparison)
    _columns(head, rows)
    print(f"* best mean\nreport: {comparison['page_path']}")


@app.command("convert")
def _convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory, a file or a hub repository id.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A new or empty folder.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="sparsary, or a library's format (docs/formats.md).")] = "sparsary",
    format: Format = None,  # noqa: A002
    hook: Hook = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    k: GivenK = None,
    scale: GivenScale = None,
    threshold: GivenThreshold = None,
    model: Annotated[str | None, typer.Option(help="The language model's id, where the files do not say it.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64; auto: the files' own.")] = "float32",
) -> None:
    """Read another library's dictionary, or ours, and write it as ours, or as another library's."""
    missing = {"hook": hook, "k": k, "scale": scale, "threshold": threshold, "model": model}
    given = {"format": format, "revision": revision, "subfolder": subfolder, "dtype": dtype}
    found = convert(source, destination, to, **given, **missing)
    _table(found.lines())
    print(f"{found.directory}: done.")


@app.command("info")
@_reads_dictionaries
def _info(
    path: Annotated[str, typer.Argument(help="A checkpoint, another library's dictionary or an activation store.")],
    tokens: Annotated[int, typer.Option(min=2, help="With --model or --text: run it on so many tokens.")] = 4000,
    given: Any = None,
) -> None:
    """Say what a dictionary or a store is, and check it; with --model or --text also what it does to activations."""
    from .eval.checkpoint import open_checkpoint, sanity_of
    from .training.info import describe_files

    lines, problems = describe_files(path, given.options(given.model), given.format, given.subfolder, given.revision)
    _table(lines)
    if problems:
        raise ValueError("\n".join(problems))
    if given.model is None and not given.text:
        return
    doubts = []
    for hook, found in sanity_of(open_checkpoint(path, given), tokens).items():
        figures = (
            f"fvu {found.fvu:.4f}   l0 {found.l0:.2f}   outputs / targets {found.norm_ratio:.3f}   cosine {found.cosine:.3f}"
        )
        _table([(hook, f"{figures}   on {found.tokens:,} tokens"), *(("wrong?", doubt) for doubt in found.warnings)])
        doubts += [f"{hook}: {doubt}" for doubt in found.warnings]
    if doubts:
        raise ValueError("wrong hook or normalisation: " + "; ".join(doubts) + ".")


bench = typer.Typer(help="Measure speed, as ratios within one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
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


@bench.command("step")
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
    """A training step against its encoder product and other libraries' steps, all in turn, each in its own process."""
    from .training.bench.comparison import GROWTH, QUICK_GROWTH, STEP_FAMILIES, STEP_SHAPE, bench_slopes, bench_steps, rounds_of

    names = family or ["topk"]
    plan = _bench_plan(overrides, shape, STEP_SHAPE, names, STEP_FAMILIES, variant, rounds, threads, peers, peer, quick)
    with _progress("bench") as progress:
        if slopes:
            growth = QUICK_GROWTH if quick else GROWTH
            report = bench_slopes(plan, growth, progress(rounds_of(plan, growth)))
        else:
            report = bench_steps(plan, progress(rounds_of(plan)))
    _bench_report("step", report, json)


@bench.command("pursuit")
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
    """A training step of matching pursuit, and pursuits of given atoms (inference), in the same way."""
    from .training.bench.comparison import PURSUIT_FAMILIES, PURSUIT_SHAPE, bench_steps, rounds_of

    names = family or ["matching_pursuit", "gradient_pursuit"]
    plan = _bench_plan(overrides, shape, PURSUIT_SHAPE, names, PURSUIT_FAMILIES, variant, rounds, threads, peers, peer, quick)
    with _progress("bench") as progress:
        report = bench_steps(plan, progress(rounds_of(plan)))
    _bench_report("pursuit", report, json)


@bench.command("stream")
def _bench_stream(
    width: Annotated[int, typer.Option(min=1, help="Width of an activation.")] = 768,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Batches from activation stores in the page cache: GB/s of float32, for every dtype of the store."""
    from .training.bench.data import bench_stream

    report = bench_stream(width, 8192, 256, 2, 3) if quick else bench_stream(width, repeats=rounds)
    _bench_report("stream", report, json)


@bench.command("harvest")
def _bench_harvest(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    dtype: Annotated[str, typer.Option(help="What the store holds: float32, bfloat16, float16, int8.")] = "float32",
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """A harvest of the embedded model against the bare forward passes of the same contexts, in turn."""
    from .training.bench.data import bench_harvest

    _bench_report("harvest", bench_harvest(tokens=2000 if quick else 50_000, dtype=dtype, repeats=rounds), json)


@bench.command("loading")
def _bench_loading(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """A 16k x 2304 dictionary in other libraries' formats: time and memory of loading, over those of its bytes."""
    from .training.bench.loading import bench_loading

    _bench_report("loading", bench_loading(64, 32, 1) if quick else bench_loading(rounds=rounds), json)


@bench.command("grid")
def _bench_grid(
    members: Annotated[int, typer.Option(min=2, help="Dictionaries trained together.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds.")] = 5,
    quick: BenchQuick = False,
    json: BenchJson = None,
) -> None:
    """Several dictionaries over one stream against one alone, in turn, for several shapes."""
    from .training.bench.grid import SHAPES, bench_grid

    shapes = dict([*SHAPES.items()][:1]) if quick else SHAPES
    _bench_report("grid", bench_grid(members, rounds, shapes), json)


@bench.command("gpu")
def _bench_gpu(
    shape: Annotated[str, typer.Option("--shape", metavar="TOKENSxD_INxN_LATENTSxK", help="Sizes of the step.")] = (
        "8192x4096x131072x64"
    ),
    json: BenchJson = None,
) -> None:
    """A TopK step on a CUDA GPU in bf16, and the encoder product it cannot do without."""
    from .training.bench.comparison import parse_shape
    from .training.bench.gpu import bench_gpu_step

    _bench_report("gpu", bench_gpu_step(*parse_shape(shape)), json)


def _bench_plan(
    overrides: list[str] | None,
    shape: list[str] | None,
    default: Any,
    family: list[str],
    families: tuple[str, ...],
    variant: list[str] | None,
    rounds: int,
    threads: int | None,
    peers: str | None,
    peer: list[str] | None,
    quick: bool,
) -> Any:
    import torch

    from .training.bench.comparison import LIBRARIES, QUICK_SHAPE, BenchPlan, parse_shape, peers_python, require_choices
    from .training.recipe import parse_overrides

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


def _bench_report(name: str, report: dict[str, Any], json: str | None) -> None:
    """Print the tables, or the numbers of a flat report, and write the whole of it if asked to."""
    from .sae.files import write_json
    from .training.bench.comparison import tables
    from .training.bench.environment import environment

    report = {"bench": name, "environment": environment()} | report
    about = report["environment"]
    cpu = f"{about['cpu']}, " if about["cpu"] else ""
    print(f"{cpu}{about['threads']} threads, torch {about['torch']}")
    for table in tables(report):
        print(f"\n{table.title}")
        _columns(table.head, table.rows)
        for note in table.notes:
            print(note)
    if json is not None:
        write_json(Path(json), report)


def _columns(head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*map(escape, row))
    # In a file nothing limits the width; rich would cut numbers off at column 80.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _table(lines: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in lines:
        table.add_row(f"[bold]{name}[/bold]", value)
    Console().print(table)


@contextmanager
def _progress(name: str) -> Any:
    """A progress bar on a terminal that appears with the first report of progress and goes with the last."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, disable=not console.is_terminal, transient=True)

    def start(total: int) -> Any:
        task = bar.add_task(name, total=total)

        def update(tokens: int) -> None:
            bar.start()
            bar.update(task, completed=tokens)
            if tokens >= total:
                bar.stop()

        return update

    try:
        yield start
    finally:
        bar.stop()


def main() -> None:
    """The console script. What a user can mend ends with status 2 and one message, without traceback."""
    # Read when torch is first loaded. By default OpenMP's threads go on spinning after a product and keep the processor from
    # whatever comes next: reading, compiled kernels, other processes. Harvest and training took twice to four times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Their notes on requests and caches are not ours.
    for name in ("httpx", "urllib3", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        # Not standalone: errors are to be shown our way. Ctrl-C comes back as status 130.
        status = app(standalone_mode=False) or 0
        if status == 130:
            print("Stopped. What was complete is saved; the same command continues.", file=sys.stderr)
        sys.exit(status)
    except typer.TyperException as error:
        print(f"sparsary: {error.format_message()} Try: sparsary --help", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except (ValueError, OSError) as error:
        print(f"sparsary: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
