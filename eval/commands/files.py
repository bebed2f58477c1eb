"""Commands ``convert``, ``info`` and ``list``: formats, descriptions and names of dictionaries."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ...training.console import print_fields, print_table
from .options import Format, GivenK, GivenScale, GivenThreshold, Hook, Revision, Subfolder, reads_dictionaries

if TYPE_CHECKING:
    from ...transcoders.load import CheckpointOptions

log = logging.getLogger(__name__)
app = typer.Typer()


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
    from ...transcoders.convert import convert
    from ...transcoders.load import CheckpointOptions
    from ..checkpoint import open_checkpoint, thresholds_of

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
@reads_dictionaries
def _info(
    path: Annotated[str, typer.Argument(help="A checkpoint, another library's dictionary or an activation store.")],
    tokens: Annotated[int, typer.Option(min=2, help="Number of tokens to run on, with --model or --text.")] = 4000,
    *,
    options: "CheckpointOptions",
) -> None:
    """Describe and verify a dictionary or activation store; with --model or --text, also evaluate it on activations."""
    from ..info import info

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
    from ...transcoders.releases import release_directory
    from ..release_sources import REGISTRY, refresh_releases, table_of_releases

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
