"""Command ``probe``: latents against ground-truth labels."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...training.console import print_fields, print_table
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

app = typer.Typer()


@app.command("probe")
@reads_dictionaries
def _probe(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="factors, infomec, supervised, sparse_probing, bottleneck, scr, tpp or absorption; repeatable. Default: all "
            "that apply.",
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
    from ..probing.run import probe

    found = probe(checkpoint, task, labels, out, tokens, seed, options, factor_file=factors)
    for head, rows in found.tables:
        print_table(head, rows)
        print()
    if found.lines:
        print_fields(found.lines)
    print(f"results: {found.path}\npage: {found.path.with_suffix('.html')}")
