"""Readers, validation, and writers for the checkpoint formats of other libraries.

Each format is one module in this folder and one entry in ``FORMATS``. Readers produce a ``CanonicalSAE`` and writers take one.
Formats rename and transpose tensors, ``folding.py`` folds scales and biases, and ``conversion.py`` builds the dictionary.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..dictionary import SparseDictionary
from ..suggestions import require_choice
from .base import Format, Read, ReadOptions, SetFormat
from .batch_topk_repo import BatchTopKRepository
from .canonical import CanonicalCrosscoder, CanonicalCrossLayer, CanonicalSAE
from .circuit_tracer import CircuitTracer
from .conversion import from_dictionary, to_dictionary
from .dictionary_learning import DictionaryLearning
from .dunefsky import Dunefsky
from .files import TORCH_SUFFIXES, SourceFiles
from .gemma_scope import GemmaScope
from .hooks import to_module
from .llama_scope import LlamaScope
from .llamascopium import Llamascopium
from .openai import OpenAI
from .origin import public_model
from .saelens import SAELens
from .saelens_legacy import SAELensLegacy
from .single_releases import DeepSeekR1, Goodfire, HookZ, QwenScope
from .sparsify import Sparsify
from .validation import check, check_layers

__all__ = [
    "FORMATS",
    "CanonicalCrossLayer",
    "CanonicalSAE",
    "Format",
    "ReadDictionaries",
    "ReadOptions",
    "SourceFiles",
    "detect",
    "dictionary_places",
    "read_canonical",
    "read_dictionary",
    "write_dictionaries",
    "write_dictionary",
]

log = logging.getLogger(__name__)

KNOWN = (
    SAELens(),
    SAELensLegacy(),
    DictionaryLearning(),
    Sparsify(),
    OpenAI(),
    BatchTopKRepository(),
    Goodfire(),
    DeepSeekR1(),
    QwenScope(),
    HookZ(),
    # Mostly transcoders.
    GemmaScope(),
    LlamaScope(),
    Llamascopium(),
    CircuitTracer(),
    Dunefsky(),
)
FORMATS: dict[str, Format] = {f.name: f for f in KNOWN}
# Maximum number of folders or files listed in an error message.
SHOWN = 20


@dataclass(frozen=True)
class ReadDictionaries:
    """Dictionaries read from third-party files and their provenances, keyed by output hook.

    ``notes`` lists what was renamed, transposed, and folded; ``evidence`` says how the format was recognized.
    """

    dictionaries: dict[str, SparseDictionary]
    provenances: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    evidence: str

    @property
    def dictionary(self) -> SparseDictionary:
        """Dictionary, if there is exactly one.

        Raises:
            ValueError: If there are several.
        """
        if len(self.dictionaries) != 1:
            raise ValueError(
                f"hook: expected one of {', '.join(self.dictionaries)}, because there are several. Give hook=HOOK, or "
                "--hook HOOK."
            )
        return next(iter(self.dictionaries.values()))

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the first dictionary."""
        return next(iter(self.provenances.values()))


def detect(source: SourceFiles, format: str | None = None) -> tuple[Format, str] | None:  # noqa: A002
    """Return the format of the files in this folder and the evidence for it, or ``None`` if no format matches.

    Raises:
        ValueError: If ``format`` is unknown, or several formats match.
    """
    wanted = FORMATS if format is None else {format: known(format)}
    found = {name: words for name, f in wanted.items() if (words := f.detect(source)) is not None}
    if len(found) > 1:
        reasons = "; ".join(f"{name} ({words})" for name, words in found.items())
        raise ValueError(f"{source}: the files may be of several formats: {reasons}. Choose one: format=NAME, or --from NAME.")
    return next(((FORMATS[name], words) for name, words in found.items()), None)


def known(format: str) -> Format:  # noqa: A002
    """Return the format with this name.

    Raises:
        ValueError: If there is none.
    """
    return FORMATS[require_choice("format", format, FORMATS)]


def dictionary_places(source: SourceFiles, format: str | None = None) -> list[tuple[SourceFiles, Format, str]]:  # noqa: A002
    """Return the folders that hold dictionaries: this one, or else the topmost matching folders below it.

    Raises:
        ValueError: If no folder holds a dictionary.
    """
    here = detect(source, format)
    if here is not None:
        return [(source, *here)]
    found: list[tuple[SourceFiles, Format, str]] = []
    for folder in source.folders:
        above = any(folder.startswith(f"{place.inside}/".removeprefix(source.inside).lstrip("/")) for place, _, _ in found)
        inner = source.at(folder) if folder and not above else None
        there = None if inner is None else detect(inner, format)
        if inner is not None and there is not None:
            found.append((inner, *there))
    if not found and format is not None and source.files:
        # An explicit format overrides detection.
        return [(source, FORMATS[format], "by request")]
    if not found:
        for name in source.files[:1] if len(source.files) == 1 and source.files[0].endswith(TORCH_SUFFIXES) else ():
            # Reading a damaged or malicious file raises the more specific error.
            source.values(name)
        some = ", ".join(source.files[:SHOWN]) or "no files"
        raise ValueError(f"{source}: expected a dictionary of a known format ({', '.join(FORMATS)}), found {some}.")
    return found


def read_canonical(source: SourceFiles, format: str | None = None, options: ReadOptions | None = None) -> Read:  # noqa: A002
    """Read and validate third-party files; several dictionaries are returned as a dict keyed by hook.

    Raises:
        ValueError: If the format is unknown or ambiguous, the files are damaged, or several dictionaries share a hook.
    """
    options = options or ReadOptions()
    found = dictionary_places(source, format)
    if len(found) > 1:
        # A folder name that matches the hook saves reading the others; the dictionary's own hook may be spelled differently.
        named = [place for place in found if options.hook in (place[0].name, place[0].inside)]
        found, options = (named, replace(options, hook=None)) if named else (found, options)
    if len(found) > 1 and source.remote:
        names = ", ".join(place[0].inside for place in found[:SHOWN])
        raise ValueError(
            f"{source}: {len(found)} dictionaries: {names}{', ...' if len(found) > SHOWN else ''}. Give subfolder=NAME, "
            "or --subfolder NAME."
        )
    results = [_checked(where, _read(where, f, options), f"{f.title}: {words}") for where, f, words in found]
    if len(results) == 1 and not isinstance(results[0], dict):
        return _of_hook(results[0], options.hook)
    several: dict[str, CanonicalSAE] = {}
    for (where, _, _), result in zip(found, results, strict=True):
        for hook, n in result.items() if isinstance(result, dict) else [(hook_of(result) or where.name, result)]:
            if hook in several or isinstance(n, CanonicalCrossLayer | CanonicalCrosscoder):
                raise ValueError(f"{source}: expected one dictionary for each hook, got two for {hook}. Load them one by one.")
            several[hook] = n
    if options.hook is None:
        return several
    chosen = [n for key, n in several.items() if key == options.hook or is_for(n, options.hook)]
    if len(chosen) != 1:
        raise ValueError(f"hook: expected one of {', '.join(several)}, got {options.hook!r}.")
    return chosen[0]


def _read(where: SourceFiles, f: Format, options: ReadOptions) -> Read:
    try:
        return f.read(where, options)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        # Readers check likely mistakes, but a file can hold any type, such as a list instead of a name.
        raise ValueError(
            f"{where}: expected values of the types that {f.title} writes, got others ({type(error).__name__}: {error}). Check "
            "the configuration file."
        ) from error


def is_for(n: CanonicalSAE | CanonicalCrossLayer | CanonicalCrosscoder, hook: str) -> bool:
    """Return True if a dictionary reads or writes the hook, given as a module path or a TransformerLens name."""
    model = (n.provenance.get("model") or {}).get("id")
    return bool(
        {hook, to_module(hook, model)} & {*(n.provenance.get("hooks_in") or ()), *(n.provenance.get("hooks_out") or ())}
    )


# One dictionary, or one of several sites.
Single = CanonicalSAE | CanonicalCrossLayer | CanonicalCrosscoder


def _of_hook(n: Single, hook: str | None) -> Single:
    if hook is not None and hook_of(n) is not None and not is_for(n, hook):
        raise ValueError(f"hook: expected {hook_of(n)}, the hook of this dictionary, got {hook!r}.")
    return n


def read_dictionary(
    path: str | Path | SourceFiles,
    format: str | None = None,  # noqa: A002
    options: ReadOptions | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> ReadDictionaries:
    """Load dictionaries from another library's files, in eval mode.

    Weights are float32 by default, whatever the dtype in the files: bfloat16 loses thresholds and biases. ``dtype=None`` uses
    the decoder's dtype for every tensor.

    Raises:
        ValueError: Under the conditions of ``read_canonical``.
    """
    source = path if isinstance(path, SourceFiles) else SourceFiles(path)
    read = read_canonical(source, format, options)
    members = read if isinstance(read, dict) else {hook_of(read) or source.name: read}
    for warning in dict.fromkeys(warning for n in members.values() for warning in n.warnings):
        log.warning("%s: %s", source, warning)
    first = next(iter(members.values()))
    return ReadDictionaries(
        {hook: to_dictionary(n, dtype).to(device) for hook, n in members.items()},
        {hook: provenance_of(n) for hook, n in members.items()},
        tuple(dict.fromkeys(word for n in members.values() for word in n.done)),
        tuple(dict.fromkeys(warning for n in members.values() for warning in n.warnings)),
        first.evidence,
    )


def write_dictionary(
    dictionary: SparseDictionary | CanonicalSAE | CanonicalCrossLayer,
    directory: str | Path,
    format: str,  # noqa: A002
    provenance: dict[str, Any] | None = None,
) -> CanonicalSAE | CanonicalCrossLayer:
    """Write a dictionary in another library's format and return its canonical form, whose ``done`` lists the changes.

    Raises:
        ValueError: If the format is unknown, or cannot hold the dictionary.
    """
    n = from_dictionary(dictionary, provenance) if isinstance(dictionary, SparseDictionary) else dictionary
    n = n.noting(*_renamed_model(n))
    known(format).write(n, Path(directory))
    return n


def write_dictionaries(
    dictionaries: Mapping[str, SparseDictionary | CanonicalSAE],
    directory: str | Path,
    format: str,  # noqa: A002
    provenances: Mapping[str, dict[str, Any]],
) -> dict[str, CanonicalSAE]:
    """Write the dictionaries of several hooks: in one folder if the format holds sets, else in one folder per hook.

    Raises:
        ValueError: If the format is unknown, cannot hold one of the dictionaries, or needs a complete set.
    """
    members: dict[str, CanonicalSAE] = {}
    for hook, dictionary in dictionaries.items():
        n = from_dictionary(dictionary, provenances[hook]) if isinstance(dictionary, SparseDictionary) else dictionary
        if isinstance(n, CanonicalCrossLayer):
            raise ValueError(f"{hook}: expected a dictionary of one hook, got a cross-layer transcoder. Convert it by itself.")
        members[hook] = n.noting(*_renamed_model(n))
    f = known(format)
    if isinstance(f, SetFormat):
        f.write_set(members, Path(directory))
        return members
    for hook, n in members.items():
        f.write(n, Path(directory) / re.sub(r"[^\w.-]+", "-", hook))
    return members


def _renamed_model(n: CanonicalSAE | CanonicalCrossLayer) -> tuple[str, ...]:
    """Return a note that a local model path is reduced to its folder name, if it is."""
    model = (n.provenance.get("model") or {}).get("id")
    name = public_model(model)
    return () if name == model else (f"the model's local folder written by its name alone, {name}",)


def hook_of(n: CanonicalSAE | CanonicalCrossLayer | CanonicalCrosscoder) -> str | None:
    """Return the output hook of a dictionary, or ``None`` if it is unknown."""
    return next(iter(n.provenance.get("hooks_out") or ()), None)


def provenance_of(n: CanonicalSAE | CanonicalCrossLayer | CanonicalCrosscoder) -> dict[str, Any]:
    """Return the provenance to store in a native checkpoint, with the conversion's evidence, notes, and warnings."""
    converted = {"evidence": n.evidence, "done": list(n.done), "warnings": list(n.warnings)}
    return n.provenance | {"converted": converted}


def _checked(where: SourceFiles, read: Read, evidence: str) -> Read:
    """Validate, then add the warnings, the evidence, and notes on stripped tensor-name prefixes."""
    words = where.unwrapped
    if isinstance(read, dict):
        return {
            hook: n.noting(*words, warnings=tuple(check(n, f"{where}: {hook}")), evidence=evidence) for hook, n in read.items()
        }
    if isinstance(read, CanonicalCrossLayer):
        return read.noting(*words, warnings=(*read.warnings, *check_layers(read, where)), evidence=evidence)
    if isinstance(read, CanonicalCrosscoder):
        return read.noting(*words, warnings=(*read.warnings, *check(read.whole, where)), evidence=evidence)
    return read.noting(*words, warnings=tuple(check(read, where)), evidence=evidence)
