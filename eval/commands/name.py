"""Command ``name``: names of latents from vectors of words."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...training.console import print_fields, print_table
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

app = typer.Typer()


@app.command("name")
@reads_dictionaries
def _name(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id.")],
    vectors: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Vectors with names (.safetensors, .npy). Default: the model's unembedding."),
    ] = None,
    center: Annotated[bool, typer.Option("--center", help="Take the mean of the vectors away first.")] = False,
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/names.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the floor of random directions.")] = 0,
    *,
    options: "CheckpointOptions",
) -> None:
    """Name latents by the vectors nearest to their decoder directions; write names.json, names.html, and features.jsonl."""
    from ..name.run import name, names_summary, names_table

    found = name(checkpoint, vectors, out, center, seed, options)
    print_fields(names_summary(found))
    print()
    print_table(*names_table(found))
    print(f"\nresults: {found['path']}\npage: {found['page_path']}")
