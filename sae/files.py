"""Atomic file writes, and safetensors reading with actionable errors."""

import hashlib
import itertools
import json
import math
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import writing

# safetensors names of torch dtypes, in its order of tensors in a file: widest first, which keeps all of them aligned.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Entry of a JSON file with the CRC-32 of all others.
CHECKSUM = "checksum"
# Metadata entry with the CRC-32 of a file in which it is blank: it finds bits that the disk or a copy flipped.
SEAL, BLANK_SEAL = "crc32", "00000000"
# Bytes hashed and written at a time, few enough to stay in the processor's cache in between.
CHUNK_BYTES = 1 << 18


def at_home(path: str) -> str:
    """Return a path with a leading ``~`` replaced by the home directory, as shells do.

    >>> at_home("runs/~topk")
    'runs/~topk'
    """
    # Unlike pathlib's, it leaves names of unknown users alone.
    return os.path.expanduser(path)


def natural_order(name: str) -> list[int | str]:
    """Return a sort key that puts layer 10 after layer 9.

    >>> sorted(["h.10:out", "h.9:out"], key=natural_order)
    ['h.9:out', 'h.10:out']
    """
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to ``path``, otherwise removed.

    Raises:
        WriteError: If it could not be written; the previous file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        # On a failing disk the first error is more informative than this one.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """Delete partial files left by a killed process."""
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, without the byte order mark that some editors write.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got other bytes ({error.reason} at byte {error.start}). Save it as UTF-8 (iconv "
            "-f LATIN1 -t UTF-8, if it is Latin-1)."
        ) from None


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, sealed: bool = False, compact: bool = False) -> None:
    """Write indented JSON; NaN and infinities, which JSON cannot represent, are rejected.

    Args:
        sealed: Add the entry ``checksum`` to the mapping, which ``read_json`` checks.
        compact: Write it on one line, with the characters of other scripts as they are.
    """
    style: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":")} if compact else {"indent": 2}
    text = json.dumps(value, allow_nan=False, **style)
    if sealed:
        # Of the values as they are read: keys are strings then, and tuples lists.
        text = json.dumps(dict(value) | {CHECKSUM: json_checksum(json.loads(text))}, **style)
    write_text(path, text + "\n")


def json_checksum(values: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a mapping's values, however they are laid out in a file."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file, without the checksum of a sealed mapping.

    Raises:
        ValueError: If the file is missing, is not JSON, or differs from its checksum.
    """
    value = read_unsealed_json(path)
    if isinstance(value, dict) and isinstance(checksum := value.get(CHECKSUM), str):
        del value[CHECKSUM]
        if (found := json_checksum(value)) != checksum:
            raise ValueError(
                f"{path}: expected the {CHECKSUM} {checksum[:40]!r} that it names, got {found}: the file is damaged, or was "
                f"edited. Restore it from a backup or make it again; if you edited it, delete its entry {CHECKSUM!r}."
            )
    return value


def read_unsealed_json(path: Path) -> Any:
    """Return the contents of a JSON file as they are, with a checksum that is not checked.

    Raises:
        ValueError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected this file, found none.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got invalid JSON ({error}). The file is damaged.") from None
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got brackets nested hundreds deep. The file is damaged.") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], metadata: Mapping[str, str], sealed: bool = False
) -> str:
    """Write one safetensors file atomically and return its sha256.

    Several tensors under one name are concatenated along the first axis. The bytes equal those of
    ``safetensors.torch.save_file``, but are hashed while being written, and Python's lock is released meanwhile.

    Args:
        sealed: Add a checksum of the file to its metadata, which ``read_tensors`` checks.

    Raises:
        WriteError: If it could not be written; the previous file is unchanged.
    """
    if sealed:
        metadata = dict(metadata) | {SEAL: BLANK_SEAL}
    parts = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in tensors.items()}
    names = sorted(parts, key=lambda name: (list(DTYPES.values()).index(parts[name][0].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        first = parts[name][0]
        begin, end = end, end + sum(part.nbytes for part in parts[name])
        shape = list(first.shape) if len(parts[name]) == 1 else [sum(map(len, parts[name])), *first.shape[1:]]
        dtype = next(key for key, value in DTYPES.items() if value == first.dtype)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as handle:
        if sealed:
            checksum = zlib.crc32(text)
            for part in (part for name in names for part in parts[name]):
                checksum = zlib.crc32(_memory(part), checksum)
            text = text.replace(_seal(BLANK_SEAL), _seal(f"{checksum:08x}"), 1)
        data = (_memory(part) for name in names for part in parts[name])
        for piece in itertools.chain([len(text).to_bytes(8, "little"), text], data):
            for begin in range(0, len(piece), CHUNK_BYTES):
                chunk = piece[begin : begin + CHUNK_BYTES]
                digest.update(chunk)
                handle.write(chunk)
    return digest.hexdigest()


def _seal(checksum: str) -> bytes:
    """Return the header's entry of a checksum."""
    return f'"{SEAL}":"{checksum}"'.encode()


def _require_seal(path: Path, checksum: str) -> None:
    """Raise ``ValueError`` if a file does not have the CRC-32 in its header."""
    if (found := _checksum_of(path, checksum)) != checksum:
        raise ValueError(
            f"{path}: expected the checksum {checksum} in its header, got {found}: the file is damaged. Restore it from a "
            "backup, or make it again."
        )


def _checksum_of(path: Path, checksum: str) -> str:
    """Return the CRC-32 of a file, taken with the entry of this checksum in its header blank."""
    with path.open("rb") as handle:
        header = handle.read(int.from_bytes(handle.read(8), "little"))
        found = zlib.crc32(header.replace(_seal(checksum), _seal(BLANK_SEAL), 1))
        while chunk := handle.read(CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"


def is_whole(path: Path) -> bool:
    """Return False if a file of tensors differs from the checksum in its header; True for a file without one."""
    try:
        with safe_open(path, framework="pt") as handle:
            checksum = (handle.metadata() or {}).get(SEAL)
        return checksum is None or _checksum_of(path, checksum) == checksum
    except (SafetensorError, OSError):
        return False


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a file, and its metadata.

    Raises:
        ValueError: If the file is missing, truncated, or not safetensors, or its checksum differs from that in its header.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if SEAL in metadata:
                _require_seal(path, metadata[SEAL])
            return {name: handle.get_tensor(name) for name in handle.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: expected this file, found none.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged file or another format ({error}).") from None


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` naming the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise ValueError(f"{path}: {name}: expected finite numbers, got {float(tensor[tuple(bad)])} at {bad}.")


def file_crc32(path: Path, bytes_: int | None = None) -> str:
    """Return the CRC-32 of a file, or of its first bytes."""
    found, left = 0, path.stat().st_size if bytes_ is None else bytes_
    with path.open("rb") as handle:
        while left > 0 and (chunk := handle.read(min(CHUNK_BYTES, left))):
            found, left = zlib.crc32(chunk, found), left - len(chunk)
    return f"{found:08x}"


def require_crc32(path: Path, expected: str | None, beside: str) -> None:
    """Raise ``ValueError`` if a file differs from the checksum that another one names; without one, do nothing."""
    if expected is not None and (found := file_crc32(path)) != expected:
        raise ValueError(
            f"{path}: expected the checksum {expected}, as {beside} names it, got {found}: the file is damaged, was edited, or "
            "the command that writes both was interrupted. Run it again, or restore both from a backup."
        )


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_number(value: float) -> float | None:
    """Return the number, or ``None`` (JSON ``null``) if it is not finite."""
    return float(value) if math.isfinite(value) else None
