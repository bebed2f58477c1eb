"""Command ``steer``: latents that tell two texts apart, and the model steered by them."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ...training.console import print_fields, print_table
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

app = typer.Typer()


@app.command("steer")
@reads_dictionaries
def _steer(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or hub repository id of an SAE.")],
    towards: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to write like (.txt, .jsonl, .parquet); required.")
    ] = None,
    away_from: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="Text to write like no longer; required.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Target tokens, separated by commas. Default: those more frequent in --towards."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Prompt to show samples for; repeatable.")] = None,
    neutral: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text that must stay as it is, to measure the cost. Default: --towards.")
    ] = None,
    strengths: Annotated[
        str | None, typer.Option(metavar="LIST", help="Strengths, separated by commas. Default: 0.5 to 2.")
    ] = None,
    latents: Annotated[int, typer.Option(help="Number of latents to raise, and at most to set to zero.")] = 10,
    most_kl: Annotated[float, typer.Option(help="Largest KL on neutral text (nats per token) of a chosen strength.")] = 0.05,
    documents: Annotated[int, typer.Option(help="Documents to read of each text, at most.")] = 400,
    pooling: Annotated[
        str, typer.Option(help="Value of a latent in a piece of text, for its selectivity: mean or max over tokens.")
    ] = "mean",
    piece: Annotated[int, typer.Option(help="Tokens of such a piece; documents are joined.")] = 128,
    out: Annotated[str | None, typer.Option(help="Output directory. Default: CHECKPOINT/steer.")] = None,
    export: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the vector of the raised latents, for vLLM-Lens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the halves, the random latents and the samples.")] = 0,
    format: Annotated[str | None, typer.Option("--format", help="Format of the files; default: detected.")] = None,  # noqa: A002
    *,
    options: "CheckpointOptions",
) -> None:
    """Steer the model by latents from one text towards another; write steer.json and steer.html."""
    from ..steer.run import STRENGTHS, steer
    from ..steer.summary import steer_summary, steer_table

    if towards is None or away_from is None:
        missing = "--from" if away_from is None else "--towards"
        raise ValueError(f"{missing}: expected a file, got none. Give both texts: --towards FILE --from FILE.")
    found = steer(
        checkpoint,
        towards,
        away_from,
        out,
        None if tokens is None else [token.strip() for token in tokens.split(",") if token.strip()],
        prompt or (),
        neutral,
        STRENGTHS if strengths is None else _numbers(strengths),
        latents,
        most_kl,
        documents,
        pooling,
        piece,
        export,
        seed,
        replace(options, format=format),
    )
    print_fields(steer_summary(found))
    print()
    print_table(*steer_table(found))
    print(f"results: {found['path']}\npage: {found['page_path']}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--strengths: expected numbers separated by commas, got {text!r}.") from None
