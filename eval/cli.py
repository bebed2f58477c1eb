"""Commands that evaluate, compare, convert and describe dictionaries."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.cli import TrustRemoteCode, recipe_overrides
from ..training.console import print_fields, print_table

if TYPE_CHECKING:
    from ..transcoders.load import CheckpointOptions

log = logging.getLogger(__name__)
app = typer.Typer()
# Options for metadata that third-party files may lack, and for choosing among several dictionaries.
Format = Annotated[str | None, typer.Option("--from", metavar="FORMAT", help="Format of the files; default: detected.")]
Hook = Annotated[str | None, typer.Option(help="Which dictionary to load; or its hook, MODULE:SIDE, if not in the files.")]
Subfolder = Annotated[str | None, typer.Option(help="Subfolder of the directory or repository.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the Hugging Face Hub repository.")]
GivenK = Annotated[int | None, typer.Option("--k", help="Latents per token, if not in the files.")]
GivenScale = Annotated[float | None, typer.Option("--scale", help="Input scale factor, if not in the files.")]
GivenThreshold = Annotated[float | None, typer.Option("--threshold", help="Activation threshold, if not in the files.")]
# Options of every command that loads dictionaries and runs their language model.
GIVEN: dict[str, Any] = {
    "model": Annotated[str | None, typer.Option(help="Language model (hub id or directory); default: from the files.")],
    "text": Annotated[list[str] | None, typer.Option(help="Text file to evaluate on (.txt, .jsonl, .parquet); repeatable.")],
    "settings": Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Recipe key: text.context_length=256, harvest.exclude_leading=0."),
    ],
    "trust_remote_code": TrustRemoteCode,
    "hook": Hook,
    "hook_out": Annotated[str | None, typer.Option(help="Output hook of a transcoder, if not in the files.")],
    "format": Format,
    "subfolder": Subfolder,
    "revision": Revision,
    "k": GivenK,
    "scale": GivenScale,
    "threshold": GivenThreshold,
}


def _reads_dictionaries(command: Callable[..., None]) -> Callable[..., None]:
    """Add the missing ``GIVEN`` options to a command, and pass them to it as one argument, ``options``."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        # Before the imports below, which take seconds.
        log.info("%s: loading %s", command.__name__.strip("_"), _sources(arguments))
        from ..training.recipe import parse_overrides
        from ..transcoders.load import CheckpointOptions

        said = {name: arguments.pop(name) for name in added}
        said |= {"text": tuple(said["text"] or ()), "settings": parse_overrides(said["settings"] or [])}
        said["trust_remote_code"] = bool(said["trust_remote_code"])
        command(**arguments, options=CheckpointOptions(**said))

    own = [parameter for name, parameter in signature(command).parameters.items() if name != "options"]
    added = {name: option for name, option in GIVEN.items() if name not in signature(command).parameters}
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=option) for name, option in added.items()]
    vars(run).pop("__wrapped__")
    run.__signature__ = Signature([*own, *more])  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *more)}
    return run


def _sources(arguments: dict[str, Any]) -> str:
    """Return the checkpoints among a command's arguments."""
    given = next(arguments[name] for name in ("checkpoints", "checkpoint", "path") if name in arguments)
    return given if isinstance(given, str) else ", ".join(given or arguments.get("model") or ())


@app.command("eval")
@_reads_dictionaries
def _eval(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoints, directories of them (spliced in together), or hub ids. Those of one model share its passes.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Output directory; several checkpoints get a folder each. Default: the checkpoint's own."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Held-out tokens to evaluate on. Default: the recipe's eval_tokens.")
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option("--oracle", help="Select latents of a gradient SAE by the gradient of the evaluated loss; needs --out."),
    ] = False,
    pursuit: Annotated[
        str | None, typer.Option(help="Encode by pursuit: matching_pursuit, orthogonal_..., gradient_pursuit.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Latents per token, with --pursuit or if not in the files.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Recompute all metrics; do not use eval_cache.")] = False,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Fit the linear map of the error without a bias.")] = False,
    ridge: Annotated[
        list[float] | None,
        typer.Option(help="Ridge of that map, relative to its input's mean square; repeatable (chosen by cross-validation)."),
    ] = None,
    authors: Annotated[
        bool, typer.Option("--authors", help="Also decompose the error as in the scripts of arXiv:2410.14670: authors_*.")
    ] = False,
    *,
    options: "CheckpointOptions",
) -> None:
    """Evaluate dictionaries on held-out documents; write report.json and report.html."""
    from .checkpoint import folders, with_grids_members
    from .report.evaluate import InferenceMode, evaluate_all
    from .report.summary import report_summary

    checkpoints = with_grids_members(checkpoints)
    outs = folders(checkpoints, out)
    fitted: dict[str, Any] = {"bias": False} if no_bias else {}
    fitted |= {"ridge": ridge[0] if len(ridge) == 1 else ridge} if ridge else {}
    options = options if pursuit is not None else replace(options, k=k)
    metric_options = {"linear_error": fitted | ({"authors": True} if authors else {}), "error_cost": fitted}
    mode = InferenceMode(oracle, pursuit, k if pursuit is not None else None)
    reports = evaluate_all(checkpoints, outs, tokens, mode, not no_cache, options, metric_options)
    for report in reports:
        print_fields(report_summary(report))
        print(f"report: {report['report_path']}")


@app.command("features")
@_reads_dictionaries
def _features(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id.")],
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/features.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens to read. Default: 200,000.")] = None,
    explainer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Language model that explains latents: a name or a local directory."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible endpoint of the explainer, e.g. http://localhost:8000/v1."),
    ] = None,
    explain: Annotated[int, typer.Option(help="Number of latents to explain, with --explainer.")] = 20,
    key_env: Annotated[str, typer.Option(help="Environment variable with the endpoint's API key.")] = "OPENAI_API_KEY",
    requests_per_minute: Annotated[float | None, typer.Option(help="Rate limit for the endpoint.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            help="Scorer of explanations: detection, fuzzing, intervention or surprisal; repeatable. Default: the first two.",
        ),
    ] = None,
    neuronpedia: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also export to this folder, in the layout that Neuronpedia imports.")
    ] = None,
    neuronpedia_id: Annotated[
        str | None,
        typer.Option(metavar="MODEL/LAYER-SET", help="Id of the export, such as gpt2-small/8-res-jb. Default: from the files."),
    ] = None,
    *,
    options: "CheckpointOptions",
) -> None:
    """Describe every latent on held-out documents; write features.jsonl, and features.html to browse and search."""
    from .features.neuronpedia.export import NeuronpediaExport
    from .features.run import Explainer, features, features_summary

    if neuronpedia_id is not None and neuronpedia is None:
        raise ValueError("--neuronpedia-id: expected together with --neuronpedia DIR.")
    export = None if neuronpedia is None else NeuronpediaExport(neuronpedia, neuronpedia_id)
    if address is not None and explainer is None:
        raise ValueError(
            "--explainer: expected the model's name at the endpoint with --address, got none. Give --explainer NAME."
        )
    if scorer and explainer is None:
        raise ValueError(
            "--scorer: expected --explainer beside it, got none: it scores the explanations. Give --explainer NAME."
        )
    scorers = {"scorers": tuple(scorer)} if scorer else {}
    asked = None if explainer is None else Explainer(explainer, address, explain, key_env, requests_per_minute, **scorers)
    about = features(checkpoint, out, tokens, explainer=asked, options=options, neuronpedia=export)
    print_fields(features_summary(about))
    if "neuronpedia_path" in about:
        print(f"Neuronpedia: {about['neuronpedia_path']}")
    print(f"page: {about['page_path']}")


@app.command("probe")
@_reads_dictionaries
def _probe(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="factors, infomec, supervised, sparse_probing, scr, tpp or absorption; repeatable. Default: all that apply.",
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labeled text (JSONL: text, label, optional spurious) instead of the embedded corpus.")
    ] = None,
    factors: Annotated[
        str | None,
        typer.Option(help="Factors of tokens (JSONL: text, spans; or tokens, factors) for the first two tasks."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/probing.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Number of tokens for factors, infomec and absorption.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed for splits, prompts and resampling.")] = 0,
    *,
    options: "CheckpointOptions",
) -> None:
    """Evaluate latents against ground-truth labels of the text; write probing.json, probing.html and SAEBench result files."""
    from .probing.run import probe

    found = probe(checkpoint, task, labels, out, tokens, seed, options, factor_file=factors)
    for head, rows in found.tables:
        print_table(head, rows)
        print()
    if found.lines:
        print_fields(found.lines)
    print(f"results: {found.path}\npage: {found.path.with_suffix('.html')}")


@app.command("circuits")
@_reads_dictionaries
def _circuits(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoints, directories of checkpoints (all hooks at once), or hub ids; none is needed with --model.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Task name, or file of prompt pairs (JSONL); repeatable. Default: ioi.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Discovery method; repeatable. Default: attribution, relevance, random."),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            "--units",
            help="Unit set: latents, random, neurons, mlp_neurons, components (heads and MLPs) or experts; repeatable. "
            "Default: all that there are.",
        ),
    ] = None,
    ablation: Annotated[
        str, typer.Option(help="Ablation: resample, mean, zero (experts of a mixture: off) or optimal.")
    ] = "resample",
    corruption: Annotated[str | None, typer.Option(help="How prompts are corrupted. Default: the task's own.")] = None,
    pairs: Annotated[int, typer.Option(help="Number of prompt pairs: half to find circuits, half to evaluate them.")] = 100,
    edges: Annotated[bool, typer.Option("--edges", help="Also score edges between heads and MLPs.")] = False,
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/circuits.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed for prompts, random features and resampling.")] = 0,
    prompt: Annotated[
        str | None, typer.Option(help="Compute the attribution graph of this text instead; for transcoders.")
    ] = None,
    random_circuits: Annotated[
        int | None,
        typer.Option(
            "--random-circuits",
            help="Random circuits per size, of equal counts per hook: a floor. Default: 0; 10 with --compare.",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare the circuits of several tasks, or of two models: circuit_comparison.html."),
    ] = False,
    repair: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="With --compare: units of task A that B lacks do in B's runs what they do in A's."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Language model (hub id or directory); default: from the files. With --compare two: BASE, then TUNED."
        ),
    ] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="With --prompt: heads that carry the edges, and why they attend where they do.")
    ] = False,
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="With --prompt: numbers of supernodes, coarse to fine (8,32,128); search a circuit along them.",
        ),
    ] = None,
    mib: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only score the edges of the model, and write them for MIB: FILE.json, or a folder."),
    ] = None,
    *,
    options: "CheckpointOptions",
) -> None:
    """Find circuits of latents on prompt pairs, beside those of neurons, heads, experts and random features: circuits.html."""
    compare = compare or repair is not None
    if not checkpoints and not model and not compare and mib is None:
        raise ValueError("CHECKPOINT: expected one or more, got none. Give a dictionary, or a model: --model MODEL --out DIR.")
    if model is not None and len(model) > 1 and not compare:
        raise ValueError(f"--model: expected one, got {len(model)}. Add --compare to compare two checkpoints of a model.")
    checkpoints, options = checkpoints or [], replace(options, model=model[0] if model else None)
    if prompt is not None:
        from .attribution_graphs.run import attribution_graph
        from .attribution_graphs.summary import graph_summary, graph_tables

        if task or method or units or compare or mib is not None or len(checkpoints) != 1:
            raise ValueError(
                "--prompt: expected one CHECKPOINT and none of --task, --method, --units, --compare, --mib: it draws one graph."
            )
        counts = _level_counts(levels)
        facts = attribution_graph(checkpoints[0], prompt, out, options=options, attention=attention, levels=counts)
        print_fields(graph_summary(facts))
        for head, rows in graph_tables(facts):
            print()
            print_table(head, rows)
        print(f"\nresults: {facts['json_path']}")
        print(f"page: {facts['page_path']}")
        return
    for name, given in (("--attention", attention), ("--levels", levels is not None)):
        if given:
            raise ValueError(f"{name}: expected --prompt beside it, got none: it concerns one text's graph. Add --prompt TEXT.")
    from .checkpoint import with_grids_members
    from .circuits.benchmark import CircuitSettings, best_rows, circuits

    methods = {"methods": tuple(method)} if method else {"methods": ("attribution",)} if compare or mib is not None else {}
    tasks = {"tasks": tuple(task)} if task else {"tasks": repair} if repair else {}
    settings = CircuitSettings(
        ablation=ablation,
        corruption=corruption,
        pairs=pairs,
        seed=seed,
        edges=edges,
        random_circuits=random_circuits or 0,
        units=tuple(units or ()),
        **methods,
        **tasks,
    )
    if compare and mib is not None:
        raise ValueError("--mib: expected without --compare: it scores the edges of one model.")
    if compare:
        from .circuits.comparison.cli import compare_and_print

        compare_and_print(checkpoints, settings, model or [], [repair] if repair else [], out, options)
        return
    if mib is not None:
        from .circuits.mib import mib_submission

        for row in mib_submission(checkpoints, mib, settings, options.model, options)["rows"]:
            print(f"{row['task']}, {row['method']}: {row['edges']:,} edges: {row['file']}")
        return
    found = circuits(with_grids_members(checkpoints), settings, out, options)
    print_table(*best_rows(found))
    print(f"results: {found['path']}")
    print(f"page: {found['page_path']}")


def _level_counts(levels: str | None) -> tuple[int, ...]:
    """Return the numbers of ``--levels``."""
    parts = [] if levels is None else levels.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--levels: expected numbers of clusters joined by commas, such as 8,32,128, got {levels!r}.")
    return tuple(int(part) for part in parts)


@app.command("diff")
@_reads_dictionaries
def _diff(
    checkpoint: Annotated[str, typer.Argument(help="A crosscoder of two models: a checkpoint directory.")],
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/diff.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Held-out tokens to read. Default: the recipe's eval_tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the latents patched as a floor.")] = 0,
    difference_sae: Annotated[
        bool,
        typer.Option(
            "--difference-sae",
            help="Also train an SAE on the difference of the activations, by the crosscoder's recipe, as a floor.",
        ),
    ] = False,
    *,
    options: "CheckpointOptions",
) -> None:
    """Compare two models by their crosscoder: exclusive latents, latent scaling, KL closed; write diff.json and diff.html."""
    from .diff.run import diff
    from .diff.summary import diff_summary, diff_tables

    found = diff(checkpoint, out, tokens, seed, options, difference_sae)
    print_fields(diff_summary(found))
    for head, rows in diff_tables(found):
        print()
        print_table(head, rows)
    print(f"\nresults: {found['path']}\npage: {found['page_path']}")


@app.command("compare")
def _compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... | RECIPE_OR_DIRECTORY... [key.sub=value ...]",
            help="Checkpoints or reports to compare; or recipe files, or directories of recipes (*.yaml except base.yaml), and "
            "keys to override in all of them.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Number of seeds to train each recipe with: 0, 1, ...")] = 3,
    out: Annotated[str, typer.Option(help="Output directory, also for runs (RECIPE/seed-N).")] = "runs/comparison",
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Held-out tokens to evaluate all runs on. Default: only runs without a report.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Recompute all metrics; do not use eval_cache of runs.")] = False,
    trust_remote_code: TrustRemoteCode = None,
    against: Annotated[
        str | None, typer.Option(help="Recipe or run that others are compared with. Default: the first.")
    ] = None,
    match_l0: Annotated[
        float | None,
        typer.Option("--match-l0", min=0.001, help="Compare at this l0, interpolating sweeps over budgets (k or target_l0)."),
    ] = None,
) -> None:
    """Compare runs, or train and evaluate recipes over one store; write comparison.json and comparison.html."""
    log.info("compare: loading %s", ", ".join(arguments))
    from .compare.run import compare, comparison_summary

    # Not an override if it exists as a path: names of grid members contain `=`.
    named = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
    overrides = recipe_overrides([argument for argument in arguments if argument not in named], None)
    trusted = bool(trust_remote_code)
    comparison = compare(named, overrides, seeds, out, tokens, not no_cache, trusted, against, match_l0)
    for head, *rows in comparison_summary(comparison):
        print_table(head, rows)
        print()
    # Only recipes' figures, which are means over seeds, have a star at the best ones.
    print(("* best mean at the common l0\n" if "best" in comparison else "") + f"report: {comparison['page_path']}")


@app.command("similarity")
@_reads_dictionaries
def _similarity(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Dictionaries of several seeds, widths or layers, or a stack.")
    ],
    out: Annotated[str | None, typer.Option(help="Output directory for similarity.json. Default: print only.")] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Held-out tokens for stitching; 0: directions only.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Random seed of the floor of random directions.")] = 0,
    *,
    options: "CheckpointOptions",
) -> None:
    """Compare latents of dictionaries: matched cosines, and the latents of one that the other lacks (stitching)."""
    from .compare.similarity import similarity, similarity_table

    found = similarity(checkpoints, out, tokens, seed=seed, options=options)
    print_table(*similarity_table(found))
    for row in found["rows"]:
        for name, reason in row["reasons"].items():
            print(f"{row['a']}, {row['b']}: no {name}: {reason}")
    if out is not None:
        print(f"results: {found['path']}")


@app.command("convert")
def _convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory, file or hub repository id.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A new or empty folder.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="sparsary, or a library's format (docs/formats.md).")] = "sparsary",
    format: Format = None,  # noqa: A002
    hook: Hook = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    k: GivenK = None,
    scale: GivenScale = None,
    threshold: GivenThreshold = None,
    model: Annotated[str | None, typer.Option(help="Language model id; default: from the files.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64, or auto (as in the files).")] = "float32",
    calibrate: Annotated[
        int | None,
        typer.Option(min=2, metavar="TOKENS", help="Write topk as thresholds, measured on this many held-out tokens."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text file for --calibrate; repeatable.")] = None,
) -> None:
    """Convert a dictionary between sparsary and the formats of other libraries."""
    log.info("convert: loading %s", source)
    from ..transcoders.convert import convert
    from ..transcoders.load import CheckpointOptions
    from .checkpoint import open_checkpoint, thresholds_of

    options = CheckpointOptions(
        hook=hook, k=k, scale=scale, threshold=threshold, model=model, format=format, subfolder=subfolder, revision=revision
    )
    thresholds = None
    if calibrate is not None:
        thresholds = thresholds_of(open_checkpoint(source, replace(options, text=tuple(text or ()))), calibrate)
    found = convert(source, destination, to, dtype=dtype, thresholds=thresholds, options=options)
    print_fields(found.lines())
    print(f"{found.directory}: done.")


@app.command("info")
@_reads_dictionaries
def _info(
    path: Annotated[str, typer.Argument(help="A checkpoint, another library's dictionary or an activation store.")],
    tokens: Annotated[int, typer.Option(min=2, help="Number of tokens to run on, with --model or --text.")] = 4000,
    *,
    options: "CheckpointOptions",
) -> None:
    """Describe and verify a dictionary or activation store; with --model or --text, also evaluate it on activations."""
    from .info import info

    about = info(path, options)
    print_fields(about.lines)
    if about.problems:
        raise ValueError("\n".join(about.problems))
    if options.model is None and not options.text:
        return
    doubts = []
    for hook, found in about.sanity(tokens).items():
        figures = (
            f"fvu {found.fvu:.4g}   l0 {found.l0:.4g}   outputs / targets {found.norm_ratio:.3g}   cosine {found.cosine:.4g}"
        )
        fields = [(hook, f"{figures}   on {found.tokens:,} tokens"), *(("wrong?", doubt) for doubt in found.warnings)]
        print_fields(fields)
        doubts += [f"{hook}: {doubt}" for doubt in found.warnings]
    if doubts:
        raise ValueError("wrong hook or normalisation: " + "; ".join(doubts) + ".")


@app.command("list")
def _list(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORDS]...", help="Parts of names, models, repositories or Neuronpedia ids.")
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="First fetch the newest registry of releases.")] = False,
    registry: Annotated[
        str | None, typer.Option(metavar="FILE", help="Registry to refresh from; default: SAELens's, from its repository.")
    ] = None,
) -> None:
    """List published dictionaries; any name can be given to the other commands in place of a checkpoint."""
    from ..transcoders.releases import release_directory
    from .release_sources import REGISTRY, refresh_releases, table_of_releases

    if registry is not None and not refresh:
        raise ValueError("--registry: expected together with --refresh.")
    if refresh:
        print(f"directory: {refresh_releases(registry or REGISTRY)}")
    directory = release_directory()
    found = directory.search(words or [])
    if not found:
        hint = directory.hint(words[0] if words else "")
        raise ValueError(f"WORDS: expected parts of a published dictionary's name, got {' '.join(words or [])!r}.{hint}")
    print_table(*table_of_releases(found))
    total = sum(len(release.dictionaries) for release in directory.releases.values())
    print(f"{len(found):,} of {total:,} dictionaries, as known on {directory.date}. Newer ones: sparsary list --refresh")


@app.command("render")
def _render(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="JSON output of a command: report.json, circuits.json, comparison.json, ..."),
    ],
) -> None:
    """Render pages from their JSON files, for example after an update of sparsary."""
    log.info("render: loading %s", ", ".join(files))
    from .pages.render import render_file

    for file in files:
        print(f"page: {render_file(file)}")
