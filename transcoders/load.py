"""Whatever a path or a hub id holds, as dictionaries: our checkpoints and stacks of them first, then other libraries' files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_dictionary, read_config
from sae.dictionary import SparseDictionary
from sae.formats import Loaded, Options, read_dictionary
from sae.formats.files import HubSource, Source
from sae.hub import local_directory

from .stack import Stack, is_stack, load_stack

DTYPES: Mapping[str, torch.dtype | None] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": None,
}


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    subfolder: str | None = None,
    format: str | None = None,  # noqa: A002
    options: Options | None = None,
    dtype: str = "float32",
) -> tuple[SparseDictionary | Stack, dict[str, Any]]:
    """A dictionary in eval mode with its provenance; of several, one for each hook, a ``Stack``, with the first's.

    ``dtype`` is what other libraries' dictionaries are to compute in; ``auto`` leaves it as their files have it.

    Raises:
        ValueError: If there is none, or it is damaged, or it is not said which of several.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    options = options or Options()
    directory, source = places(str(path), revision, subfolder)
    if format is None and (source is None or (directory / CONFIG_FILE).exists() or (directory / WEIGHTS_FILE).exists()):
        # Also where there is nothing: the error says what a checkpoint is.
        dictionary = load_dictionary(directory, device)
        return dictionary, read_config(directory)["provenance"]
    if format is None and is_stack(directory):
        stack = load_stack(directory, device)
        if options.hook is None:
            return stack, next(iter(stack.provenances.values()))
        return _member(stack, options.hook)
    assert source is not None
    return _result(read_dictionary(source, format, options, device, DTYPES[dtype]))


def places(path: str, revision: str | None, subfolder: str | None) -> tuple[Path, Source | None]:
    """A directory that may hold our checkpoint, and the files there, which the hub sends one by one.

    Raises:
        ValueError: If the hub has no such repository, or ``subfolder`` leads out of it.
    """
    directory = local_directory(path, revision)
    if Path(path).exists():
        source = Source(path)
        source = source.at(subfolder) if subfolder else source
        return directory / source.inside, source
    if not directory.is_dir():
        return directory, None
    source = HubSource(path, revision)
    source = source.at(subfolder) if subfolder else source
    if subfolder and source.has(CONFIG_FILE):
        # Our own, but not where it is looked for first.
        source.path(WEIGHTS_FILE)
        return source.path(CONFIG_FILE).parent, source
    return directory / source.inside, source


def _member(stack: Stack, hook: str) -> tuple[SparseDictionary, dict[str, Any]]:
    if hook not in stack:
        raise ValueError(f"hook: expected one of {', '.join(stack)}, got {hook!r}.")
    dictionary = stack[hook]
    own = next(key for key, member in stack.items() if member is dictionary)
    return dictionary, stack.provenances[own]


def _result(loaded: Loaded) -> tuple[SparseDictionary | Stack, dict[str, Any]]:
    if len(loaded.dictionaries) == 1:
        return loaded.dictionary, loaded.provenance
    unknown = [hook for hook, provenance in loaded.provenances.items() if not provenance.get("hooks_out")]
    if unknown:
        raise ValueError(
            f"hook: {len(loaded.dictionaries)} dictionaries, and the hooks of {', '.join(unknown[:5])} are not known. "
            f"Load one of them: {', '.join(loaded.dictionaries)}."
        )
    return Stack(loaded.dictionaries, loaded.provenances), loaded.provenance
