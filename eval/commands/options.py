"""Options of the commands that load dictionaries and run their language model."""

import logging
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer

from ...training.cli import TrustRemoteCode

log = logging.getLogger(__name__)
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


def reads_dictionaries(command: Callable[..., None]) -> Callable[..., None]:
    """Add the missing ``GIVEN`` options to a command, and pass them to it as one argument, ``options``."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        # Before the imports below, which take seconds.
        log.info("%s: loading %s", command.__name__.strip("_"), _sources(arguments))
        from ...training.recipe import parse_overrides
        from ...transcoders.load import CheckpointOptions

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
