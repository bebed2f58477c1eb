"""Safe readers of torch and numpy archives: they build no objects and verify every declared size.

``torch.load(weights_only=True)`` alone is not enough: it builds no objects, but decompresses a pickle to any size, and a
stride of zero lets four bytes pass for four gigabytes of numbers.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Highest accepted compression ratio of an archive member: weights hardly compress.
MOST_COMPRESSION = 20


def read_torch(path: Path) -> dict[str, Any]:
    """Read a torch file of tensors, numbers, and strings; keys of nested dictionaries are joined by dots.

    Raises:
        ValueError: If it contains pickled objects, declares more data than it has, or was written before torch 1.6.
    """
    _require_torch_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001
        # torch raises many exception types; nothing was executed.
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error) or "GLOBAL" in str(error)
        what = "pickled Python objects, which are never loaded here" if unsafe else "a damaged file"
        fix = (
            " If you trust it, save its tensors alone with the library that wrote it: "
            "safetensors.torch.save_file(torch.load(FILE)['state_dict'], 'weights.safetensors')."
            if unsafe
            else ""
        )
        raise ValueError(f"{path}: expected tensors, got {what} ({one_line(error)}).{fix}") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}.")
    return dict(_flat(loaded, path))


def _flat(values: Mapping[Any, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, path, f"{name}.")
        elif isinstance(value, Tensor):
            yield name, _plain(value, name, path)
        elif value is None or isinstance(value, (bool, int, float, str, list, tuple)):
            yield name, value


def _plain(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Require a dense CPU tensor whose storage is as large as its shape implies."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{path}: {name}: expected a plain tensor, got a {tensor.layout} one on {tensor.device}.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {name}: expected {tuple(tensor.shape)} numbers, got fewer in the file. The file is damaged.")
    return tensor


def _require_torch_zip(path: Path) -> None:
    """Require an archive of uncompressed parts, which cannot expand beyond its size on disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, struct.error, NotImplementedError) as error:
        raise ValueError(
            f"{path}: expected a torch file (an archive, as torch writes since 1.6), got a damaged or older one ({error}). "
            "If you trust it, load it with torch and save it again."
        ) from None
    if any(part.file_size != part.compress_size for part in parts) or sum(p.file_size for p in parts) > path.stat().st_size:
        raise ValueError(f"{path}: expected an archive of uncompressed parts, as torch writes, got one that unpacks to more.")


def read_npz(path: Path) -> dict[str, Tensor]:
    """Read the arrays of an npz archive.

    Raises:
        ValueError: If an array contains objects, or declares more data than the archive has.
    """
    members = npz_members(path)
    found = {}
    with zipfile.ZipFile(path) as archive:
        for key, (dtype, shape, info) in members.items():
            if info.compress_type == zipfile.ZIP_STORED:
                # Read instead of memory-mapped: arrays in archives are not aligned.
                array = np.fromfile(path, dtype, int(np.prod(shape)), offset=_npz_offset(path, info)).reshape(shape)
                found[key] = torch.from_numpy(array)
            else:
                try:
                    array = np.lib.format.read_array(io.BytesIO(archive.read(info)), allow_pickle=False)
                except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError) as error:
                    raise ValueError(f"{path}: {key}: expected an array, got a damaged one ({error}).") from None
                found[key] = torch.from_numpy(array)
    return found


def npz_members(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], zipfile.ZipInfo]]:
    """Return dtype, shape, and archive entry of each array, checked against the archive before anything is allocated."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    dtype, shape, header = _npy_header(member)
                    size = dtype.itemsize * int(np.prod([int(side) for side in shape], dtype=object))
                if dtype.hasobject or dtype.kind not in "fiub":
                    raise ValueError(f"{key}: expected numbers, got {dtype}. Objects are not unpickled")
                if header + size != info.file_size or info.file_size > MOST_COMPRESSION * max(info.compress_size, 1024):
                    raise ValueError(f"{key}: expected {size} bytes for {shape}, the archive has {info.file_size - header}")
                if info.compress_size > path.stat().st_size:
                    raise ValueError(f"{key}: expected at most the size of the file, got {info.compress_size} bytes")
                found[key] = (dtype, shape, info)
    except (zipfile.BadZipFile, zlib.error, OSError, struct.error, ValueError, EOFError, RuntimeError) as error:
        # RuntimeError: an encrypted member, or an unknown compression.
        raise ValueError(
            f"{path}: expected an npz archive of numbers, got a damaged file or another format ({error})."
        ) from None
    return found


def _npy_header(member: Any) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    version = np.lib.format.read_magic(member)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"npy version {version}")
    shape, fortran, dtype = reader(member)
    if fortran and len(shape) > 1:
        raise ValueError("an array in Fortran's order")
    return dtype, shape, member.tell()


def _npz_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the file offset of an uncompressed array's data."""
    with path.open("rb") as handle:
        handle.seek(info.header_offset)
        local = handle.read(30)
        # Name and extra field lengths from the local header; those of the central directory may differ.
        name, extra = struct.unpack("<HH", local[26:30])
        start = info.header_offset + 30 + name + extra
        handle.seek(start)
        _npy_header(handle)
        return handle.tell()


def one_line(error: Exception) -> str:
    """Return an error's message on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300]
