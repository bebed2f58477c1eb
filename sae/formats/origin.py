"""Provenance (model, hooks, text) of third-party dictionaries, in the form used by native checkpoints."""

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
    """Return the provenance of a dictionary of format ``name``, and a warning for missing or unknown hooks.

    ``reads`` and ``writes`` are TransformerLens names or module paths with a side, one per layer. For a single layer, the hook
    in ``options`` replaces missing or unknown ones.
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
        # A single hook option cannot replace the hooks of several layers.
        warnings.append(f"{what}: give hook=MODULE:SIDE" if len(reads) == 1 else what)
    return found | {"text": {}, "source": {"format": name, "config": plain(config)}}, warnings


def reading_before_norm(n: CanonicalSAE, hook: str | None, model: str | None) -> tuple[CanonicalSAE, str | None]:
    """Rewrite a transcoder of RMS-normalized activations (before the gain) as one that reads and normalizes the norm's input.

    No module emits the normalized activations, but the norm's input can be hooked. Rescaling each row to norm ``sqrt(d)``
    gives the same activations up to the epsilon that the model's norm adds to the mean square. The transcoder and ``hook`` are
    returned unchanged for other norms, and for transcoders with a skip path, which would read the wrong activations.
    """
    path = before_norm(hook or "", model)
    if path is None or n.W_skip is not None or n.row_norm is not None or n.kind != "transcoder":
        return n, hook
    n = fold_scale_in(n)
    return n.noting(f"{hook} read as row_norm constant_norm of {path}", row_norm="constant_norm"), path


def plain(value: Any) -> Any:
    """Return a configuration with JSON-compatible keys and values; YAML allows dates and non-string keys."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def with_origin(n: CanonicalSAE, provenance: dict[str, Any], warnings: Sequence[str], *words: str) -> CanonicalSAE:
    """Return a copy with the provenance set, and warnings and notes appended."""
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
    """Return a copy with its provenance, and a warning if its hook is unknown.

    ``hook`` is the hook named in the files, as a TransformerLens name or a module path; ``hook_out`` is the output hook if it
    differs. The hook in ``options`` is used only if the files name none or an unknown one; its model overrides the files'.
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
    """Return the input and output hooks as module paths, or ``None`` where unknown."""
    hook = n.provenance.get("hook")
    reads, writes = ((n.provenance.get(key) or [hook])[0] for key in ("hooks_in", "hooks_out"))
    return reads, writes


def model_of(n: CanonicalSAE) -> str | None:
    """Return the language model's id, or ``None`` if it is unknown."""
    return (n.provenance.get("model") or {}).get("id")


def public_model(model: str | None) -> str | None:
    """Return a model's id for shared files: local paths become the folder name, or the Hub id for paths in the Hub cache.

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
    """Return a model's public id in TransformerLens's spelling."""
    return transformer_lens_model(public_model(model))


def source_config(n: CanonicalSAE, format: str) -> dict[str, Any]:  # noqa: A002
    """Return the original configuration if the dictionary was read from this format, else an empty dict."""
    source = n.provenance.get("source") or {}
    return dict(source["config"]) if source.get("format") == format else {}


def config_above(source: SourceFiles, name: str, levels: int) -> dict[str, Any]:
    """Return the configuration in this folder, or in the nearest of up to ``levels`` parent folders; empty if there is none.

    For local paths the search may leave the given root: run configurations lie above checkpoints, and only this one file is
    read there.
    """
    if source.has(name):
        return source.config(name)
    if isinstance(source, HubSource):
        parents = list(PurePosixPath(source.inside).parents)[:levels] if source.inside else []
        folders = (HubSource(source.repo_id, source.revision, "" if p == PurePosixPath(".") else str(p)) for p in parents)
        return next((folder.config(name) for folder in folders if folder.has(name)), {})
    base = (source.root / source.inside).absolute()
    # For a file, its own folder does not count as a level.
    above = list(base.parents)[: levels + base.is_file()]
    path = next((folder / name for folder in above if (folder / name).is_file()), None)
    return {} if path is None else SourceFiles(path).config(name)
