"""Model and text in, shards out. Interrupted, the same call goes on after the last complete shard."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.files import remove_partial_files, sha256, write_json, write_tensors

from ..recipe import HarvestSection, ModelSection, TextSection
from ..text import Context, Cursor, contexts, is_heldout
from .model import LanguageModel, tokenizer_digest
from .shards import FORMAT, FORMAT_VERSION, MANIFEST_FILE, Store, dequantize, quantize

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
GRADIENT_KIND = {"loss": "next_token_cross_entropy", "reduction": "sum over the positions of a context", "normalized": "no"}


@dataclass
class Rows:
    """Tokens of some contexts that passed the exclusions: labels ``(n,)`` and tensors ``(n, width)``."""

    labels: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def select(self, keep: Tensor) -> "Rows":
        return Rows({k: v[keep] for k, v in self.labels.items()}, {k: v[keep] for k, v in self.tensors.items()})

    def at(self, hook: str) -> "Rows":
        """The same rows with one hook's tensors only."""
        return Rows(self.labels, {k: v for k, v in self.tensors.items() if k.partition(":")[2] == hook})

    @staticmethod
    def join(pieces: list["Rows"]) -> "Rows":
        first = pieces[0]
        return Rows(
            {k: torch.cat([piece.labels[k] for piece in pieces]) for k in first.labels},
            {k: torch.cat([piece.tensors[k] for piece in pieces]) for k in first.tensors},
        )

    def __len__(self) -> int:
        return self.labels["token"].shape[0]


def excluded(token_ids: np.ndarray, document_ids: np.ndarray, special: frozenset[int], section: HarvestSection) -> np.ndarray:
    """Which tokens ``(contexts, positions)`` are left out: padding, special, leading, or without a label."""
    drop = document_ids < 0
    if section.exclude_special:
        drop |= np.isin(token_ids, list(special))
    drop[:, : section.exclude_leading] = True
    if section.gradients:
        # The last position predicts nothing, so its gradient is another thing.
        drop[:, -1] = True
    return drop


def rows_of(model: LanguageModel, batch: list[Context], section: HarvestSection, hooks: tuple[str, ...]) -> Rows:
    """Run the model on a batch of contexts and keep what is not excluded, as float32 on the CPU.

    Raises:
        ValueError: If an activation is not finite.
    """
    token_ids = np.stack([context.token_ids for context in batch])
    document_ids = np.stack([context.document_ids for context in batch])
    offsets = np.stack([context.positions for context in batch])
    special = frozenset(model.tokenizer.all_special_ids)
    keep = torch.from_numpy(~excluded(token_ids, document_ids, special, section))
    ids = torch.from_numpy(token_ids).long().to(model.device)
    if section.gradients:
        values, gradients = model.activations_and_gradients(ids, hooks)
    else:
        values, gradients = model.activations(ids, hooks), {}
    positions = np.broadcast_to(np.arange(token_ids.shape[1], dtype=np.int32), token_ids.shape)
    labels = {"token": token_ids, "document": document_ids, "position": positions, "offset": offsets}
    mask = keep.to(model.device)
    tensors = {f"x:{hook}": x[mask].float().cpu() for hook, x in values.items()}
    tensors |= {f"grad:{hook}": g[mask].float().cpu() for hook, g in gradients.items()}
    return Rows({k: torch.from_numpy(np.ascontiguousarray(v))[keep] for k, v in labels.items()}, tensors)


@dataclass(frozen=True)
class Identity:
    """What makes two harvests the same, as manifest entries; only the hooks may be more in the store."""

    # Path in the manifest -> value; hook names hold dots, so paths are tuples.
    entries: dict[tuple[str, ...], Any]
    hooks: tuple[str, ...]

    def check(self, store: Store) -> None:
        """Raise ``ValueError`` with one line for every way in which the store is not the recipe's."""
        problems = [
            f"{'.'.join(path)}: {_nested(store.manifest, path)!r} in the store, {value!r} in the recipe"
            for path, value in self.entries.items()
            if _nested(store.manifest, path) != value
        ]
        held = store.manifest["hooks"]
        problems += [
            f"harvest.hooks: {hook} is not in the store, which holds {', '.join(held)}"
            for hook in self.hooks
            if hook not in held
        ]
        if problems:
            raise ValueError(
                f"{store.directory}: this store was made for something else:\n  "
                + "\n  ".join(problems)
                + "\nSet harvest.store to a new directory, or delete this one; then run: sparsary harvest RECIPE"
            )


def _nested(values: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def recipe_identity(model: ModelSection, text: TextSection, section: HarvestSection) -> Identity:
    """The identity as far as it is known without loading the model."""
    entries: dict[tuple[str, ...], Any] = {("model", "id"): model.id, ("model", "dtype"): model.dtype}
    if model.revision is not None:
        entries["model", "revision"] = model.revision
    entries |= {("text", key): value for key, value in text.model_dump(mode="json").items()}
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
    """What only the loaded model can say."""
    entries: dict[tuple[str, ...], Any] = {("hooks", hook, "width"): width for hook, width in model.widths(hooks).items()}
    entries["tokenizer_sha256",] = tokenizer_digest(model.tokenizer)
    entries["model", "revision"] = model.revision
    return Identity(entries, hooks)


def harvest(
    model: LanguageModel,
    text: TextSection,
    section: HarvestSection,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Store:
    """Fill ``section.store`` up to ``section.tokens`` stored tokens and return it.

    ``progress`` is called with the number of tokens stored so far.

    Raises:
        ValueError: If the store belongs to another harvest, or an activation is not finite.
        OSError: If the disk is full or the folder read-only; complete shards stay valid and the next call goes on.
    """
    assert section.store is not None
    assert section.tokens is not None
    directory = Path(section.store)
    store = _open_or_create(directory, model, text, section)
    hooks = tuple(store.manifest["hooks"])
    writer = _Writer(store, section)
    stored = store.tokens("train") + store.tokens("heldout")
    pieces: list[Rows] = []
    batch: list[Context] = []
    cursor = Cursor(*store.manifest["cursor"])
    if stored < section.tokens:
        for batch in batches(contexts(text, model.tokenizer, cursor), section.batch_contexts):
            rows = rows_of(model, batch, section, hooks)
            writer.require_finite(rows, sum(map(len, pieces)))
            pieces.append(rows)
            pending = sum(map(len, pieces))
            progress(min(stored + pending, section.tokens))
            if pending >= section.shard_tokens or stored + pending >= section.tokens:
                writer.write(Rows.join(pieces), batch[-1].cursor)
                stored, pieces = stored + pending, []
            if stored >= section.tokens:
                break
        else:
            if pieces:
                writer.write(Rows.join(pieces), batch[-1].cursor)
                stored += sum(map(len, pieces))
            log.warning("The text ended after %d of %d tokens; the store holds all of it.", stored, section.tokens)
    if stored == 0:
        raise ValueError(
            "text: no token was left to store. Give longer text, or lower text.context_length or harvest.exclude_leading."
        )
    writer.finish()
    return store


def batches(source: Iterator[Context], size: int) -> Iterator[list[Context]]:
    """Contexts in lists of ``size``, the last one shorter."""
    batch: list[Context] = []
    for context in source:
        batch.append(context)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _open_or_create(directory: Path, model: LanguageModel, text: TextSection, section: HarvestSection) -> Store:
    if (directory / MANIFEST_FILE).exists():
        store = Store.open(directory)
        dtype = str(next(model.module.parameters()).dtype).removeprefix("torch.")
        recipe_identity(ModelSection(id=model.id, dtype=dtype), text, section).check(store)  # pyright: ignore[reportArgumentType]
        model_identity(model, section.hooks).check(store)
        remove_partial_files(directory)
        return store
    if directory.exists() and any(not path.name.endswith(".partial") for path in directory.iterdir()):
        raise ValueError(f"harvest.store: {directory} is not empty and not a store. Choose a new directory.")
    directory.mkdir(parents=True, exist_ok=True)
    store = Store(directory, _new_manifest(model, text, section))
    write_json(directory / MANIFEST_FILE, store.manifest)
    return store


def _new_manifest(model: LanguageModel, text: TextSection, section: HarvestSection) -> dict[str, Any]:
    statistics = {"count": 0, "mean": [], "deviation": [], "rounding_fvu": 0.0}
    dtype = str(next(model.module.parameters()).dtype).removeprefix("torch.")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {"id": model.id, "revision": model.revision, "dtype": dtype},
        "tokenizer_sha256": tokenizer_digest(model.tokenizer),
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
    """Turns rows into shards and keeps the manifest in step with them."""

    def __init__(self, store: Store, section: HarvestSection):
        self.store = store
        self.section = section

    def require_finite(self, rows: Rows, before: int) -> None:
        number = len(self.store.shards("train"))
        for name, tensor in rows.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                row = int((~torch.isfinite(tensor)).any(-1).nonzero()[0])
                where = {key: int(values[row]) for key, values in rows.labels.items()}
                raise ValueError(
                    f"{self.store.directory}: {name}: not finite at row {before + row} of shard {number} ({where}). "
                    "The model overflows there: set model.dtype: float32, or leave the token out with harvest.exclude_leading."
                )

    def write(self, rows: Rows, cursor: Cursor) -> None:
        """One shard for each split, then the manifest: a kill in between leaves shards that the manifest does not know."""
        heldout = torch.tensor([is_heldout(int(d), self.section.heldout) for d in rows.labels["document"]])
        manifest = self.store.manifest
        number = len({shard["unit"] for shard in manifest["shards"]})
        for split, keep in zip(SPLITS, (~heldout, heldout), strict=True):
            part = rows.select(keep)
            if len(part) == 0:
                continue
            name = f"{split}-{number:05d}.safetensors"
            path = self.store.directory / name
            write_tensors(path, part.labels | self._encode(part, count=split == "train"), {"split": split})
            entry = {"name": name, "split": split, "unit": number, "tokens": len(part)}
            manifest["shards"].append(entry | {"bytes": path.stat().st_size, "sha256": sha256(path)})
        manifest["cursor"] = list(cursor)
        write_json(self.store.directory / MANIFEST_FILE, manifest)

    def _encode(self, rows: Rows, count: bool) -> dict[str, Tensor]:
        """The tensors as stored; training rows also enter the statistics."""
        encoded: dict[str, Tensor] = {}
        for name, tensor in rows.tensors.items():
            if self.section.dtype == "int8":
                encoded[name], encoded[f"scale:{name}"] = quantize(tensor, self.section.block)
                restored = dequantize(encoded[name], encoded[f"scale:{name}"], self.section.block)
            else:
                encoded[name] = tensor.to(getattr(torch, self.section.dtype))
                restored = encoded[name].float()
            kind, _, hook = name.partition(":")
            if count and kind == "x":
                self._count(self.store.manifest["hooks"][hook], hook, tensor, restored)
        return encoded

    def _count(self, saved: dict[str, Any], hook: str, exact: Tensor, restored: Tensor) -> None:
        """Statistics of what training will read, and the share of variance that rounding cost."""
        moments = self.store.moments(hook)
        lost = saved["rounding_fvu"] * float(moments.squared_deviation())
        moments.update(restored)
        lost += float((exact.double() - restored.double()).pow(2).sum())
        spread = float(moments.squared_deviation())
        saved.update(
            count=moments.count,
            mean=moments.mean.tolist(),
            deviation=moments.deviation.tolist(),
            rounding_fvu=lost / spread if spread > 0 else 0.0,
        )

    def finish(self) -> None:
        if not self.store.manifest["complete"]:
            self.store.manifest["complete"] = True
            write_json(self.store.directory / MANIFEST_FILE, self.store.manifest)
