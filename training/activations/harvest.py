"""Harvest: run a model on text and store its activations in shards.

After an interruption, the same call resumes after the last complete shard.
"""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sae.errors import WriteError, doing
from ...sae.files import remove_partial_files, sha256
from ...sae.ranks import ALONE, Ranks
from ..bad_rows import BadTexts, BadTokens, counted
from ..content import Content, TextDigest, model_problems, pinned, text_problems
from ..locks import locked
from ..recipe import HarvestSection, ModelSection, TextSection
from ..signals import StopRequest
from ..stages import stage
from ..text import Cursor
from ..tokens import TOKENIZE_AT_ONCE, tokenizer_digest
from ..watch import Watch
from .buffer_pool import Memory
from .contexts import ContextReader, context_masks
from .harvest_units import Turn, Unit, UnitQueue
from .harvested_rows import LARGEST, rows_of, usable_rows
from .manifest import FORMAT, FORMAT_VERSION, MANIFEST_FILE, write_manifest
from .model import LanguageModel
from .shards import GRADIENT_KIND, ActivationStore
from .store_writer import SHARED_SECONDS, Progress, StoreWriter, UnitRecord

log = logging.getLogger(__name__)

# Documents tokenized together by one of several ranks: those behind its unit are another rank's, which tokenizes them again.
TOKENIZE_AT_ONCE_IN_TURN = 32
TEXT_DEFAULTS = TextSection().model_dump(mode="json")


@dataclass(frozen=True)
class Identity:
    """Manifest entries that must match for a store to be reused; the store may hold additional hooks."""

    # Path in the manifest -> value. Hook names contain dots, so paths are tuples.
    entries: dict[tuple[str, ...], Any]
    hooks: tuple[str, ...]

    def check(self, store: ActivationStore, content: Content, text: TextSection) -> None:
        """Raise ``ValueError`` with one line for every difference between the store and the recipe.

        Args:
            content: Content of the recipe's model. If it equals the store's, a local model may have another path.
            text: Text of the recipe. If its content equals the store's, it may have another name or path.
        """
        names, problems = _compare_content(store, content, text)
        if self.entries["model", "id"] == "embedded":
            names -= {("model", "id")}
        problems += [
            f"{'.'.join(path)}: {_nested(store.manifest, path)!r} in the store, {value!r} in the recipe"
            for path, value in self.entries.items()
            if _nested(store.manifest, path) != value and path not in names
        ]
        held = store.manifest["hooks"]
        problems += [
            f"harvest.hooks: {hook} is not in the store, which holds {', '.join(held)}"
            for hook in self.hooks
            if hook not in held
        ]
        if problems:
            raise ValueError(
                f"{store.directory}: expected a store of this recipe, got one made with other settings:\n  "
                + "\n  ".join(problems)
                + "\nSet harvest.store to a new directory, or delete this one; then run: sparsary harvest RECIPE"
            )


def _compare_content(store: ActivationStore, content: Content, text: TextSection) -> tuple[set[tuple[str, ...]], list[str]]:
    """Return the manifest entries whose names may differ because their contents match, and one line per content mismatch."""
    recorded = store.manifest.get("content")
    if recorded is None:
        log.warning(
            "%s: made by a version that recorded no hashes of model and text: a change of either under the same name "
            "is not detected.",
            store.directory,
        )
        recorded = {"model": {"commit": store.manifest["model"].get("revision")}}
    of_model, of_text = model_problems(recorded, content), text_problems(recorded, text)
    names: set[tuple[str, ...]] = set()
    if content["model"] and content["model"] == recorded.get("model"):
        names |= {("model", "id"), ("model", "revision"), ("model", "tuned", "id")}
    if of_text == []:
        names |= {("text", "files"), ("text", "dataset"), ("text", "dataset_revision")}
    return names, of_model + (of_text or [])


def _nested(values: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        # A key added after the store was made had its default value.
        default = TEXT_DEFAULTS[part] if path == ("text", part) else None
        values = values.get(part, default) if isinstance(values, dict) else None
    return values


def recipe_identity(model: ModelSection, text: TextSection, section: HarvestSection) -> Identity:
    """Return the part of the identity that is known without loading the model."""
    entries: dict[tuple[str, ...], Any] = {("model", "id"): model.id, ("model", "dtype"): model.dtype}
    entries["model", "quantization"] = model.quantization
    for key in ("id", "dtype", "quantization"):
        entries["model", "tuned", key] = None if model.tuned is None else getattr(model.tuned, key)
    # The handling of bad rows decides whether a harvest fails, not what it stores.
    read = text.model_dump(mode="json", exclude={"on_bad_row", "max_bad_share"})
    entries |= {("text", key): value for key, value in read.items()}
    entries |= {
        ("dtype",): section.dtype,
        ("block",): section.block,
        ("gradients",): GRADIENT_KIND if section.gradients else None,
        ("exclude", "special"): section.exclude_special,
        ("exclude", "leading"): section.exclude_leading,
        **{("exclude", key): value or None for key, value in section.exclude.model_dump(mode="json").items()},
        ("heldout",): section.heldout,
    }
    return Identity(entries, section.hooks)


def model_identity(model: LanguageModel, hooks: tuple[str, ...]) -> Identity:
    """Return the part of the identity that requires the loaded model."""
    entries: dict[tuple[str, ...], Any] = {("hooks", hook, "width"): width for hook, width in model.widths(hooks).items()}
    entries["tokenizer_sha256",] = tokenizer_digest(model.tokenizer)
    return Identity(entries, hooks)


def harvest_activations(
    model: LanguageModel,
    text: TextSection,
    section: HarvestSection,
    ranks: Ranks = ALONE,
) -> ActivationStore:
    """Fill ``section.store`` up to ``section.tokens`` stored tokens and return it.

    Args:
        ranks: Processes that share the work. What they store does not depend on their number.

    Raises:
        ValueError: If the store belongs to another harvest, the folder is in use by another process or not writable, the ranks
            do not share it, or more activations are not finite than the recipe allows.
        Stopped: If this process, or another rank, was told to stop by SIGINT or SIGTERM; complete shards are kept.
        WriteError: If the disk is full; complete shards stay valid and the next call resumes after them.
    """
    assert section.store is not None
    directory = Path(section.store)
    # The first rank holds the lock for all.
    with locked(directory, "harvest.store") if ranks.rank == 0 else nullcontext():
        store = _open_or_create(directory, model, text, section) if ranks.rank == 0 else None
        require_shared_store(ranks, directory)
        store = ActivationStore(directory, ranks.from_first(store.manifest if store is not None else {}))
        try:
            with doing(f"harvesting into {section.store}"):
                _fill(store, model, text, section, ranks)
        except WriteError as error:
            # Reread from disk, because the manifest in memory may list the shard that failed.
            kept = ActivationStore.open(store.directory)
            raise error.keeping(f"{kept.tokens('train') + kept.tokens('heldout'):,} tokens are stored and kept.") from None
    return store


def _fill(store: ActivationStore, model: LanguageModel, text: TextSection, section: HarvestSection, ranks: Ranks) -> None:
    """Harvest from where the store ends up to ``section.tokens``."""
    assert section.tokens is not None
    hooks = tuple(store.manifest["hooks"])
    batch_tokens = section.batch_contexts * text.context_length
    memory = {f"{kind}:{hook}": Memory(batch_tokens, store.width(hook)) for hook in hooks for kind in ("x", "grad")}
    # A dataset stays at one commit for the whole harvest, on all ranks.
    text = ranks.from_first(pinned(text) if ranks.rank == 0 else text)
    texts, tokens = BadTexts(text), BadTokens(section, LARGEST.get(section.dtype))
    digest = TextDigest(text)
    at_once = TOKENIZE_AT_ONCE if ranks.size == 1 else TOKENIZE_AT_ONCE_IN_TURN
    stop = StopRequest()
    with stop.signals_deferred(), StoreWriter(store, section, ranks) as writer:
        watch = Watch(stop, lambda: f"in the harvest; {writer.kept_tokens():,} of {section.tokens:,} tokens are stored.")
        complete = writer.take_over()
        done = Progress.of(store.manifest, section.tokens)
        reader = ContextReader(model, text, section, Cursor(*store.manifest["cursor"]), texts, digest.add, at_once)
        units = UnitQueue(reader, section, ranks, watch, complete)
        with stage("harvest", section.tokens, done=min(done.kept, section.tokens)) as shown:
            while done.stored < section.tokens and not units.text_ended:
                tokens.bad = done.kept - done.stored
                document, offset = store.manifest["cursor"]
                for unit in units.own(Turn(done.units, document, offset, done.kept), done.target):
                    # Of other ranks' tokens only those are known that could not be stored in earlier rounds. The first rank
                    # counts all of them when it joins the units.
                    tokens.rows, before, left_out = unit.turn.kept, tokens.bad, []
                    for batch in unit.batches:
                        watch.beat(f"harvesting unit {unit.turn.unit}")
                        rows = {}
                        for split, part in rows_of(model, batch, section, hooks, memory).items():
                            bad = tokens.bad
                            rows[split] = usable_rows(part, tokens, str(store.directory))
                            if tokens.bad > bad:
                                left_out.append([tokens.rows - unit.turn.kept, tokens.bad - before])
                        writer.put(rows)
                        shown.update(min(tokens.rows, section.tokens))
                    if unit.kept and not unit.stored:
                        writer.put({}, _record(unit, writer, texts, digest, left_out, tokens))
                writer.finish(units.end.unit, watch)
                done = Progress.of(store.manifest, section.tokens)
                shown.update(min(done.kept, section.tokens))
        if units.text_ended and done.stored < section.tokens:
            log.warning("The text has only %d of the %d tokens; the store holds all of them.", done.stored, section.tokens)
        if done.stored == 0:
            raise ValueError(
                "text: expected tokens to store, got none. Give longer text, or lower text.context_length or "
                "harvest.exclude_leading."
            )
        writer.complete()
        # Known to the rank that has read the text to the end.
        if digest.up_to(Cursor(*store.manifest["cursor"])) == store.manifest.get("content", {}).get("text"):
            digest.remember()
    if skipped := store.manifest.get("skipped"):
        log.warning("%s: excluded or repaired: %s.", store.directory, counted(skipped))


def _record(
    unit: Unit, writer: StoreWriter, texts: BadTexts, digest: TextDigest, left_out: list[list[int]], tokens: BadTokens
) -> UnitRecord:
    """Return the record of a unit that was run, for the writer to complete."""
    turn, end = unit.turn, unit.end
    return UnitRecord(
        unit=turn.unit,
        store=writer.digest,
        start=list(turn.cursor),
        end=list(end),
        kept=unit.kept,
        left_out=left_out,
        first_left_out=list(tokens.first) if left_out and tokens.first is not None else None,
        bad_texts=dict(texts.until(end.document)),
        read=digest.up_to(end),
    )


def require_store_folder(directory: Path) -> None:
    """Raise ``ValueError`` if a folder contains anything other than a store."""
    if (directory / MANIFEST_FILE).exists() or not directory.is_dir():
        return
    # Hidden files are those of other ranks: locks, partial files, probes of what can be written.
    if any(path.name[0] != "." for path in directory.iterdir()):
        raise ValueError(
            f"harvest.store: {directory}: expected an empty directory or a store, got other files. Choose a new directory."
        )


def require_shared_store(ranks: Ranks, directory: Path) -> None:
    """Raise ``ValueError`` on all ranks, naming those that do not see the first rank's manifest in their folder."""
    expected = ranks.from_first(_manifest_digest(directory))
    deadline = time.monotonic() + (SHARED_SECONDS if expected else 0.0)
    # A file system that nodes share may show them a new file late.
    while not (seen := _manifest_digest(directory) == expected) and time.monotonic() < deadline:
        time.sleep(0.1)
    if blind := [rank for rank, sees in enumerate(ranks.gather_objects(seen)) if not sees]:
        raise ValueError(
            f"harvest.store: {directory}: expected one folder for all ranks, but rank {', '.join(map(str, blind))} does not "
            f"see rank 0's {MANIFEST_FILE} there. Choose a folder that all nodes share."
        )


def _manifest_digest(directory: Path) -> str:
    try:
        return sha256(directory / MANIFEST_FILE)
    except OSError:
        return ""


def _open_or_create(directory: Path, model: LanguageModel, text: TextSection, section: HarvestSection) -> ActivationStore:
    store = ActivationStore.open(directory) if (directory / MANIFEST_FILE).exists() else None
    # An empty store, left by a failed harvest, may be overwritten.
    if store is not None and store.manifest["shards"]:
        names = recipe_identity(ModelSection(id=model.id, **model.precision), text, section)
        more = model_identity(model, section.hooks)
        Identity(names.entries | more.entries, section.hooks).check(store, model.content(), text)
        remove_partial_files(directory)
        return store
    require_store_folder(directory)
    store = ActivationStore(directory, _new_manifest(model, text, section))
    write_manifest(directory, store.manifest)
    return store


def _excluded(model: LanguageModel, text: TextSection, section: HarvestSection) -> dict[str, Any]:
    """Return the further exclusions of a recipe, with the largest norm that is kept at every hook."""
    found = {key: value for key, value in section.exclude.model_dump(mode="json").items() if value}
    largest = context_masks(model, text, section).largest_norms
    return found | ({"largest_norms": largest} if largest else {})


def _new_manifest(model: LanguageModel, text: TextSection, section: HarvestSection) -> dict[str, Any]:
    statistics = {"count": 0, "mean": [], "deviation": [], "rounding_fvu": 0.0}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {"id": model.id, "revision": model.revision, **model.precision},
        "tokenizer_sha256": tokenizer_digest(model.tokenizer),
        "content": model.content() | {"text": {"documents": 0, "sha256": ""}},
        "text": text.model_dump(mode="json"),
        "dtype": section.dtype,
        "block": section.block,
        "gradients": GRADIENT_KIND if section.gradients else None,
        "exclude": {"special": section.exclude_special, "leading": section.exclude_leading} | _excluded(model, text, section),
        "heldout": section.heldout,
        "hooks": {hook: {"width": width, **statistics} for hook, width in model.widths(section.hooks).items()},
        "complete": False,
        "cursor": [0, 0],
        "shards": [],
    }
