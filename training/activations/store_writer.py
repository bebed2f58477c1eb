"""Writing of a store by several ranks: each writes the shards of its own units of the text, the first joins them in order.

A unit is a run of batches of the text, with one shard per split. Its record says all that the manifest needs to know. A unit
that is complete before an earlier one has its record in a file, so that it is kept whatever becomes of the rank that wrote it.
"""

import hashlib
import json
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sae.files import read_json, write_json, write_tensors
from ...sae.kernels.parallel import has_numba
from ...sae.metrics import Moments
from ...sae.ranks import Ranks
from ..bad_rows import NOT_FINITE, BadTokens
from ..content import Content
from ..recipe import HarvestSection
from ..watch import Watch
from .harvested_rows import LARGEST, SPLITS, HarvestedRows
from .manifest import read_manifest, write_manifest
from .shards import ActivationStore, encode, gradient_dtype

# Batches queued for the writer, so that the model keeps running while a shard is synced.
BATCHES_AHEAD = 8
# How long another rank's file may take to be seen in the shared folder.
SHARED_SECONDS = 60.0


@dataclass
class UnitRecord:
    """Content of one unit's shards, and its place in the text.

    Args:
        store: Digest of what the store is made of; a record of another store is ignored.
        start, end: Cursors in the text.
        kept: Tokens that are not excluded, with those that could not be stored.
        left_out: Pairs of tokens so far and tokens so far that could not be stored, wherever the second rises.
        first_left_out: Place of the first of them and the remedy, for an error message.
        bad_texts: Bad rows of the text before ``end``, by kind.
        read: Record of the text before ``end``.
        shards: Manifest entries of the shards.
        hooks: Count, mean, deviation and summed squared rounding error of the training tokens at each hook.
    """

    unit: int
    store: str
    start: list[int]
    end: list[int]
    kept: int
    left_out: list[list[int]]
    first_left_out: list[str] | None
    bad_texts: dict[str, int]
    read: Content
    shards: list[dict[str, Any]] = field(default_factory=list)
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Name of the record's file."""
        return record_name(self.unit)

    @property
    def n_left_out(self) -> int:
        """Number of tokens that could not be stored."""
        return self.left_out[-1][1] if self.left_out else 0


def record_name(unit: int) -> str:
    return f"unit-{unit:05d}.json"


def store_digest(manifest: dict[str, Any]) -> str:
    """Return a digest of the entries of a manifest that are known before the first token is stored."""
    known = {
        key: manifest[key] for key in ("model", "tokenizer_sha256", "text", "dtype", "block", "gradients", "exclude", "heldout")
    }
    known["content"] = manifest.get("content", {}).get("model")
    known["hooks"] = {hook: saved["width"] for hook, saved in manifest["hooks"].items()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Progress:
    """Part of a manifest about the stored text.

    Args:
        units: Number of units.
        kept: Tokens that are not excluded, with those that could not be stored.
        stored: Stored tokens.
        target: Number of kept tokens to read up to: those asked for, and as many more as could not be stored.
    """

    units: int
    kept: int
    stored: int
    target: int

    @staticmethod
    def of(manifest: dict[str, Any], tokens: int) -> "Progress":
        """Return the progress towards ``tokens`` stored tokens.

        The target depends on the units stored, not on when a harvest was interrupted: as soon as all tokens asked for are
        read, it rises by those that could not be stored.
        """
        left_out = {int(unit): count for unit, count in manifest.get("left_out", {}).items()}
        of_unit: dict[int, int] = dict.fromkeys(left_out, 0)
        for shard in manifest["shards"]:
            of_unit[shard["unit"]] = of_unit.get(shard["unit"], 0) + shard["tokens"]
        # Earlier versions counted them without saying in which unit.
        kept = manifest.get("skipped", {}).get(NOT_FINITE, 0) - sum(left_out.values())
        stored, target = 0, tokens
        for unit, count in sorted(of_unit.items()):
            stored += count
            kept += count + left_out.get(unit, 0)
            if kept >= target and stored < tokens:
                target = kept + tokens - stored
        return Progress(max(of_unit, default=-1) + 1, kept, stored, target)


class StoreWriter:
    """Background thread that writes rows to shards. On the first rank it also keeps the manifest up to date.

    Context manager: on an error, it completes the write in progress and discards the queue.
    """

    def __init__(self, store: ActivationStore, section: HarvestSection, ranks: Ranks):
        self.store, self.section, self.ranks = store, section, ranks
        self.digest = store_digest(store.manifest)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sparsary-harvest")
        self._ahead: deque[Future[None]] = deque()
        self._failed = False
        self._begin()

    def _begin(self) -> None:
        """Start an empty unit."""
        self._pieces: dict[str, list[dict[str, Tensor]]] = {split: [] for split in SPLITS}
        self._moments = {hook: Moments(self.store.width(hook)) for hook in self.store.manifest["hooks"]}
        # Summed squared differences between the activations and their stored values.
        self._lost = dict.fromkeys(self._moments, 0.0)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(self, rows: dict[str, HarvestedRows], end: UnitRecord | None = None) -> None:
        """Queue the rows of a batch for storage.

        Args:
            end: Given with the last rows of a unit: its record, without what is known once it is stored.

        Raises:
            ValueError, OSError: If an earlier batch could not be stored.
        """
        while self._ahead and (len(self._ahead) == BATCHES_AHEAD or self._ahead[0].done()):
            self._ahead.popleft().result()
        self._ahead.append(self._thread.submit(self._take, rows, end))

    def finish(self, units: int, watch: Watch) -> None:
        """Wait until all ranks have stored their units, and give all of them the manifest.

        Args:
            units: Number of units of the store.
            watch: This rank's, to the others that it waits for.

        Raises:
            ValueError: If the first rank does not see another rank's unit.
        """
        while self._ahead:
            self._ahead.popleft().result()
        watch.wait(self.ranks.wait)
        if self.ranks.rank == 0:
            deadline = time.monotonic() + SHARED_SECONDS
            while self.join_units() < units:
                if time.monotonic() > deadline:
                    unit = Progress.of(self.store.manifest, 0).units
                    raise ValueError(
                        f"harvest.store: {self.store.directory}: expected {record_name(unit)} of rank {unit % self.ranks.size} "
                        "there, found none. Choose a folder that all nodes share."
                    )
                watch.beat("joining the units")
                time.sleep(0.1)
        self.store.manifest = self.ranks.from_first(self.store.manifest)

    def complete(self) -> None:
        """Mark the manifest as complete."""
        if not self.store.manifest["complete"]:
            self.store.manifest["complete"] = True
            if self.ranks.rank == 0:
                write_manifest(self.store.directory, self.store.manifest)

    def _take(self, rows: dict[str, HarvestedRows], end: UnitRecord | None) -> None:
        # Nothing is stored after a failure.
        if self._failed:
            return
        try:
            for split, part in rows.items():
                if len(part):
                    encoded = [self._encode(split, part, name) for name in part.tensors]
                    self._pieces[split].append(part.labels | {k: v for tensors in encoded for k, v in tensors.items()})
            if end is not None:
                self._write(end)
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

    def _write(self, record: UnitRecord) -> None:
        """Write one shard per split, then the record or the manifest; a crash in between leaves shards that are in neither."""
        for split, pieces in self._pieces.items():
            if not pieces:
                continue
            name = f"{split}-{record.unit:05d}.safetensors"
            path = self.store.directory / name
            digest = write_tensors(path, {key: [piece[key] for piece in pieces] for key in pieces[0]}, {"split": split})
            entry = {"name": name, "split": split, "unit": record.unit, "tokens": sum(len(piece["token"]) for piece in pieces)}
            record.shards.append(entry | {"bytes": path.stat().st_size, "sha256": digest})
        for hook, moments in self._moments.items():
            mean, deviation = moments.mean.tolist(), moments.deviation.tolist()
            record.hooks[hook] = {"count": moments.count, "mean": mean, "deviation": deviation, "lost": self._lost[hook]}
        if self.ranks.rank or record.unit != Progress.of(self.store.manifest, 0).units:
            write_json(self.store.directory / record.path, asdict(record), sealed=True)
        if self.ranks.rank == 0:
            self.join_units(record)

    def join_units(self, own: UnitRecord | None = None) -> int:
        """Add to the manifest all units that are next in order, and return the number of units it has then.

        Args:
            own: Record of a unit that may have no file.

        Raises:
            ValueError: If more tokens could not be stored than the recipe allows.
        """
        units = Progress.of(self.store.manifest, 0).units
        while True:
            record = own if own is not None and own.unit == units else self.record(units)
            # The record of an earlier harvest may be of another part of the text: its unit is stored anew.
            if record is None or record.start != self.store.manifest["cursor"]:
                return units
            self._require_few_left_out(record)
            _join(self.store.manifest, record)
            write_manifest(self.store.directory, self.store.manifest)
            (self.store.directory / record.path).unlink(missing_ok=True)
            units += 1

    def record(self, unit: int) -> UnitRecord | None:
        """Return the record of a unit that is complete and not in the manifest yet."""
        path = self.store.directory / record_name(unit)
        if not path.exists():
            return None
        try:
            record = UnitRecord(**read_json(path))
            whole = all((path.parent / shard["name"]).stat().st_size == shard["bytes"] for shard in record.shards)
        except (OSError, ValueError, TypeError):
            return None
        return record if whole and record.store == self.digest and record.unit == unit else None

    def kept_tokens(self) -> int:
        """Return the number of tokens in complete units, those in the manifest and those with a record."""
        manifest = read_manifest(self.store.directory)
        units = Progress.of(manifest, 0).units
        numbers = [path.stem.removeprefix("unit-") for path in self.store.directory.glob("unit-*.json")]
        records = [self.record(int(number)) for number in numbers if number.isdecimal() and int(number) >= units]
        shards = [*manifest["shards"], *(shard for record in records if record is not None for shard in record.shards)]
        return sum(shard["tokens"] for shard in shards)

    def take_over(self) -> dict[int, UnitRecord]:
        """Join the complete units of an earlier harvest, and return the records of those that are not next in order.

        All ranks get the first rank's manifest and records, which are without statistics.
        """
        if self.ranks.rank:
            self.store.manifest, later = self.ranks.from_first((self.store.manifest, {}))
            return later
        units, later = self.join_units(), {}
        for path in sorted(self.store.directory.glob("unit-*.json")):
            number = path.stem.removeprefix("unit-")
            record = self.record(int(number)) if number.isdecimal() and int(number) >= units else None
            if record is None:
                path.unlink(missing_ok=True)
            else:
                later[record.unit] = replace(record, hooks={})
        return self.ranks.from_first((self.store.manifest, later))[1]

    def _require_few_left_out(self, record: UnitRecord) -> None:
        """Count the tokens that a unit left out, batch by batch as one process does, and raise if they are too many."""
        if not record.left_out:
            return
        before = Progress.of(self.store.manifest, 0)
        bad = BadTokens(self.section, LARGEST.get(self.section.dtype))
        bad.bad, counted = before.kept - before.stored, 0
        where, remedy = record.first_left_out or ("", "")
        # Its rank has told of it.
        bad.first = where, remedy
        for kept, left_out in record.left_out:
            bad.rows = before.kept + kept
            bad.count(0, left_out - counted, where, remedy)
            counted = left_out


def _join(manifest: dict[str, Any], record: UnitRecord) -> None:
    """Add the next unit to a manifest."""
    manifest["shards"] += record.shards
    for hook, added in record.hooks.items():
        saved = manifest["hooks"][hook]
        moments = ActivationStore(Path(), manifest).moments(hook)
        lost = saved["rounding_fvu"] * float(moments.squared_deviation()) + added["lost"]
        if added["count"]:
            mean, deviation = (torch.tensor(added[key], dtype=torch.float64) for key in ("mean", "deviation"))
            moments.merge(added["count"], mean, deviation)
        spread = float(moments.squared_deviation())
        saved.update(
            count=moments.count,
            mean=moments.mean.tolist(),
            deviation=moments.deviation.tolist(),
            rounding_fvu=lost / spread if spread > 0 else 0.0,
        )
    manifest["cursor"] = record.end
    if "content" in manifest:
        manifest["content"]["text"] = record.read
    not_finite = manifest.get("skipped", {}).get(NOT_FINITE, 0) + record.n_left_out
    if record.n_left_out:
        manifest["left_out"] = manifest.get("left_out", {}) | {str(record.unit): record.n_left_out}
    if skipped := record.bad_texts | ({NOT_FINITE: not_finite} if not_finite else {}):
        manifest["skipped"] = skipped


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
