"""The on-disk format of activations: safetensors shards and ``manifest.json``.

A shard holds, for ``n`` tokens of one split, ``x:HOOK`` (n, width) for every hook, with gradients ``grad:HOOK``, and
``token``, ``document``, ``position`` (in the context) and ``offset`` (in the document), all int32 (n,). A transcoder's
target is the ``x`` of its other hook. Stored as int8, a tensor comes with ``scale:NAME`` (n, blocks) float16.

A shard is complete or absent: it is written under a temporary name, synced and renamed, and only then entered in the
manifest, which is replaced in the same way.
"""

import bisect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sae.files import read_json, sha256
from sae.metrics import Moments

FORMAT = "sparsary-store"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
LABELS = ("token", "document", "position", "offset")

# safetensors' names of the dtypes that shards use.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "I32": torch.int32}


def quantize(
    rows: Float[Tensor, "tokens width"], block: int
) -> tuple[Int8[Tensor, "tokens width"], Float[Tensor, "tokens blocks"]]:
    """int8 codes and the scale of each run of ``block`` dimensions, float16.

    The scale is rounded to float16 before it is used, so decoding is exact up to the int8 rounding.
    """
    tokens, width = rows.shape
    blocks = -(-width // block)
    padded = torch.nn.functional.pad(rows.float(), (0, blocks * block - width)).view(tokens, blocks, block)
    largest = padded.abs().amax(-1)
    if bool((largest > 127 * 65000.0).any()):
        raise ValueError("harvest.dtype: int8 cannot hold activations above 8 million. Use bfloat16.")
    # Rounded up, so that the largest entry stays within 127 steps; the floor keeps subnormal scales from being 0.
    scale = (largest / 127 * (1 + 2**-10)).clamp_min(6e-8).half()
    codes = (padded / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return codes.view(tokens, -1)[:, :width].contiguous(), scale


def dequantize(
    codes: Int8[Tensor, "tokens width"], scale: Float[Tensor, "tokens blocks"], block: int
) -> Float[Tensor, "tokens width"]:
    """The float32 rows that ``quantize`` encoded."""
    return codes.float() * scale.float().repeat_interleave(block, dim=-1)[:, : codes.shape[1]]


class Store:
    """A directory of shards, complete or still being harvested."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: str | Path) -> "Store":
        """The store at ``directory``.

        Raises:
            ValueError: If there is none, or its manifest is damaged or of another version.
        """
        path = Path(directory) / MANIFEST_FILE
        if not path.is_file():
            raise ValueError(
                f"{directory}: expected an activation store, found no {MANIFEST_FILE}. Make one with `sparsary harvest`."
            )
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: format: expected {FORMAT!r}. This is not an activation store.")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version: expected {FORMAT_VERSION}, got {manifest.get('format_version')!r}.")
        return cls(Path(directory), manifest)

    def tokens(self, split: str) -> int:
        """Stored tokens of a split."""
        return sum(shard["tokens"] for shard in self.shards(split))

    def shards(self, split: str) -> list[dict[str, Any]]:
        return [shard for shard in self.manifest["shards"] if shard["split"] == split]

    def width(self, hook: str) -> int:
        return self.manifest["hooks"][hook]["width"]

    def moments(self, hook: str) -> Moments:
        """Count, mean and deviation of the training split at a hook: what a normaliser needs."""
        saved = self.manifest["hooks"][hook]
        moments = Moments(saved["width"])
        if saved["count"]:
            mean, deviation = (torch.tensor(saved[key], dtype=torch.float64) for key in ("mean", "deviation"))
            moments.merge(saved["count"], mean, deviation)
        return moments

    def problems(self) -> list[str]:
        """One line for every shard that is missing or differs from its checksum."""
        found = []
        for shard in self.manifest["shards"]:
            path = self.directory / shard["name"]
            if not path.is_file():
                found.append(f"{path}: missing.")
            elif path.stat().st_size != shard["bytes"]:
                found.append(f"{path}: expected {shard['bytes']} bytes, got {path.stat().st_size}: truncated or replaced.")
            elif sha256(path) != shard["sha256"]:
                found.append(f"{path}: contents differ from the checksum in {MANIFEST_FILE}: damaged.")
        return found

    def verify(self) -> None:
        """Raise ``ValueError`` naming every damaged shard."""
        problems = self.problems()
        if problems:
            raise ValueError("\n".join([*problems, "Delete the store's directory and harvest again."]))


class Rows:
    """Random access to the rows of one tensor across the shards of a split, in float32 (labels: int32).

    Reads go row by row through ``pread``: nothing stays mapped, so memory does not grow with the store.
    """

    def __init__(self, store: Store, split: str, name: str):
        self.name = name
        self.block: int = store.manifest["block"]
        self.shards = [_ShardTensor(store.directory / shard["name"], name) for shard in store.shards(split)]
        quantized = bool(self.shards) and self.shards[0].dtype == torch.int8
        self.scales = Rows(store, split, f"scale:{name}") if quantized else None
        self.ends = np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.shards else 0

    def gather(self, rows: np.ndarray) -> Tensor:
        """The rows at these indices, in this order."""
        first = self.shards[0]
        raw = np.empty((len(rows), first.row_bytes), np.uint8)
        # Ascending order: neighbouring reads hit neighbouring pages.
        order = np.argsort(rows, kind="stable")
        owner = np.searchsorted(self.ends, rows[order], side="right")
        begins = np.concatenate([[0], self.ends[:-1]])
        offsets = rows[order] - begins[owner]
        view = raw.reshape(-1).data
        bounds = np.searchsorted(owner, np.arange(len(self.shards) + 1))
        for number in np.unique(owner):
            here = slice(bounds[number], bounds[number + 1])
            self.shards[number].read(offsets[here].tolist(), order[here].tolist(), view)
        values = torch.from_numpy(raw.reshape(-1)).view(first.dtype).view(len(rows), *first.row_shape)
        if self.scales is not None:
            return dequantize(values, self.scales.gather(rows), self.block)
        return values.float() if values.is_floating_point() else values

    def locate(self, row: int) -> tuple[Path, int]:
        """The shard that holds a row, and the row's index in it."""
        number = bisect.bisect_right(self.ends, row)
        return self.shards[number].path, row - (int(self.ends[number - 1]) if number else 0)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()
        if self.scales is not None:
            self.scales.close()


class _ShardTensor:
    """Where one tensor lies in one safetensors file."""

    def __init__(self, path: Path, name: str):
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
            header_bytes = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
            entry = json.loads(os.pread(self.descriptor, header_bytes, 8))[name]
        except (OSError, ValueError, KeyError, OverflowError) as error:
            raise ValueError(f"{path}: expected a shard with the tensor {name!r} ({type(error).__name__}: {error}).") from None
        start, end = entry["data_offsets"]
        self.dtype = DTYPES[entry["dtype"]]
        self.rows, *self.row_shape = entry["shape"]
        self.row_bytes = (end - start) // max(self.rows, 1)
        self.start = 8 + header_bytes + start

    def read(self, rows: list[int], places: list[int], view: memoryview) -> None:
        """Read each row into its place of ``view``, which is laid out in rows of the same size."""
        size, start, descriptor, preadv = self.row_bytes, self.start, self.descriptor, os.preadv
        for row, place in zip(rows, places, strict=True):
            got = preadv(descriptor, [view[place * size : (place + 1) * size]], start + row * size)
            if got != size:
                raise ValueError(
                    f"{self.path}: row {row}: the file ends too early: truncated. Delete the store and harvest again."
                )

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
