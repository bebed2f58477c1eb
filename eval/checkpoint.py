"""Open a checkpoint for evaluation and fill in missing metadata.

sparsary checkpoints record the language model, hooks and text they were trained on. Checkpoints from other libraries often do
not: missing values come from the caller (``CheckpointOptions``; ``--model``, ``--text``, ``--hook``) or fall back to recipe
defaults. Every fallback is listed in the report under ``assumed``.
"""

import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..sae.checkpoint_files import read_config
from ..sae.dictionary import SparseDictionary
from ..sae.encoder import full_scorer
from ..sae.files import sha256
from ..sae.formats.conversion import gate_of
from ..sae.formats.hooks import architecture_of, to_module
from ..sae.one_site import OneSiteDictionary
from ..sae.tiled_scores import largest_of_batch
from ..training.activations.memory_models import PREFIX
from ..training.activations.model import LanguageModel
from ..training.activations.model_source import section_content
from ..training.content import model_problems, text_problems
from ..training.recipe import HarvestSection, ModelSection, TextSection, override
from ..training.recipe.messages import explain
from ..training.text import Cursor
from ..transcoders.load import NO_OPTIONS, CheckpointOptions, Provenance, find
from ..transcoders.stack import Stack, hooks_of_provenance, is_stack, stack_folders
from .heldout import eval_data
from .sanity import Sanity, sanity

SECTIONS = {"model": ModelSection, "text": TextSection, "harvest": HarvestSection}
log = logging.getLogger(__name__)
# Settings that change how model and text are read, not which model or text it is.
CUTTING_KEYS = (
    *(f"model.{key}" for key in ("dtype", "quantization", "device", "device_map", "truncate", "trust_remote_code")),
    *("text.context_length", "text.bos", "text.packing"),
)
# Held-out share where the training documents are unknown: all documents are held out.
EVERY_DOCUMENT = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class LoadedDictionary:
    """A dictionary with its provenance, the files it was read from, and the default directory for its results."""

    directory: Path
    dictionary: SparseDictionary
    provenance: Provenance
    files: tuple[Path, ...]

    @property
    def config(self) -> Provenance:
        return {"dictionary": self.dictionary.arguments(), "provenance": self.provenance}

    @cached_property
    def weights(self) -> str:
        """SHA-256 of each file that the dictionary was read from, joined by dashes."""
        return sha256(self.files[0]) if len(self.files) == 1 else "-".join(sha256(path) for path in self.files)

    @property
    def on_model(self) -> bool:
        """True if the provenance names the language model."""
        return bool(self.provenance.get("model"))


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The dictionaries of one path or hub id.

    ``foreign`` marks third-party files. ``assumed`` lists defaults used for metadata that neither files nor caller gave;
    ``changed`` lists changes in the content of model and text since training.
    """

    name: str
    directory: Path
    members: tuple[LoadedDictionary, ...]
    foreign: bool
    stacked: bool
    options: CheckpointOptions
    assumed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def in_place_together(self) -> bool:
        """True if the dictionaries replace several sites of the model at once: a stack or a cross-layer transcoder."""
        first = self.members[0].provenance
        return self.stacked or (self.members[0].on_model and len(_known_hooks(first)[0]) > 1)

    @property
    def results(self) -> Path:
        """The default directory for results.

        Raises:
            ValueError: If the dictionary is a single file, whose folder may hold unrelated files.
        """
        if not self.directory.is_dir():
            raise ValueError(
                f"--out: required, because {self.name} is not a local directory, so results cannot be written there."
            )
        return self.directory

    def completed(self, text: bool = True) -> "LoadedCheckpoint":
        """Return a copy with all metadata needed to run the model, and to read its text unless ``text`` is false.

        Raises:
            ValueError: If the model, hook or text is unknown.
        """
        found = [complete(member.provenance, self.options, self.name, text) for member in self.members]
        members = tuple(replace(m, provenance=about) for m, (about, _) in zip(self.members, found, strict=True))
        assumed = tuple(dict.fromkeys(word for _, words in found for word in words))
        changed = content_changes(members[0].provenance, text)
        for line in changed:
            log.warning("%s: trained on something else: %s.", self.name, line)
        return replace(self, members=members, assumed=assumed, changed=changed)


def with_model(options: CheckpointOptions, model: Any, tokenizer: Any = None) -> CheckpointOptions:
    """Return options that name a model in memory; unchanged if there is none.

    Raises:
        ValueError: If it is no causal language model, or comes without its tokenizer.
    """
    if model is None:
        return options
    found = model if isinstance(model, LanguageModel) else LanguageModel.from_pretrained(model, tokenizer)
    return replace(options, model=found.named_by_weights().id)


# A path, a hub id, or what ``load`` returned for one.
Checkpoint = str | Path | SparseDictionary | Stack


def open_checkpoint(path: Checkpoint, options: CheckpointOptions = NO_OPTIONS) -> LoadedCheckpoint:
    """Load the dictionaries of a path or hub id with their provenance; loaded ones are taken as they are.

    Raises:
        ValueError: If there is no dictionary, or it is damaged.
    """
    if isinstance(path, SparseDictionary | Stack):
        return _loaded(path, options)
    # Hook names depend on the architecture of the model that will run.
    model = None if options.model is None else architecture(options.model)
    found = find(path, replace(options, model=model if architecture_of(model) else None))
    # The model's id, not its architecture: only the readers of files need the latter.
    named = {} if options.model is None else {"model": {"id": options.model, "revision": None}}
    members = tuple(
        LoadedDictionary(
            found.folders.get(hook, found.directory),
            dictionary,
            found.provenances[hook] | {key: (found.provenances[hook].get(key) or {}) | own for key, own in named.items()},
            (found.files[number],) if found.folders else found.files,
        )
        for number, (hook, dictionary) in enumerate(found.dictionaries.items())
    )
    return LoadedCheckpoint(str(path), found.directory, members, found.foreign, found.stacked, options)


def _loaded(given: SparseDictionary | Stack, options: CheckpointOptions) -> LoadedCheckpoint:
    """Return dictionaries in memory as a checkpoint without a directory: results need a place of their own."""
    dictionaries = [given] if isinstance(given, SparseDictionary) else list(given.values())
    nowhere = Path(f"{type(given).__name__} in memory")
    members = tuple(LoadedDictionary(nowhere, dictionary, dictionary.provenance, ()) for dictionary in dictionaries)
    return LoadedCheckpoint(str(nowhere), nowhere, members, True, isinstance(given, Stack), options)


def section_of_vectors(opened: LoadedCheckpoint) -> HarvestSection | None:
    """Return the ``harvest`` section of a dictionary of vectors from files, with the caller's settings.

    ``None`` if it was trained on a model's activations, or if the caller names a model.

    Raises:
        ValueError: If a setting is invalid.
    """
    recipe: Mapping[str, Any] = opened.members[0].provenance.get("recipe") or {}
    harvest = recipe.get("harvest") or {}
    if opened.foreign or opened.options.model is not None or not harvest.get("files"):
        return None
    found: Provenance = {"harvest": copy.deepcopy(dict(harvest))}
    for key, value in opened.options.settings.items():
        if not key.startswith("harvest."):
            raise ValueError(f"--set {key}: expected a key of harvest, because this dictionary is of vectors from files.")
        override(found, key, value)
    _require_valid(found)
    return HarvestSection.model_validate(found["harvest"])


def of_one_model(opened: LoadedCheckpoint, command: str) -> LoadedCheckpoint:
    """Return the checkpoint, for a command that measures the predictions of a single language model.

    Raises:
        ValueError: If it was trained on two models.
    """
    if any((member.provenance.get("model") or {}).get("tuned") for member in opened.members):
        raise ValueError(
            f"{opened.name}: {command} measures the predictions of one model, and this dictionary was trained on two. "
            "Run: sparsary diff, which measures both, or sparsary features for the contexts of all latents."
        )
    return opened


def content_changes(provenance: Provenance, reads_text: bool = True) -> tuple[str, ...]:
    """Return one line for each change in the content of model or text since training, although their names are the same."""
    recorded = provenance.get("content")
    if not recorded:
        return ()
    try:
        current = section_content(ModelSection.model_validate(provenance["model"]))
        text = text_problems(recorded, TextSection.model_validate(provenance["text"])) if reads_text else []
    except ValueError:
        # A missing or refused model raises its own error when it is loaded.
        return ()
    return (*model_problems(recorded, current), *(text or ()))


def architecture(model: str) -> str:
    """Return a name that identifies a model's architecture: ``model_type`` of a local ``config.json``, else the id itself."""
    config = Path(model) / "config.json"
    if not config.is_file():
        return model
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("model_type", model))
    except (ValueError, AttributeError):
        return model


def _known_hooks(provenance: Mapping[str, object]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        return hooks_of_provenance(provenance)
    except ValueError:
        return (), ()


def complete(
    provenance: Mapping[str, object], options: CheckpointOptions, where: str, reads_text: bool = True
) -> tuple[Provenance, list[str]]:
    """Return a provenance with model, hooks, text and token filters filled in, and a line for each default that was assumed.

    Raises:
        ValueError: If something is missing that has no default.
    """
    found: Provenance = copy.deepcopy(dict(provenance))
    assumed: list[str] = []
    found["content"] = _expected_content(found.get("content") or {}, options)
    if options.model is not None:
        found["model"] = {**(found.get("model") or {}), "id": options.model, "revision": None}
    for key in ("model", "text", "harvest"):
        found[key] = dict(found.get(key) or {})
    # Only the caller may allow a repository's code to run, never the checkpoint's files.
    found["model"] |= {"trust_remote_code": options.trust_remote_code}
    if found["model"].get("tuned"):
        found["model"]["tuned"] = dict(found["model"]["tuned"]) | {"trust_remote_code": options.trust_remote_code}
    for key, value in options.settings.items():
        if key.split(".")[0] not in SECTIONS:
            raise ValueError(f"--set {key}: expected a key of {', '.join(SECTIONS)}, for example text.context_length.")
        override(found, key, value)
    if not found["model"].get("id"):
        raise ValueError(
            f"{where}: expected a language model, but this dictionary was trained on tensors, or its files name none. Give "
            "one: --model ID. Or give held-out activations: sparsary.evaluate(directory, activations=x)."
        )
    _complete_hooks(found, options, where)
    if reads_text:
        _complete_source(found, options, where, assumed)
    _complete_text(found, assumed)
    _require_valid(found)
    return found, assumed


def _expected_content(recorded: Mapping[str, Any], options: CheckpointOptions) -> dict[str, Any]:
    """Drop the recorded content of a model or text that the caller replaces."""
    given = {key.split(".")[0] for key in options.settings if key not in CUTTING_KEYS}
    # The weights of a model in memory can be compared with those of training.
    replaced = options.model is not None and not options.model.startswith(PREFIX)
    given |= ({"model"} if replaced else set()) | ({"text"} if options.text else set())
    sections = {"model": "model", "tokenizer": "model", "text": "text"}
    return {key: value for key, value in recorded.items() if sections.get(key) not in given}


def _complete_hooks(found: Provenance, options: CheckpointOptions, where: str) -> None:
    if _known_hooks(found)[0]:
        return
    names = (options.hook, options.hook_out or options.hook)
    reads, writes = (to_module(name, architecture(found["model"]["id"])) if name else None for name in names)
    if reads is None or writes is None:
        raise ValueError(
            f"{where}: hook: expected a module path with a side, because the files do not record the dictionary's "
            f"hook, got {options.hook!r}. Give it, for example --hook transformer.h.2:out."
        )
    found |= {"hooks_in": [reads], "hooks_out": [writes]} | ({"hook": reads} if reads == writes else {})


def _complete_source(found: Provenance, options: CheckpointOptions, where: str, assumed: list[str]) -> None:
    text = found["text"]
    if options.text:
        kept = {key: value for key, value in text.items() if not key.startswith("dataset")}
        found["text"] = kept | {"source": "files", "files": list(options.text)}
    elif "source" not in text and found["model"]["id"] == "embedded":
        text["source"] = "embedded"
        assumed.append("text: the embedded corpus")
    elif "source" not in text:
        raise ValueError(
            f"{where}: text: expected text to evaluate on, but these files name none. Give one: --text FILE (.txt, .jsonl or "
            ".parquet)."
        )


def _complete_text(found: Provenance, assumed: list[str]) -> None:
    """Fill in how text is cut into contexts, and which tokens are excluded."""
    text, harvest = found["text"], found["harvest"]
    for section, defaults, words in (
        (text, TextSection(), {"context_length": "contexts of {} tokens", "bos": "BOS: {}"}),
        (
            harvest,
            HarvestSection(),
            {"exclude_special": "special tokens left out: {}", "exclude_leading": "leading positions left out: {}"},
        ),
    ):
        for key, said in words.items():
            if key not in section:
                section[key] = getattr(defaults, key)
                assumed.append(said.format(section[key]))
    if "heldout" not in harvest:
        embedded = text.get("source") == "embedded"
        harvest["heldout"] = HarvestSection().heldout if embedded else EVERY_DOCUMENT
        assumed.append(f"documents: {'those that recipes hold out' if embedded else 'all'}")
    harvest.setdefault("dtype", HarvestSection().dtype)


def _require_valid(found: Mapping[str, Any]) -> None:
    """Raise ``ValueError``, worded as for recipes, for a key or value that recipes do not have."""
    for name, section in SECTIONS.items():
        try:
            section.model_validate(found.get(name, {}))
        except ValidationError as error:
            problems = [explain({**problem, "loc": (name, *problem["loc"])}, {}) for problem in error.errors()]
            raise ValueError("\n".join(problems)) from None


@torch.no_grad()
def sanity_of(opened: LoadedCheckpoint, tokens: int) -> dict[str, Sanity]:
    """Check each dictionary on its model's activations of about ``tokens`` tokens; keys are the hooks it writes.

    Raises:
        ValueError: If the model, hook or text is unknown, or does not fit the dictionary.
    """
    return {hook: sanity(dictionary, x, y) for hook, dictionary, x, y in activations_on_text(opened, tokens)}


@torch.no_grad()
def thresholds_of(opened: LoadedCheckpoint, tokens: int) -> dict[str, float]:
    """Measure the thresholds at which TopK dictionaries fire k latents per token on average on held-out text, by output hook.

    ``sparsary.convert`` writes these thresholds for libraries that support thresholds but not TopK.

    Raises:
        ValueError: As in ``sanity_of``.
    """
    found: dict[str, float] = {}
    for hook, dictionary, x, _ in activations_on_text(opened, tokens):
        if not isinstance(dictionary, OneSiteDictionary):
            continue
        gate, _ = gate_of(dictionary.encoder, dictionary.n_latents)
        if gate.name in ("topk", "topk_raw"):
            scores = full_scorer(dictionary.normalised(x), dictionary.weights)
            found[hook] = max(float(largest_of_batch(scores, gate.k * len(x))[0].values.amin()), 0.0)
    return found


def activations_on_text(opened: LoadedCheckpoint, tokens: int) -> Iterator[tuple[str, SparseDictionary, Tensor, Tensor | None]]:
    """Yield each dictionary with its output hook, its inputs on held-out text, and its targets if they differ from the inputs.

    Raises:
        ValueError: As in ``sanity_of``.
    """
    for member in opened.completed().members:
        reads, writes = hooks_of_provenance(member.provenance)
        where = eval_data(member.provenance, (*reads, *writes))
        rows: dict[str, list[Tensor]] = {hook: [] for hook in (*reads, *writes)}
        for piece in where.pieces(Cursor(0, 0), tokens):
            seen = where.model.activations(piece.token_ids, tuple(rows))
            for hook in rows:
                rows[hook].append(seen[hook][piece.kept].float())
        x, y = (torch.cat([torch.cat(rows[hook]) for hook in hooks], dim=1) for hooks in (reads, writes))
        dictionary = member.dictionary.to(where.model.device)
        if (x.shape[1], y.shape[1]) != (dictionary.d_in, dictionary.d_out):
            raise ValueError(
                f"{', '.join(reads)}: expected a width of {dictionary.d_in}, the dictionary's d_in, got {x.shape[1]} from "
                f"{where.model.id}. This dictionary was trained on another model or hook."
            )
        yield writes[0], dictionary, x, None if reads == writes else y


def with_grids_members(checkpoints: Sequence[str]) -> list[str]:
    """Replace every grid directory among the checkpoints by its members; stack directories stay.

    In a stack every dictionary has a different hook, and all are spliced in together; in a grid several share one hook.
    """
    found: list[str] = []
    for checkpoint in checkpoints:
        members = stack_folders(checkpoint) if is_stack(checkpoint) else []
        hooks = [_known_hooks(read_config(member)["provenance"])[1] for member in members]
        found += map(str, members) if len(set(hooks)) < len(hooks) else [checkpoint]
    return found


def folders(checkpoints: Sequence[str], out: str | None) -> list[str | None]:
    """Return the output directory of each checkpoint: ``out`` itself for one, a subfolder named after each for several.

    Raises:
        ValueError: If a checkpoint is given twice, as its report would be written twice.
    """
    twice = [checkpoint for checkpoint in checkpoints if checkpoints.count(checkpoint) > 1]
    if twice:
        raise ValueError(f"{twice[0]}: expected distinct checkpoints, got it twice. Remove one.")
    if out is None or len(checkpoints) == 1:
        return [out] * len(checkpoints)
    names = short_names(checkpoints)
    return [str(Path(out) / name) for name in names]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest trailing parts of paths that are distinct, with slashes replaced by dashes."""
    parts = [Path(path).resolve().parts for path in paths]
    # Equal paths share a name.
    wanted = len(set(parts))
    ends = (["-".join(part[-length:]).replace("/", "") for part in parts] for length in range(1, max(map(len, parts)) + 1))
    return next(names for names in ends if len(set(names)) == wanted)
