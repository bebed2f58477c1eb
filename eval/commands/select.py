"""Command ``select``: training data by latents."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...training.console import print_fields, print_table
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

app = typer.Typer()


@app.command("select")
@reads_dictionaries
def _select(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id.")],
    pool: Annotated[
        str | None,
        typer.Option(help="Documents to choose from (.jsonl, .json, .txt, .parquet; a pattern or folder). Required."),
    ] = None,
    like: Annotated[str | None, typer.Option(help="Examples of the task, in a file of the same kinds. Required.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the pool to keep; from 1 on, number of documents.")] = 0.05,
    by: Annotated[
        str,
        typer.Option(help="Rank by latents, neurons, dimensions, activation, tfidf or bm25. The table has all of them."),
    ] = "latents",
    pooling: Annotated[str, typer.Option(help="max or mean over the tokens of a document.")] = "max",
    top: Annotated[int, typer.Option(min=1, help="Largest entries of a pooled code that are kept.")] = 256,
    diverse: Annotated[
        bool, typer.Option("--diverse", help="Of twice as many similar documents, keep those that cover most latents.")
    ] = False,
    column: Annotated[str, typer.Option(help="Column or JSON key with the text, in both files.")] = "text",
    truth: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE", help="Rows of the pool that are right, to measure precision.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/select.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the two folds of examples, and of resampling.")] = 0,
    *,
    options: "CheckpointOptions",
) -> None:
    """Choose the documents of a pool that are most like examples by their latents; write chosen.jsonl and select.html."""
    from ..select.run import SelectSettings, select, select_summary, select_table

    if pool is None or like is None:
        missing = "--pool" if pool is None else "--like"
        raise ValueError(f"{missing}: expected a file, got none: sparsary select {checkpoint} --pool POOL --like EXAMPLES.")
    settings = SelectSettings(keep, by, pooling, top, diverse, column, truth, seed)
    found = select(checkpoint, pool, like, settings, out, options)
    print_fields(select_summary(found))
    print()
    print_table(*select_table(found))
    chosen = found["path"].replace("select.json", "chosen.jsonl")
    print(f"\nchosen: {chosen}\nresults: {found['path']}\npage: {found['page_path']}")
