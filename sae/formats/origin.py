"""Where a foreign dictionary comes from, as our checkpoints say it: for formats that say little of it."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from .files import HubSource, Source
from .format import Options
from .hooks import hub_model, to_module
from .neutral import Neutral


def originated(
    n: Neutral,
    format: str,  # noqa: A002
    config: Mapping[str, Any],
    options: Options,
    hook: Any = None,
    hook_out: str | None = None,
    model: Any = None,
    text: Mapping[str, Any] | None = None,
) -> Neutral:
    """The same with its provenance, and a warning if its hook is not known.

    ``hook`` is what the files say, in TransformerLens's spelling or as a module path, ``hook_out`` where it is written, if
    that is elsewhere. What the options say counts where files say nothing that could be understood.
    """
    odd = [value for value in (hook, model) if value is not None and not isinstance(value, str)]
    n = n.noting(warnings=(*n.warnings, *(f"expected a name of hook or model, got {value!r}: left out" for value in odd)))
    hook, model = (value if isinstance(value, str) else None for value in (hook, model))
    model = options.model or model
    reads = to_module(hook, model) if hook else None
    writes = to_module(hook_out, model) if hook_out else reads
    warnings = n.warnings
    if not (reads and writes) and options.hook is not None:
        reads = writes = to_module(options.hook, model)
    known: dict[str, Any] = {"model": {"id": hub_model(model)} if model else None}
    if reads and writes:
        known |= {"hooks_in": [reads], "hooks_out": [writes]} | ({"hook": reads} if reads == writes else {})
    else:
        said = f"the hook {hook} of {model or 'a model not named'} is none that is known here" if hook else "no hook is named"
        warnings = (*warnings, f"{said}: give hook=MODULE:SIDE, or model=ID")
    source = {"format": format, "config": dict(config)}
    return n.noting(provenance=known | {"text": dict(text or {}), "source": source}, warnings=warnings)


def hooks_of(n: Neutral) -> tuple[str | None, str | None]:
    """The hooks read and written, as module paths."""
    hook = n.provenance.get("hook")
    reads, writes = ((n.provenance.get(key) or [hook])[0] for key in ("hooks_in", "hooks_out"))
    return reads, writes


def model_of(n: Neutral) -> str | None:
    """The language model's id."""
    return (n.provenance.get("model") or {}).get("id")


def source_config(n: Neutral, format: str) -> dict[str, Any]:  # noqa: A002
    """What the configuration said that it was read from, if it is of this format."""
    source = n.provenance.get("source") or {}
    return dict(source["config"]) if source.get("format") == format else {}


def config_above(source: Source, name: str, levels: int) -> dict[str, Any]:
    """A configuration in this folder or up to so many above it; empty if there is none.

    On this machine also above what was named: such a file says what a training was of, and nothing else is read of it.
    """
    if source.has(name):
        return source.config(name)
    if isinstance(source, HubSource):
        parents = list(PurePosixPath(source.inside).parents)[:levels] if source.inside else []
        folders = (HubSource(source.repo_id, source.revision, "" if p == PurePosixPath(".") else str(p)) for p in parents)
        return next((folder.config(name) for folder in folders if folder.has(name)), {})
    base = (source.root / source.inside).absolute()
    # A file lies in the folder that is meant.
    above = list(base.parents)[: levels + base.is_file()]
    path = next((folder / name for folder in above if (folder / name).is_file()), None)
    return {} if path is None else Source(path).config(name)
