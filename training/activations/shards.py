"""On-disk format of activations: safetensors shards and ``manifest.json``.

A shard holds, for ``n`` tokens of one split, ``x:HOOK`` (n, width) and, if gradients are stored, ``grad:HOOK`` for every
hook, and ``token``, ``document``, ``position`` (in the context) and ``offset`` (in the document), all int32 (n,). The target
of a transcoder is the ``x`` of its output hook. A tensor stored as int8 has scales ``scale:NAME`` (n, blocks) in float16.

A shard is complete or absent: it is written under a temporary name, synced and renamed, and only then added to the
manifest, which is replaced in the same way.
"""

import bisect
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from ...sae.files import DTYPES, sha256
from ...sae.kernels.parallel import has_numba
from ...sae.metrics import Moments
from ...sae.ranks import ALONE, Ranks
from .manifest import MANIFEST_FILE, read_manifest

LABELS = ("token", "document", "position", "offset")
# Definition of the stored gradients, recorded in the manifest.
GRADIENT_KIND = {
    "loss": "next_token_cross_entropy",
    "reduction": "sum over the predictions of a context within the token's document",
    "normalized": "no",
}


def gradient_dtype(dtype: str) -> str:
    """Return the dtype in which gradients are stored if activations are stored as ``dtype``.

    Gradients are often below 1e-6, where float16 has few digits left and int8's float16 scales none; bfloat16 has the range
    of float32.
    """
    return "bfloat16" if dtype in ("float16", "int8") else dtype


# Rows per read without numba: a block and its decoded copies fit in the CPU cache.
PLAIN_ROWS = 1024


def quantize_rows(
    rows: Float[Tensor, "tokens width"], block: int
) -> tuple[Int8[Tensor, "tokens width"], Float[Tensor, "tokens blocks"]]:
    """Return int8 codes, and a float16 scale for each run of ``block`` dimensions.

    The scale is rounded to float16 before it is used, so decoding is exact up to the int8 rounding.
    """
    tokens, width = rows.shape
    blocks = -(-width // block)
    padded = torch.nn.functional.pad(rows.float(), (0, blocks * block - width)).view(tokens, blocks, block)
    scale = _int8_scale(padded.abs().amax(-1))
    codes = (padded / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return codes.view(tokens, -1)[:, :width].contiguous(), scale


def dequantize(
    codes: Int8[Tensor, "tokens width"], scale: Float[Tensor, "tokens blocks"], block: int
) -> Float[Tensor, "tokens width"]:
    """Return the float32 rows that ``quantize_rows`` encoded."""
    return codes.float() * scale.float().repeat_interleave(block, dim=-1)[:, : codes.shape[1]]


def encode(
    rows: Float[Tensor, "tokens width"], dtype: str, block: int
) -> tuple[Tensor, Tensor | None, Float[Tensor, "tokens width"]]:
    """Return the stored form of finite float32 rows, its scales (int8 only), and the float32 rows that will be read back.

    With numba it uses none of torch's threads: they are busy running the language model.
    """
    if dtype == "float32":
        return rows, None, rows
    if dtype == "int8":
        return _encode_int8(rows, block)
    if dtype == "float16":
        # Overflow gives infinity, as in torch.
        with np.errstate(over="ignore"):
            stored = torch.from_numpy(rows.numpy().astype(np.float16))
        return stored, None, torch.from_numpy(stored.numpy().astype(np.float32))
    if not has_numba():
        stored = rows.bfloat16()
        return stored, None, stored.float()
    from ...sae.kernels.storing import to_bfloat16

    halves, restored = np.empty(rows.shape, np.int16), np.empty(rows.shape, np.float32)
    to_bfloat16(rows.numpy().view(np.uint32), halves.view(np.uint16), restored.view(np.uint32))
    return torch.from_numpy(halves).view(torch.bfloat16), None, torch.from_numpy(restored)


def _encode_int8(rows: Float[Tensor, "tokens width"], block: int) -> tuple[Tensor, Tensor, Tensor]:
    if not has_numba():
        codes, scale = quantize_rows(rows, block)
        return codes, scale, dequantize(codes, scale, block)
    from ...sae.kernels.storing import largest_of_blocks, to_int8

    tokens, width = rows.shape
    largest = np.empty((tokens, -(-width // block)), np.float32)
    largest_of_blocks(rows.numpy(), block, largest)
    scale = _int8_scale(torch.from_numpy(largest))
    codes, restored = np.empty((tokens, width), np.int8), np.empty((tokens, width), np.float32)
    to_int8(rows.numpy(), scale.numpy().astype(np.float32), block, codes, restored)
    return torch.from_numpy(codes), scale, torch.from_numpy(restored)


def _int8_scale(largest: Float[Tensor, "tokens blocks"]) -> Float[Tensor, "tokens blocks"]:
    """Return the float16 scales of blocks, given their largest absolute values."""
    if bool((largest > 127 * 65000.0).any()):
        raise ValueError("harvest.dtype: int8 cannot hold activations above 8 million. Use bfloat16.")
    # Rounded up, so that the largest entry stays within 127 steps; the floor keeps subnormal scales from being 0.
    return (largest / 127 * (1 + 2**-10)).clamp_min(6e-8).half()


class ActivationStore:
    """Directory of shards, complete or still being harvested.

    Args:
        address: Place of the store as the recipe names it, for a URL of which ``directory`` is a copy.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], address: str | None = None):
        self.directory = directory
        self.manifest = manifest
        self.address = address or str(directory)

    @classmethod
    def open(cls, directory: str | Path) -> "ActivationStore":
        """Open the store at ``directory``.

        Raises:
            ValueError: If there is none, or its manifest is damaged or of another version.
        """
        return cls(Path(directory), read_manifest(Path(directory)))

    def tokens(self, split: str) -> int:
        """Return the number of stored tokens of a split."""
        return sum(shard["tokens"] for shard in self.shards(split))

    def shards(self, split: str) -> list[dict[str, Any]]:
        return [shard for shard in self.manifest["shards"] if shard["split"] == split]

    def width(self, hook: str) -> int:
        return self.manifest["hooks"][hook]["width"]

    def moments(self, hook: str) -> Moments:
        """Return count, mean and deviation of the training split at a hook, as normalization needs them."""
        saved = self.manifest["hooks"][hook]
        moments = Moments(saved["width"])
        if saved["count"]:
            mean, deviation = (torch.tensor(saved[key], dtype=torch.float64) for key in ("mean", "deviation"))
            moments.merge(saved["count"], mean, deviation)
        return moments

    def moments_of(self, hooks: tuple[str, ...]) -> Moments:
        """Return the moments of several hooks, concatenated along the feature axis."""
        parts = [self.moments(hook) for hook in hooks]
        together = Moments(sum(len(part.mean) for part in parts))
        if parts[0].count:
            mean, deviation = (torch.cat([getattr(part, key) for part in parts]) for key in ("mean", "deviation"))
            together.merge(parts[0].count, mean, deviation)
        return together

    def require_hooks(self, key: str, hooks: tuple[str, ...]) -> None:
        """Raise ``ValueError``, naming the recipe's ``key``, if the store lacks any of these hooks."""
        missing = [hook for hook in hooks if hook not in self.manifest["hooks"]]
        if missing:
            raise ValueError(
                f"{key}: {', '.join(missing)} is not in {self.directory}, which holds {', '.join(self.manifest['hooks'])}. "
                "Choose a new harvest.store and run: sparsary harvest RECIPE"
            )

    def problems(self, rank: int = 0, ranks: int = 1) -> list[str]:
        """Return one line for every shard that is missing or differs from its checksum.

        Args:
            rank, ranks: Check only every ``ranks``-th shard, from number ``rank`` on.
        """
        # Hashing leaves Python's lock to others.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return [problem for problem in pool.map(self._problem, self.manifest["shards"][rank::ranks]) if problem]

    def _problem(self, shard: dict[str, Any]) -> str:
        """Return a line if a shard is missing or differs from its checksum, else an empty string."""
        path = self.directory / shard["name"]
        if not path.is_file():
            return f"{path}: missing."
        if path.stat().st_size != shard["bytes"]:
            return f"{path}: expected {shard['bytes']} bytes, got {path.stat().st_size}: truncated or replaced."
        if sha256(path) != shard["sha256"]:
            return f"{path}: contents differ from the checksum in {MANIFEST_FILE}: damaged."
        return ""

    def verify(self, ranks: Ranks = ALONE) -> None:
        """Raise ``ValueError`` naming every damaged shard.

        Args:
            ranks: Processes that each check a part of the shards; all of them raise.
        """
        parts = ranks.gather_objects(self.problems(ranks.rank, ranks.size))
        if problems := sorted(line for part in parts for line in part):
            raise ValueError("\n".join([*problems, "Delete the store's directory and harvest again."]))


class RowReader:
    """Random access to the rows of one tensor across the shards of a split, in float32 (labels: int32).

    Rows are read one by one through ``pread``: nothing stays mapped, so memory does not grow with the store, and a truncated
    file raises an error instead of a signal.
    """

    def __init__(self, store: ActivationStore, split: str, name: str):
        self.name = name
        self.block: int = store.manifest["block"]
        self.shards = [_ShardTensor(store.directory / shard["name"], name) for shard in store.shards(split)]
        for shard in self.shards:
            first = self.shards[0]
            if (shard.dtype, shard.row_shape) != (first.dtype, first.row_shape):
                raise ValueError(
                    f"{shard.path}: {name}: expected rows of {first.dtype} {first.row_shape}, as in {first.path.name}, got "
                    f"{shard.dtype} {shard.row_shape}. Delete the store and harvest again."
                )
        quantized = bool(self.shards) and self.shards[0].dtype == torch.int8
        self.scales = RowReader(store, split, f"scale:{name}") if quantized else None
        if self.scales is not None:
            self._require_scales(self.scales)
        self.ends = np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)

    def _require_scales(self, scales: "RowReader") -> None:
        """Raise ``ValueError`` unless every int8 row has a float16 scale for each of its blocks."""
        for shard, scale in zip(self.shards, scales.shards, strict=True):
            wanted = [-(-width // self.block) for width in shard.row_shape]
            if (scale.dtype, scale.rows, scale.row_shape) != (torch.float16, shard.rows, wanted) or len(wanted) != 1:
                raise ValueError(
                    f"{shard.path}: {scales.name}: expected float16 {[shard.rows, *wanted]}, got {scale.dtype} "
                    f"{[scale.rows, *scale.row_shape]}. Delete the store and harvest again."
                )

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.shards else 0

    @property
    def width(self) -> int:
        return self.shards[0].row_shape[0] if self.shards else 0

    def gather(self, rows: np.ndarray) -> Tensor:
        """Return the rows at these indices, in this order."""
        out = self.empty(len(rows))
        self.read(rows, out)
        return torch.from_numpy(out)

    def empty(self, rows: int) -> np.ndarray:
        """Return uninitialized memory for decoded rows."""
        first = self.shards[0]
        return np.empty((rows, *first.row_shape), np.int32 if first.dtype == torch.int32 else np.float32)

    def read(self, rows: np.ndarray, out: np.ndarray) -> bool:
        """Read the rows at these indices, in this order, into ``out``; return True if every number is finite.

        Raises:
            ValueError: If a shard ends too early; the message names file and row.
        """
        finite = True
        scales = None
        if self.scales is not None:
            scales = self.scales.empty(len(rows))
            finite = self.scales.read(rows, scales)
        # In ascending order, consecutive reads hit neighboring pages.
        places = np.argsort(rows)
        ascending = rows[places]
        bounds = np.searchsorted(ascending, self.ends)
        begin, first = 0, 0
        for shard, bound, end in zip(self.shards, bounds.tolist(), self.ends.tolist(), strict=True):
            if bound > begin:
                part = slice(begin, bound)
                finite &= shard.read(ascending[part] - first, places[part], out, scales, self.block)
            begin, first = bound, end
        return finite

    def locate(self, row: int) -> tuple[Path, int]:
        """Return the shard that holds a row, and the row's index in it."""
        number = bisect.bisect_right(self.ends, row)
        return self.shards[number].path, row - (int(self.ends[number - 1]) if number else 0)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()
        if self.scales is not None:
            self.scales.close()


class ColumnReader:
    """Random access to several tensors of a split, concatenated along the feature axis."""

    def __init__(self, store: ActivationStore, split: str, names: list[str]):
        self.parts = [RowReader(store, split, name) for name in names]

    def __len__(self) -> int:
        return len(self.parts[0])

    def gather(self, rows: np.ndarray) -> Tensor:
        """Return the rows at these indices, in this order."""
        out = self.empty(len(rows))
        self.read(rows, out)
        return torch.from_numpy(out)

    def empty(self, rows: int) -> np.ndarray:
        """Return uninitialized memory for decoded rows."""
        return np.empty((rows, sum(part.width for part in self.parts)), np.float32)

    def read(self, rows: np.ndarray, out: np.ndarray) -> bool:
        """Read the rows at these indices, in this order, into ``out``; return True if every number is finite."""
        if len(self.parts) == 1:
            return self.parts[0].read(rows, out)
        finite, first = True, 0
        for part in self.parts:
            # Readers write to contiguous memory.
            values = part.empty(len(rows))
            finite &= part.read(rows, values)
            out[:, first : first + part.width] = values
            first += part.width
        return finite

    def locate(self, row: int, column: int) -> tuple[Path, str, int]:
        """Return the shard that holds an entry, the name of its tensor, and its row in the shard."""
        for part in self.parts:
            if column < part.width:
                path, there = part.locate(row)
                return path, part.name, there
            column -= part.width
        raise IndexError(column)

    def close(self) -> None:
        for part in self.parts:
            part.close()


class _ShardTensor:
    """Location of one tensor in a safetensors file."""

    def __init__(self, path: Path, name: str):
        self.path, self.descriptor = path, -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
            self._read_header(name)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self.close()
            raise ValueError(f"{path}: expected a shard with the tensor {name!r} ({type(error).__name__}: {error}).") from None

    def _read_header(self, name: str) -> None:
        """Read where the tensor lies. Compiled code relies on it, so nothing in it is taken on trust."""
        header_bytes = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        if header_bytes > os.fstat(self.descriptor).st_size:
            raise ValueError("the header is longer than the file")
        entry = json.loads(os.pread(self.descriptor, header_bytes, 8))[name]
        start, end = entry["data_offsets"]
        self.dtype = DTYPES[entry["dtype"]]
        self.rows, *self.row_shape = entry["shape"]
        sizes = (start, end, self.rows, *self.row_shape)
        if not all(isinstance(size, int) and 0 <= size < 1 << 62 for size in sizes) or len(self.row_shape) > 1:
            raise ValueError(f"shape {entry['shape']} at {entry['data_offsets']}")
        self.row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        if self.rows * self.row_bytes != end - start:
            raise ValueError(f"{self.dtype} {entry['shape']} in {end - start} bytes")
        self.start = 8 + header_bytes + start

    def read(self, rows: np.ndarray, places: np.ndarray, out: np.ndarray, scales: np.ndarray | None, block: int) -> bool:
        """Decode the ascending ``rows`` into ``out[places]``; return True if every number is finite."""
        done, finite = 0, True
        if has_numba() and self.row_bytes:
            done, finite = self._read_compiled(rows, places, out, scales, block)
        # Without numba all rows; else those from the first failed read on, to raise an error that explains it.
        for begin in range(done, len(rows), PLAIN_ROWS):
            part = slice(begin, begin + PLAIN_ROWS)
            finite &= self._read_plain(rows[part], places[part], out, scales, block)
        return finite

    def _read_compiled(
        self, rows: np.ndarray, places: np.ndarray, out: np.ndarray, scales: np.ndarray | None, block: int
    ) -> tuple[int, bool]:
        # Imported on first use: the compiler takes a second.
        from ...sae.kernels import reading

        scratch = np.empty(max(reading.SCRATCH_BYTES, self.row_bytes), np.uint8)
        where = (self.descriptor, self.start, self.row_bytes, rows, places)
        match self.dtype:
            case torch.float32:
                done, finite = reading.read_float32(*where, out.view(np.uint32), scratch)
            case torch.bfloat16:
                done, finite = reading.read_bfloat16(*where, out.view(np.uint32), scratch)
            case torch.float16:
                done, finite = reading.read_float16(*where, out, scratch, _float16_values())
            case torch.int8:
                done, finite = reading.read_int8(*where, out, scratch, scales, block)
            case _:
                done, finite = reading.read_bytes(*where, out.view(np.uint8).reshape(len(out), -1), scratch)
        return done, bool(finite)

    def _read_plain(self, rows: np.ndarray, places: np.ndarray, out: np.ndarray, scales: np.ndarray | None, block: int) -> bool:
        size, start, descriptor, preadv = self.row_bytes, self.start, self.descriptor, os.preadv
        raw = np.empty((len(rows), size), np.uint8)
        view = raw.reshape(-1).data
        for i, row in enumerate(rows.tolist()):
            try:
                found = preadv(descriptor, [view[i * size : (i + 1) * size]], start + row * size)
            except OSError as error:
                raise ValueError(
                    f"{self.path}: row {row} could not be read ({error.strerror}). Check the disk; the same command continues."
                ) from None
            if found != size:
                raise ValueError(
                    f"{self.path}: row {row}: the file ends too early: truncated. Delete the store and harvest again."
                )
        values = torch.from_numpy(raw.reshape(-1)).view(self.dtype).view(len(rows), *self.row_shape)
        if scales is not None:
            values = dequantize(values, torch.from_numpy(scales[places]), block)
        # NumPy rather than torch, which would start threads of its own in this background thread.
        decoded = values.float().numpy() if values.is_floating_point() else values.numpy()
        out[places] = decoded
        return bool(np.isfinite(decoded).all())

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@cache
def _float16_values() -> np.ndarray:
    """Return the float32 value of every float16 bit pattern."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
