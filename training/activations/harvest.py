"""Harvest: run a model on text and store its activations in shards.

After an interruption, the same call resumes after the last complete shard.
"""

import logging
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sae.errors import WriteError, doing
from ...sae.files import remove_partial_files, write_tensors
from ...sae.kernels.parallel import has_numba
from ..bad_rows import NOT_FINITE, BadTexts, BadTokens, counted
from ..content import Content, TextDigest, model_problems, pinned, text_problems
from ..locks import LOCK_FILE, locked
from ..recipe import HarvestSection, ModelSection, TextSection
from ..stages import stage
from ..text import Cursor, are_heldout
from .buffer_pool import Memory
from .contexts import ContextBatch, context_batches
from .manifest import FORMAT, FORMAT_VERSION, MANIFEST_FILE, write_manifest
from .model import LanguageModel, tokenizer_digest
from .shards import GRADIENT_KIND, ActivationStore, encode, gradient_dtype

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
# Largest value that each format holds; int8 has 127 steps of a float16 scale.
LARGEST = {"float16": 65504.0, "int8": 127 * 65000.0}
# Batches queued for the writer, so that the model keeps running while a shard is synced.
BATCHES_AHEAD = 8


@dataclass
class HarvestedRows:
    """Tokens that are not excluded: labels ``(n,)`` and tensors ``(n, width)``."""

    labels: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def select(self, keep: Tensor) -> "HarvestedRows":
        return HarvestedRows({k: v[keep] for k, v in self.labels.items()}, {k: v[keep] for k, v in self.tensors.items()})

    def at(self, hooks: tuple[str, ...]) -> "HarvestedRows":
        """Return the same rows with the tensors of these hooks only."""
        return HarvestedRows(self.labels, {k: v for k, v in self.tensors.items() if k.partition(":")[2] in hooks})

    @staticmethod
    def join(pieces: list["HarvestedRows"]) -> "HarvestedRows":
        first = pieces[0]
        return HarvestedRows(
            {k: torch.cat([piece.labels[k] for piece in pieces]) for k in first.labels},
            {k: torch.cat([piece.tensors[k] for piece in pieces]) for k in first.tensors},
        )

    def __len__(self) -> int:
        return self.labels["token"].shape[0]


def rows_of(
    model: LanguageModel,
    batch: ContextBatch,
    section: HarvestSection,
    hooks: tuple[str, ...],
    memory: dict[str, Memory] | None = None,
) -> dict[str, HarvestedRows]:
    """Run the model on a batch of contexts and return the kept tokens of each split, as float32 on the CPU.

    Args:
        memory: Array pools by tensor name, in which training rows are stored.
    """
    shape = batch.token_ids.shape
    places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    labels = {"token": batch.token_ids, "document": batch.document_ids, "position": places, "offset": batch.positions}
    heldout = are_heldout(batch.document_ids, section.heldout)
    ids = batch.on(model.device).token_ids
    if section.gradients:
        documents = torch.from_numpy(batch.document_ids).to(model.device)
        values, gradients = model.activations_and_gradients(ids, hooks, documents)
    else:
        values, gradients = model.activations(ids, hooks), {}
    tensors = {f"x:{hook}": x for hook, x in values.items()} | {f"grad:{hook}": g for hook, g in gradients.items()}
    splits = {}
    for split, here in zip(SPLITS, (batch.kept & ~heldout, batch.kept & heldout), strict=True):
        index = np.flatnonzero(here)
        chosen = torch.from_numpy(index).to(model.device)
        splits[split] = HarvestedRows(
            {key: torch.from_numpy(label.reshape(-1)[index]) for key, label in labels.items()},
            {
                name: _pick(tensor, chosen, memory[name].take() if memory and split == "train" else None)
                for name, tensor in tensors.items()
            },
        )
    return splits


def usable_rows(rows: HarvestedRows, bad: BadTokens, where: str) -> HarvestedRows:
    """Drop and count rows that are not finite, or too large to be stored, at any hook.

    Raises:
        ValueError: If there are more of them than the recipe allows.
    """
    good = bad.usable(rows.tensors.values())
    if good is None:
        bad.count(len(rows))
        return rows
    row = int((~good).nonzero()[0])
    name = next(name for name, x in rows.tensors.items() if not bool((x[row].abs() <= bad.largest).all()))
    place = {key: int(values[row]) for key, values in rows.labels.items()}
    if bool(torch.isfinite(rows.tensors[name][row]).all()):
        problem, remedy = "an activation larger than harvest.dtype holds", "Set harvest.dtype: bfloat16 or float32"
    else:
        problem, remedy = "not finite", "The model overflows there: set model.dtype: float32"
    remedy += ", or leave such tokens out with harvest.exclude_leading."
    bad.count(len(rows), int((~good).sum()), f"{where}: {name}: {problem} ({place})", remedy)
    return rows.select(good)


def _pick(tensor: Tensor, rows: Tensor, memory: np.ndarray | None) -> Tensor:
    """Return rows of ``(contexts, positions, width)`` as ``(n, width)`` float32 on the CPU."""
    flat = tensor.flatten(0, 1)
    if memory is None:
        return flat.index_select(0, rows).float().cpu()
    out = torch.from_numpy(memory)[: len(rows)]
    if flat.dtype == out.dtype and flat.device == out.device:
        return torch.index_select(flat, 0, rows, out=out)
    return out.copy_(flat.index_select(0, rows))


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
        names |= {("model", "id"), ("model", "revision")}
    if of_text == []:
        names |= {("text", "files"), ("text", "dataset"), ("text", "dataset_revision")}
    return names, of_model + (of_text or [])


def _nested(values: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        # A key added after the store was made had its default value.
        default = TextSection.model_fields[part].default if path == ("text", part) else None
        values = values.get(part, default) if isinstance(values, dict) else None
    return values


def recipe_identity(model: ModelSection, text: TextSection, section: HarvestSection) -> Identity:
    """Return the part of the identity that is known without loading the model."""
    entries: dict[tuple[str, ...], Any] = {("model", "id"): model.id, ("model", "dtype"): model.dtype}
    # The handling of bad rows decides whether a harvest fails, not what it stores.
    read = text.model_dump(mode="json", exclude={"on_bad_row", "max_bad_share"})
    entries |= {("text", key): value for key, value in read.items()}
    entries |= {
        ("dtype",): section.dtype,
        ("block",): section.block,
        ("gradients",): GRADIENT_KIND if section.gradients else None,
        ("exclude", "special"): section.exclude_special,
        ("exclude", "leading"): section.exclude_leading,
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
) -> ActivationStore:
    """Fill ``section.store`` up to ``section.tokens`` stored tokens and return it.

    Raises:
        ValueError: If the store belongs to another harvest, the folder is in use by another process or not writable, or more
            activations are not finite than the recipe allows.
        WriteError: If the disk is full; complete shards stay valid and the next call resumes after them.
    """
    assert section.store is not None
    with locked(Path(section.store), "harvest.store"):
        store = _open_or_create(Path(section.store), model, text, section)
        try:
            with doing(f"harvesting into {section.store}"):
                _fill(store, model, text, section)
        except WriteError as error:
            # Reread from disk, because the manifest in memory may list the shard that failed.
            kept = ActivationStore.open(store.directory)
            raise error.keeping(f"{kept.tokens('train') + kept.tokens('heldout'):,} tokens are stored and kept.") from None
    return store


def _fill(store: ActivationStore, model: LanguageModel, text: TextSection, section: HarvestSection) -> None:
    """Harvest from where the store ends up to ``section.tokens``."""
    assert section.tokens is not None
    hooks = tuple(store.manifest["hooks"])
    texts, tokens = BadTexts(text), BadTokens(section, LARGEST.get(section.dtype))
    batch_tokens = section.batch_contexts * text.context_length
    memory = {f"{kind}:{hook}": Memory(batch_tokens, store.width(hook)) for hook in hooks for kind in ("x", "grad")}
    stored = store.tokens("train") + store.tokens("heldout")
    pending = 0
    tokens.bad = store.manifest.get("skipped", {}).get(NOT_FINITE, 0)
    tokens.rows = stored + tokens.bad
    cursor = Cursor(*store.manifest["cursor"])
    # A dataset stays at one commit for the whole harvest.
    text = pinned(text)
    digest = TextDigest(text)
    with _Writer(store, section) as writer, stage("harvest", section.tokens, done=min(stored, section.tokens)) as shown:
        if stored < section.tokens:
            for batch in context_batches(model, text, section, section.batch_contexts, cursor, bad=texts, reading=digest.add):
                splits = rows_of(model, batch, section, hooks, memory)
                rows = {split: usable_rows(part, tokens, str(store.directory)) for split, part in splits.items()}
                pending += sum(map(len, rows.values()))
                cursor = batch.cursor
                enough = stored + pending >= section.tokens
                full = enough or pending >= section.shard_tokens
                left_out = texts.until(cursor.document) + tokens.found
                writer.put(rows, (cursor, left_out, digest.up_to(cursor)) if full else None)
                shown.update(min(stored + pending, section.tokens))
                if full:
                    stored, pending = stored + pending, 0
                if enough:
                    break
            else:
                if pending:
                    writer.put({}, (cursor, texts.until(cursor.document) + tokens.found, digest.up_to(cursor)))
                stored += pending
                log.warning("The text has only %d of the %d tokens; the store holds all of them.", stored, section.tokens)
        if stored == 0:
            raise ValueError(
                "text: expected tokens to store, got none. Give longer text, or lower text.context_length or "
                "harvest.exclude_leading."
            )
        writer.finish()
        digest.remember()
    if skipped := store.manifest.get("skipped"):
        log.warning("%s: excluded or repaired: %s.", store.directory, counted(skipped))


def require_store_folder(directory: Path) -> None:
    """Raise ``ValueError`` if a folder contains anything other than a store."""
    if (directory / MANIFEST_FILE).exists() or not directory.is_dir():
        return
    if any(path.name != LOCK_FILE and not path.name.endswith(".partial") for path in directory.iterdir()):
        raise ValueError(
            f"harvest.store: {directory}: expected an empty directory or a store, got other files. Choose a new directory."
        )


def _open_or_create(directory: Path, model: LanguageModel, text: TextSection, section: HarvestSection) -> ActivationStore:
    store = ActivationStore.open(directory) if (directory / MANIFEST_FILE).exists() else None
    # An empty store, left by a failed harvest, may be overwritten.
    if store is not None and store.manifest["shards"]:
        dtype = str(next(model.module.parameters()).dtype).removeprefix("torch.")
        names = recipe_identity(ModelSection(id=model.id, dtype=dtype), text, section)  # pyright: ignore[reportArgumentType]
        more = model_identity(model, section.hooks)
        Identity(names.entries | more.entries, section.hooks).check(store, model.content(), text)
        remove_partial_files(directory)
        return store
    require_store_folder(directory)
    store = ActivationStore(directory, _new_manifest(model, text, section))
    write_manifest(directory, store.manifest)
    return store


def _new_manifest(model: LanguageModel, text: TextSection, section: HarvestSection) -> dict[str, Any]:
    statistics = {"count": 0, "mean": [], "deviation": [], "rounding_fvu": 0.0}
    dtype = str(next(model.module.parameters()).dtype).removeprefix("torch.")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {"id": model.id, "revision": model.revision, "dtype": dtype},
        "tokenizer_sha256": tokenizer_digest(model.tokenizer),
        "content": model.content() | {"text": {"documents": 0, "sha256": ""}},
        "text": text.model_dump(mode="json"),
        "dtype": section.dtype,
        "block": section.block,
        "gradients": GRADIENT_KIND if section.gradients else None,
        "exclude": {"special": section.exclude_special, "leading": section.exclude_leading},
        "heldout": section.heldout,
        "hooks": {hook: {"width": width, **statistics} for hook, width in model.widths(section.hooks).items()},
        "complete": False,
        "cursor": [0, 0],
        "shards": [],
    }


class _Writer:
    """Background thread that writes rows to shards and keeps the manifest up to date.

    Context manager: on an error, it completes the write in progress and discards the queue.
    """

    def __init__(self, store: ActivationStore, section: HarvestSection):
        self.store = store
        self.section = section
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sparsary-harvest")
        self._ahead: deque[Future[None]] = deque()
        self._failed = False
        self._begin()

    def _begin(self) -> None:
        """Start an empty shard. Statistics continue from the manifest, as they do after an interruption."""
        self._pieces: dict[str, list[dict[str, Tensor]]] = {split: [] for split in SPLITS}
        self._moments = {hook: self.store.moments(hook) for hook in self.store.manifest["hooks"]}
        # Summed squared differences between the activations and their stored values.
        self._lost = {
            hook: saved["rounding_fvu"] * float(self._moments[hook].squared_deviation())
            for hook, saved in self.store.manifest["hooks"].items()
        }

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(self, rows: dict[str, HarvestedRows], end: tuple[Cursor, Counter[str], Content] | None) -> None:
        """Queue the rows of a batch for storage.

        Args:
            end: Given for the last batch of a shard: cursor in the text, bad rows and content read up to there.

        Raises:
            ValueError, OSError: If an earlier batch could not be stored.
        """
        while self._ahead and (len(self._ahead) == BATCHES_AHEAD or self._ahead[0].done()):
            self._ahead.popleft().result()
        self._ahead.append(self._thread.submit(self._take, rows, end))

    def finish(self) -> None:
        """Wait until everything is stored, and mark the manifest as complete."""
        while self._ahead:
            self._ahead.popleft().result()
        if not self.store.manifest["complete"]:
            self.store.manifest["complete"] = True
            write_manifest(self.store.directory, self.store.manifest)

    def _take(self, rows: dict[str, HarvestedRows], end: tuple[Cursor, Counter[str], Content] | None) -> None:
        # Nothing is stored after a failure: a resume starts where the last complete shard ends.
        if self._failed:
            return
        try:
            for split, part in rows.items():
                if len(part):
                    encoded = [self._encode(split, part, name) for name in part.tensors]
                    self._pieces[split].append(part.labels | {k: v for tensors in encoded for k, v in tensors.items()})
            if end is not None:
                self._write(*end)
                self._begin()
        except BaseException:
            self._failed = True
            raise

    def _encode(self, split: str, rows: HarvestedRows, name: str) -> dict[str, Tensor]:
        """Encode a tensor for storage. Training rows also update the statistics, which describe the values read back."""
        exact = rows.tensors[name]
        kind, _, hook = name.partition(":")
        dtype = self.section.dtype if kind == "x" else gradient_dtype(self.section.dtype)
        stored, scale, restored = encode(exact, dtype, self.section.block)
        if split == "train" and kind == "x":
            if restored is not exact:
                self._lost[hook] += _squared_difference(exact, restored)
            self._moments[hook].merge(len(rows), *map(torch.from_numpy, _moments(restored)))
        return {name: stored} if scale is None else {name: stored, f"scale:{name}": scale}

    def _number(self) -> int:
        return len({shard["unit"] for shard in self.store.manifest["shards"]})

    def _write(self, cursor: Cursor, skipped: Counter[str], read: Content) -> None:
        """Write one shard per split, then the manifest; a crash in between leaves shards that the manifest does not list."""
        manifest, number = self.store.manifest, self._number()
        for split, pieces in self._pieces.items():
            if not pieces:
                continue
            name = f"{split}-{number:05d}.safetensors"
            path = self.store.directory / name
            digest = write_tensors(path, {key: [piece[key] for piece in pieces] for key in pieces[0]}, {"split": split})
            entry = {"name": name, "split": split, "unit": number, "tokens": sum(len(piece["token"]) for piece in pieces)}
            manifest["shards"].append(entry | {"bytes": path.stat().st_size, "sha256": digest})
        for hook, saved in manifest["hooks"].items():
            moments = self._moments[hook]
            spread = float(moments.squared_deviation())
            saved.update(
                count=moments.count,
                mean=moments.mean.tolist(),
                deviation=moments.deviation.tolist(),
                rounding_fvu=self._lost[hook] / spread if spread > 0 else 0.0,
            )
        manifest["cursor"] = list(cursor)
        if "content" in manifest:
            manifest["content"]["text"] = read
        if skipped:
            manifest["skipped"] = dict(skipped)
        write_manifest(self.store.directory, manifest)


def _moments(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and summed squared deviation of every column, in float64. A mean is not finite if any entry is not."""
    if not has_numba():
        # NumPy rather than torch, whose threads are busy running the model.
        exact = rows.numpy().astype(np.float64)
        mean = exact.mean(0)
        return mean, np.square(exact - mean).sum(0)
    # Imported on first use: the compiler takes a second.
    from ...sae.kernels.storing import moments

    mean, deviation = np.empty((2, rows.shape[1]))
    moments(rows.numpy(), mean, deviation)
    return mean, deviation


def _squared_difference(left: Tensor, right: Tensor) -> float:
    """Return the sum of squared differences, in float64."""
    if not has_numba():
        return float(np.square(left.numpy().astype(np.float64) - right.numpy()).sum())
    from ...sae.kernels.storing import squared_difference

    return squared_difference(left.numpy(), right.numpy())
