"""Command ``features``: what every latent does."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...training.console import print_fields
from .options import reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

app = typer.Typer()


@app.command("features")
@reads_dictionaries
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
    from ..features.neuronpedia.export import NeuronpediaExport
    from ..features.run import Explainer, features, features_summary

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
