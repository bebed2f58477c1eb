"""Command ``circuits``: circuits of latents, and attribution graphs."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ...training.console import print_fields, print_table
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

app = typer.Typer()


@app.command("circuits")
@reads_dictionaries
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
    heads: Annotated[
        bool,
        typer.Option(
            "--heads",
            help="Also measure direct effects of heads on the answer; in multiple choice, attention to labels and ranks too.",
        ),
    ] = False,
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
        from ..attribution_graphs.run import attribution_graph
        from ..attribution_graphs.summary import graph_summary, graph_tables

        if task or method or units or compare or heads or mib is not None or len(checkpoints) != 1:
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
    from ..checkpoint import with_grids_members
    from ..circuits.benchmark import CircuitSettings, best_rows, circuits, head_rows

    methods = {"methods": tuple(method)} if method else {"methods": ("attribution",)} if compare or mib is not None else {}
    tasks = {"tasks": tuple(task)} if task else {"tasks": repair} if repair else {}
    settings = CircuitSettings(
        ablation=ablation,
        corruption=corruption,
        pairs=pairs,
        seed=seed,
        edges=edges,
        heads=heads,
        random_circuits=random_circuits or 0,
        units=tuple(units or ()),
        **methods,
        **tasks,
    )
    if heads and (compare or mib is not None):
        raise ValueError("--heads: expected without --compare and --mib: it is part of circuits.html.")
    if compare and mib is not None:
        raise ValueError("--mib: expected without --compare: it scores the edges of one model.")
    if compare:
        from ..circuits.comparison.cli import compare_and_print

        compare_and_print(checkpoints, settings, model or [], [repair] if repair else [], out, options)
        return
    if mib is not None:
        from ..circuits.mib import mib_submission

        for row in mib_submission(checkpoints, mib, settings, options.model, options)["rows"]:
            print(f"{row['task']}, {row['method']}: {row['edges']:,} edges: {row['file']}")
        return
    found = circuits(with_grids_members(checkpoints), settings, out, options)
    print_table(*best_rows(found))
    for table in head_rows(found):
        print()
        print_table(*table)
    print(f"results: {found['path']}")
    print(f"page: {found['page_path']}")


def _level_counts(levels: str | None) -> tuple[int, ...]:
    """Return the numbers of ``--levels``."""
    parts = [] if levels is None else levels.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--levels: expected numbers of clusters joined by commas, such as 8,32,128, got {levels!r}.")
    return tuple(int(part) for part in parts)
