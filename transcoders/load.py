"""Load dictionaries from a path or hub id: sparsary checkpoints and stacks, or files of other libraries."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..sae.checkpoint import load_dictionary
from ..sae.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE, read_config
from ..sae.dictionary import SparseDictionary
from ..sae.files import at_home
from ..sae.formats import ReadOptions, read_dictionary
from ..sae.formats.files import HubSource, SourceFiles, recording
from ..sae.formats.hooks import to_module
from ..sae.hub import local_directory
from ..sae.training_usage import USAGE_FILE
from .releases import FILE_SUFFIXES, PublishedDictionary, local_repository, release_directory
from .stack import Stack, hooks_of_provenance, is_stack, load_stack, stack_folders

log = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype | None] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": None,
}
OWN = "dictionary.json of sparsary"
# JSON metadata of a checkpoint's training, as written by sparsary or another library.
Provenance = dict[str, Any]
# A value in a recipe's YAML.
RecipeValue = str | int | float | bool | None | Sequence[object] | Mapping[str, object]


@dataclass(frozen=True)
class CheckpointOptions:
    """Facts that a checkpoint's files may not record; accepted by every function that takes a checkpoint.

    sparsary checkpoints record all of this; other libraries' files often do not. ``load`` and ``convert`` use the facts about
    the dictionary; ``model``, ``text``, ``settings`` and ``hook_out`` matter when its language model is run.

    >>> CheckpointOptions(model="gpt2", text=("notes.txt",), settings={"text.context_length": 256}).model
    'gpt2'

    Args:
        model: Language model, a hub id or directory; overrides the one the files name.
        text: Files to evaluate on (.txt, .jsonl, .parquet); overrides the text the files name.
        settings: Recipe keys of the sections model, text, and harvest.
        hook: Which dictionary to load if there are several, or the dictionary's hook, ``MODULE:SIDE``, if no file records it.
        hook_out: Hook a transcoder writes, if no file records it.
        format: File format (``docs/formats.md``); overrides detection.
        subfolder: Subfolder of the directory or repository.
        revision: Revision of the hub repository.
        k: Latents per token.
        scale: Input scale of a checkpoint saved in the middle of training.
        threshold: Value that latents must exceed.
        subtract_b_dec: True if ``b_dec`` is subtracted from the input; needed where versions of a library differ.
        trust_remote_code: Run Python code from the language model's repository. The checkpoint's own setting is ignored.
    """

    model: str | None = None
    text: tuple[str, ...] = ()
    settings: Mapping[str, RecipeValue] = field(default_factory=dict)
    hook: str | None = None
    hook_out: str | None = None
    format: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    k: int | None = None
    scale: float | None = None
    threshold: float | None = None
    subtract_b_dec: bool | None = None
    trust_remote_code: bool = False

    @property
    def for_readers(self) -> ReadOptions:
        """Options used by readers of other libraries' files."""
        return ReadOptions(self.hook, self.scale, self.k, self.threshold, self.model, self.subtract_b_dec)

    def updated(self, **named: str | float | None) -> "CheckpointOptions":
        """Return a copy with the given options replaced, except those that are ``None``."""
        return replace(self, **{name: value for name, value in named.items() if value is not None})


NO_OPTIONS = CheckpointOptions()


@dataclass(frozen=True)
class FoundDictionaries:
    """Loaded dictionaries in eval mode, by the hook they write, or by file name if the hook is unknown.

    ``directory`` is the given location, ``folders`` the folder of each sparsary checkpoint, and ``files`` all files read.
    ``evidence`` says how the format was detected, ``notes`` what was renamed, transposed, and folded.
    """

    directory: Path
    dictionaries: dict[str, SparseDictionary]
    provenances: dict[str, Provenance]
    folders: dict[str, Path]
    files: tuple[Path, ...]
    evidence: str = OWN
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    stacked: bool = False

    def __post_init__(self) -> None:
        for name, dictionary in self.dictionaries.items():
            dictionary.provenance = self.provenances[name]

    @property
    def foreign(self) -> bool:
        """Return True if the files were written by another library."""
        return self.evidence != OWN

    def only(self, hook: str) -> "FoundDictionaries":
        """Return one of several dictionaries, by the hook it writes or reads.

        Raises:
            ValueError: If no dictionary has that hook.
        """
        reads = {hooks_of_provenance(provenance)[0][0]: key for key, provenance in self.provenances.items()}
        key = hook if hook in self.dictionaries else reads.get(hook)
        if key is None:
            raise ValueError(f"hook: expected one of {', '.join(self.dictionaries)}, got {hook!r}.")
        folder = self.folders[key]
        return FoundDictionaries(
            folder,
            {key: self.dictionaries[key]},
            {key: self.provenances[key]},
            {key: folder},
            (folder / WEIGHTS_FILE,),
            warnings=self.warnings,
        )


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    *,
    hook: str | None = None,
    format: str | None = None,  # noqa: A002
    subfolder: str | None = None,
    k: int | None = None,
    scale: float | None = None,
    threshold: float | None = None,
    dtype: str = "float32",
    options: CheckpointOptions = NO_OPTIONS,
) -> SparseDictionary | Stack:
    """Load a dictionary in eval mode, in sparsary's or another library's format; several, one per hook, as a ``Stack``.

    >>> import tempfile
    >>> from sparsary import ENCODERS, SAE, load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SAE(5, 7, ENCODERS["topk"](k=2)).save(folder, {})
    ...     load(folder).n_latents
    7

    Args:
        path: Checkpoint directory, file, Hugging Face repository id, or the name of a published dictionary as ``sparsary list``
            prints it, such as ``gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82``.
        device: Device of the tensors.
        revision: Overrides the same field of ``options``, as do ``hook``, ``format``, ``subfolder``, ``k``, ``scale`` and
            ``threshold``.
        dtype: Precision in which other libraries' dictionaries compute; ``auto`` is that of their files.
        options: Facts that the files do not record.

    Raises:
        ValueError: If there is no dictionary, it is damaged, or there are several with unknown hooks.
    """
    named = {"hook": hook, "format": format, "subfolder": subfolder, "k": k, "scale": scale, "threshold": threshold}
    options = options.updated(revision=revision, **named)
    found = find(path, options, device, dtype)
    if len(found.dictionaries) == 1 and not found.stacked:
        return next(iter(found.dictionaries.values()))
    unknown = [name for name, about in found.provenances.items() if not (about.get("hooks_out") or about.get("hook"))]
    if unknown:
        raise ValueError(
            f"hook: {len(found.dictionaries)} dictionaries, and the hooks of {', '.join(unknown[:5])} are not known. "
            f"Load one of them: {', '.join(found.dictionaries)}."
        )
    return Stack(found.dictionaries, found.provenances)


def find(
    path: str | Path,
    options: CheckpointOptions = NO_OPTIONS,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
) -> FoundDictionaries:
    """Load all dictionaries of a path, hub id or published name, or those selected by ``options``, and say how they were read.

    Raises:
        ValueError: In the same cases as ``load``.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    place = at_home(str(path))
    if _is_local(place):
        return _find(place, options, device, dtype)
    releases = release_directory()
    published = releases.get(place)
    if published is not None:
        return _find_published(published, options, device, dtype)
    try:
        return _find(local_repository(place), options, device, dtype)
    except ValueError as error:
        raise ValueError(f"{error}{releases.hint(place)}") from error


def _is_local(place: str) -> bool:
    """Return True if a place exists, or can only be a path."""
    return Path(place).exists() or place.startswith((".", "/", "~")) or Path(place).is_absolute()


def _find_published(
    published: PublishedDictionary, options: CheckpointOptions, device: str | torch.device, dtype: str
) -> FoundDictionaries:
    """Load a published dictionary, from a local copy of the repository if there is one, otherwise from the hub."""
    repository, (subfolder, name) = local_repository(published.repository), published.place
    _, source = _places(repository, options.revision, subfolder)
    beside = [file for file in source.named("[^/]+") if file.endswith(FILE_SUFFIXES)] if source is not None else []
    # The file is named only where it has others beside it: alone, it is recognised as any other.
    said = options.updated(subfolder=subfolder, hook=options.hook or (name if len(beside) > 1 else None))
    found = _find(repository, said, device, dtype)
    if published.model is None or options.model or all((p.get("model") or {}).get("id") for p in found.provenances.values()):
        return found
    # Hooks, too, can be named only if the model is known.
    return _find(repository, said.updated(model=published.model), device, dtype)


def _find(place: str, options: CheckpointOptions, device: str | torch.device, dtype: str) -> FoundDictionaries:
    directory, source = _places(place, options.revision, options.subfolder)
    if options.format is None and (source is None or (directory / CONFIG_FILE).exists() or (directory / WEIGHTS_FILE).exists()):
        # Also if nothing is there: the error then describes a checkpoint.
        _require_unsaid(directory, options)
        dictionary, provenance = load_dictionary(directory, device), _completed(read_config(directory)["provenance"], options)
        name = (provenance.get("hooks_out") or [provenance.get("hook") or directory.name])[0]
        return FoundDictionaries(
            directory,
            {name: dictionary},
            {name: provenance},
            {name: directory},
            (directory / WEIGHTS_FILE,),
            warnings=_unfinished({name: directory}, {name: provenance}),
        )
    if options.format is None and is_stack(directory):
        _require_unsaid(directory, options)
        found = _stack(directory, device, options)
        return found if options.hook is None else found.only(options.hook)
    assert source is not None
    with recording() as files:
        loaded = read_dictionary(source, options.format, options.for_readers, device, DTYPES[dtype])
    return FoundDictionaries(
        directory,
        loaded.dictionaries,
        loaded.provenances,
        {},
        tuple(dict.fromkeys(files)),
        loaded.evidence,
        loaded.notes,
        loaded.warnings,
        len(loaded.dictionaries) > 1,
    )


def _require_unsaid(directory: Path, options: CheckpointOptions) -> None:
    """Raise ``ValueError`` for options that sparsary checkpoints always record themselves."""
    for name in ("k", "scale", "threshold"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: expected none, because {directory} records it, got {getattr(options, name)}.")


def _completed(provenance: Provenance, options: CheckpointOptions) -> Provenance:
    """Return the provenance of a sparsary checkpoint with the given model, and with the given hooks if it has none."""
    about = dict(provenance)
    if options.model is not None:
        about["model"] = {**(about.get("model") or {}), "id": options.model, "revision": None}
    model = (about.get("model") or {}).get("id")
    names = (options.hook, options.hook_out or options.hook)
    reads, writes = (to_module(name, model) if name else None for name in names)
    if reads and writes and not (about.get("hook") or about.get("hooks_in")):
        about |= {"hooks_in": [reads], "hooks_out": [writes]} | ({"hook": reads} if reads == writes else {})
    return about


def doubts_of_files(provenance: Mapping[str, Any]) -> list[str]:
    """Return warnings recorded in a checkpoint's provenance: ignored fields, unfinished training."""
    found: list[str] = list((provenance.get("converted") or {}).get("warnings") or ())
    if provenance.get("finished") is False:
        tokens, steps = provenance.get("training_tokens", 0), provenance.get("training_steps", 0)
        found.append(
            f"saved in the middle of its training, after {steps:,} steps and {tokens:,} tokens: thresholds are not calibrated, "
            "and training may not be finished"
        )
    return found


def _unfinished(folders: Mapping[str, Path], provenances: Mapping[str, Provenance]) -> tuple[str, ...]:
    """Log and return warnings about checkpoints of unfinished training."""
    found = []
    for hook, about in provenances.items():
        if about.get("finished") is False:
            found.append(f"{folders[hook].name}: {doubts_of_files({**about, 'converted': None})[0]}")
            log.warning("%s: %s.", folders[hook].parent, found[-1])
    return tuple(found)


def _stack(directory: Path, device: str | torch.device, options: CheckpointOptions) -> FoundDictionaries:
    stack = load_stack(directory, device)
    provenances = {hook: _completed(about, options) for hook, about in stack.provenances.items()}
    folders = {hooks_of_provenance(read_config(folder)["provenance"])[1][0]: folder for folder in stack_folders(directory)}
    files = tuple(folders[hook] / WEIGHTS_FILE for hook in stack)
    folders = {hook: folders[hook] for hook in stack}
    return FoundDictionaries(
        directory,
        stack.dictionaries,
        provenances,
        folders,
        files,
        warnings=_unfinished(folders, provenances),
        stacked=True,
    )


def _places(path: str, revision: str | None, subfolder: str | None) -> tuple[Path, SourceFiles | None]:
    """Return the directory of a potential sparsary checkpoint, and its files, which the hub downloads one by one.

    Raises:
        ValueError: If the hub has no such repository, or ``subfolder`` leads out of it.
    """
    directory = local_directory(path, revision)
    if Path(path).exists():
        source = SourceFiles(path)
        source = source.at(subfolder) if subfolder else source
        return directory / source.inside, source
    if not directory.is_dir():
        return directory, None
    source = HubSource(path, revision)
    source = source.at(subfolder) if subfolder else source
    if subfolder and source.has(CONFIG_FILE):
        # A sparsary checkpoint in a subfolder, where `local_directory` does not look.
        for name in (WEIGHTS_FILE, *([USAGE_FILE] if source.has(USAGE_FILE) else [])):
            source.path(name)
        return source.path(CONFIG_FILE).parent, source
    if not subfolder and (directory / CONFIG_FILE).exists():
        return directory, source
    ours = source.named(rf"[^/]+/{CONFIG_FILE}")
    if ours and len(ours) == len({f.split("/")[0] for f in source.folders if f}):
        # A sparsary stack and nothing else.
        for name in ours:
            beside = [name.replace(CONFIG_FILE, other) for other in (WEIGHTS_FILE, USAGE_FILE)]
            for other in (beside[0], *([beside[1]] if source.has(beside[1]) else [])):
                source.path(other)
        return source.path(ours[0]).parents[1], source
    return directory / source.inside, source
