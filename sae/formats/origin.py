"""Where a dictionary comes from, in the words of our checkpoints, for formats that say it in fields of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .folding import fold_scale_in
from .format import Options
from .hooks import before_norm, hub_model, to_module
from .neutral import Neutral


def origin(
    name: str,
    config: Mapping[str, Any],
    model: str | None,
    reads: Sequence[str | None],
    writes: Sequence[str | None],
    options: Options | None = None,
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


def reading_before_norm(n: Neutral, hook: str | None, model: str | None) -> tuple[Neutral, str | None]:
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


def with_origin(n: Neutral, provenance: dict[str, Any], warnings: Sequence[str], *words: str) -> Neutral:
    """The same with where it comes from, doubts about it, and what was done."""
    return replace(n.noting(*words), provenance=provenance, warnings=(*n.warnings, *warnings))
