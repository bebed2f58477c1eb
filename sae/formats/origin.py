"""Where a dictionary comes from, in the words of our checkpoints, for formats that say it in fields of their own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .base import ReadOptions
from .canonical import CanonicalSAE
from .files import HubSource, SourceFiles
from .folding import fold_scale_in
from .hooks import before_norm, hub_model, to_module, transformer_lens_model


def origin(
    name: str,
    config: Mapping[str, Any],
    model: str | None,
    reads: Sequence[str | None],
    writes: Sequence[str | None],
    options: ReadOptions | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Provenance of a dictionary of format ``name``, and a warning for hooks that no module emits.

    ``reads`` and ``writes`` are hooks in TransformerLens's names or module paths with a side, one for each layer. Of a single
    one, the hook that was asked for stands in for what the files do not say, or say by a name that is not known.
    """
    model = (options.model if options is not None else None) or model
    given = to_module(options.hook, model) if options is not None and options.hook else None
    given = given if len(reads) == 1 else None
    ins, outs = ([to_module(hook or "", model) or given for hook in hooks] for hooks in (reads, writes))
    found: dict[str, Any] = {"model": {"id": hub_model(model)} if model else None}
    warnings = []
    if outs and all(outs):
        found["hooks_out"] = outs
    if ins and all(ins):
        found["hooks_in"] = ins
    if ins == outs and len(ins) == 1 and ins[0]:
        found["hook"] = ins[0]
    unknown = [hook for hook, path in zip((*reads, *writes), (*ins, *outs), strict=True) if path is None]
    if unknown:
        named = sorted({str(hook) for hook in unknown if hook})
        what = f"hooks {', '.join(named[:4])} of {model or 'an unknown model'} are no module's input or output known here"
        what = what if named else "the files do not say what hooks it is for"
        # One name cannot stand in for those of several layers.
        warnings.append(f"{what}: give hook=MODULE:SIDE" if len(reads) == 1 else what)
    return found | {"text": {}, "source": {"format": name, "config": plain(config)}}, warnings


def reading_before_norm(n: CanonicalSAE, hook: str | None, model: str | None) -> tuple[CanonicalSAE, str | None]:
    """A transcoder that reads a stream behind an RMS norm but before its gain, as one that reads the stream and norms it.

    No module emits such a stream; the norm's input is emitted, and each row's rescaling to a norm of ``sqrt(d)`` is all that
    lies between, but for the constant that the model's norm adds to the mean square. The hook is ``hook`` where that cannot
    be done: for other norms, and with a skip path, which would read the wrong stream.
    """
    path = before_norm(hook or "", model)
    if path is None or n.W_skip is not None or n.row_norm is not None or n.kind != "transcoder":
        return n, hook
    n = fold_scale_in(n)
    return n.noting(f"{hook} read as row_norm constant_norm of {path}", row_norm="constant_norm"), path


def plain(value: Any) -> Any:
    """A configuration as JSON can hold it: YAML has dates and keys that are no strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def with_origin(n: CanonicalSAE, provenance: dict[str, Any], warnings: Sequence[str], *words: str) -> CanonicalSAE:
    """The same with where it comes from, doubts about it, and what was done."""
    return replace(n.noting(*words), provenance=provenance, warnings=(*n.warnings, *warnings))


def originated(
    n: CanonicalSAE,
    format: str,  # noqa: A002
    config: Mapping[str, Any],
    options: ReadOptions,
    hook: Any = None,
    hook_out: str | None = None,
    model: Any = None,
    text: Mapping[str, Any] | None = None,
) -> CanonicalSAE:
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


def hooks_from_files(n: CanonicalSAE) -> tuple[str | None, str | None]:
    """The hooks read and written, as module paths."""
    hook = n.provenance.get("hook")
    reads, writes = ((n.provenance.get(key) or [hook])[0] for key in ("hooks_in", "hooks_out"))
    return reads, writes


def model_of(n: CanonicalSAE) -> str | None:
    """The language model's id."""
    return (n.provenance.get("model") or {}).get("id")


def public_model(model: str | None) -> str | None:
    """A model's id for files that leave this machine: of a local directory its name alone, or the hub's id if it is cached.

    >>> public_model("/home/me/models/gpt2-stories"), public_model("openai-community/gpt2")
    ('gpt2-stories', 'openai-community/gpt2')
    """
    if model is None:
        return None
    cached = re.search(r"models--(.+?)--([^/\\]+)[/\\]snapshots[/\\]", model)
    if cached:
        return f"{cached.group(1)}/{cached.group(2)}"
    climbs = model.startswith((".", "~", "/")) or model.count("/") > 1
    local = climbs or PureWindowsPath(model).drive or "\\" in model or Path(model).is_dir()
    name = PureWindowsPath(model).name
    return (name if name.strip(".") else Path(model).resolve().name) if local else model


def exported_model(model: str | None) -> str | None:
    """The same, as TransformerLens calls it."""
    return transformer_lens_model(public_model(model))


def source_config(n: CanonicalSAE, format: str) -> dict[str, Any]:  # noqa: A002
    """What the configuration said that it was read from, if it is of this format."""
    source = n.provenance.get("source") or {}
    return dict(source["config"]) if source.get("format") == format else {}


def config_above(source: SourceFiles, name: str, levels: int) -> dict[str, Any]:
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
    return {} if path is None else SourceFiles(path).config(name)
