"""Foreign files, read without trusting them: no pickled object is built, no path leads out, no claimed size is believed.

What is large is mapped into memory where its file allows it: tensors are views of the file until somebody computes with
them.
"""

import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import read_tensors

# Configurations are small. What is larger than this is none.
CONFIG_BYTES = 1 << 24
# A folder with more files than this is no set of dictionaries.
MOST_FILES = 100_000
# How many times its size on disk an archive's member may claim: random numbers hardly compress.
MOST_COMPRESSION = 20
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class Header(NamedTuple):
    """What a file says of a tensor: torch's name of its dtype, its shape."""

    dtype: str
    shape: tuple[int, ...]


class Source:
    """Files below one directory, by their paths within it ("layer_3/cfg.json"); or a single file."""

    def __init__(self, root: str | Path, inside: str = ""):
        self.root = Path(root)
        self.inside = inside
        self._tensors: dict[str, dict[str, Any]] = {}

    def __str__(self) -> str:
        return str(self.root / self.inside) if self.inside else str(self.root)

    @property
    def name(self) -> str:
        """The last part of the path: in some formats it says which hook a dictionary is for."""
        return Path(self.inside or self.root.absolute()).name

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """All folders that hold files, themselves included as '', the shallowest first."""
        found = {str(PurePosixPath(name).parent) for name in self.files}
        return tuple(sorted(("" if folder == "." else folder for folder in found), key=lambda f: (f.count("/"), natural(f))))

    @property
    def remote(self) -> bool:
        """Whether looking into a file means fetching it."""
        return False

    @cached_property
    def files(self) -> tuple[str, ...]:
        """All of them, sorted."""
        return tuple(sorted(self._list()))

    def _list(self) -> Iterator[str]:
        base = self._base
        if base.is_file():
            yield base.name
            return
        count = 0
        for folder, folders, names in os.walk(base):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                count += 1
                if count > MOST_FILES:
                    raise ValueError(
                        f"{self}: expected a folder of dictionaries, got more than {MOST_FILES} files. Name a subfolder."
                    )
                if not name.startswith("."):
                    yield (Path(folder) / name).relative_to(base).as_posix()

    @property
    def _base(self) -> Path:
        return self.root / self.inside

    def at(self, folder: str) -> "Source":
        """The files below a folder.

        Raises:
            ValueError: If the name leads out of here.
        """
        return Source(self.root, _joined(self.inside, inner_path(folder, str(self))))

    def has(self, name: str) -> bool:
        return name in self.files

    def named(self, pattern: str) -> list[str]:
        """Files whose whole path matches a regular expression, in the order of the numbers in them."""
        return sorted((name for name in self.files if re.fullmatch(pattern, name)), key=natural)

    def path(self, name: str) -> Path:
        """Where a file is on this machine.

        Raises:
            ValueError: If it is not there, or its name or a link leads out of here.
        """
        name = inner_path(name, str(self))
        base = self._base
        path = base if base.is_file() and name == base.name else base / name
        if not path.is_file():
            raise ValueError(f"{path}: expected this file, found nothing there.")
        real, allowed = path.resolve(), [self.root.resolve() if self.root.is_dir() else self.root.resolve().parent]
        # The hub's cache keeps files under their hashes, and links them.
        allowed += [p.parent / "blobs" for p in self.root.absolute().parents if p.name == "snapshots"]
        if not any(real.is_relative_to(place.resolve()) for place in allowed) and not base.is_file():
            raise ValueError(f"{path}: expected a file in {self.root}, got a link out of it, to {real}. Copy the file there.")
        return path

    def json(self, name: str) -> Any:
        """A JSON file.

        Raises:
            ValueError: If there is none, or it is no JSON.
        """
        path = self.path(name)
        try:
            return json.loads(_text(path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: expected JSON, got something else ({error}). The file is damaged.") from None

    def config(self, name: str) -> dict[str, Any]:
        """A JSON or YAML file that holds a mapping.

        Raises:
            ValueError: If it holds something else.
        """
        value = self.yaml(name) if name.endswith((".yaml", ".yml")) else self.json(name)
        if not isinstance(value, dict):
            raise ValueError(f"{self.path(name)}: expected a mapping, got {type(value).__name__}.")
        return value

    def yaml(self, name: str) -> Any:
        """A YAML file: plain values only, no tags.

        Raises:
            ValueError: If there is none, or it is no YAML.
        """
        # Imported here: few formats have any.
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        path = self.path(name)
        try:
            return YAML(typ="safe", pure=True).load(_text(path))
        except (YAMLError, RecursionError) as error:
            raise ValueError(f"{path}: expected YAML, got something else ({' '.join(str(error).split())}).") from None

    def headers(self, name: str) -> dict[str, Header]:
        """The tensors of a file by name, without reading them; nested dictionaries of torch files are joined by dots."""
        path = self.path(name)
        if path.suffix == ".safetensors":
            return safetensors_headers(path)
        if path.suffix == ".npz":
            return {key: Header(str(dtype), shape) for key, (dtype, shape, _) in _npz_members(path).items()}
        return {key: Header(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in self.tensors(name).items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors, torch or npz file.

        Raises:
            ValueError: If the file is missing, damaged, or holds what may not be read.
        """
        return {key: value for key, value in self.values(name).items() if isinstance(value, Tensor)}

    def values(self, name: str) -> dict[str, Any]:
        """The same with the numbers and strings that torch files may hold besides."""
        if name not in self._tensors:
            path = self.path(name)
            if path.suffix == ".safetensors":
                found: dict[str, Any] = dict(read_tensors(path)[0])
            elif path.suffix == ".npz":
                found = dict(read_npz(path))
            elif path.suffix in TORCH_SUFFIXES:
                found = read_torch(path)
            else:
                raise ValueError(f"{path}: expected .safetensors, .npz or {', '.join(TORCH_SUFFIXES)}, got {path.suffix!r}.")
            self._tensors[name] = found
        return self._tensors[name]


class HubSource(Source):
    """A repository of the Hugging Face hub: files are fetched one by one, when they are asked for."""

    def __init__(self, repo_id: str, revision: str | None = None, inside: str = ""):
        super().__init__(repo_id, inside)
        self.repo_id, self.revision = repo_id, revision

    def at(self, folder: str) -> "HubSource":
        return HubSource(self.repo_id, self.revision, _joined(self.inside, inner_path(folder, str(self))))

    @property
    def remote(self) -> bool:
        return True

    def _list(self) -> Iterator[str]:
        prefix = f"{self.inside}/" if self.inside else ""
        for name in hub_files(self.repo_id, self.revision):
            if name.startswith(prefix):
                yield name.removeprefix(prefix)

    def path(self, name: str) -> Path:
        # Imported here: loading from disk must not need the hub's client.
        from huggingface_hub import hf_hub_download

        name = _joined(self.inside, inner_path(name, str(self)))
        try:
            return Path(hf_hub_download(self.repo_id, name, revision=self.revision))
        except Exception as error:  # noqa: BLE001
            # Offline, unknown, private: whatever the client raises, the user needs to know what was looked for.
            raise ValueError(f"{self.repo_id}/{name}: could not be had from the hub ({_one_line(error)}).") from None


def hub_files(repo_id: str, revision: str | None) -> list[str]:
    """The names of a repository's files, without network those that the cache has.

    Raises:
        ValueError: If neither the hub nor the cache knows the repository.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except Exception as error:  # noqa: BLE001
        reason = _one_line(error)
    try:
        cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception:  # noqa: BLE001
        raise ValueError(f"{repo_id}: the hub repository of that name could not be had ({reason}).") from None
    return list(Source(cached).files)


def inner_path(name: str, where: str) -> str:
    """A path given by somebody else, as one that stays inside.

    Raises:
        ValueError: If it is absolute or climbs.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name.startswith(("/", "~")) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{where}: expected a path within it, got {name!r}. Absolute paths and '..' are refused.")
    return "/".join(parts)


def natural(name: str) -> list[int | str]:
    """A key by which layer_10 comes after layer_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def safetensors_headers(path: Path) -> dict[str, Header]:
    """Names, dtypes and shapes; sizes that the file does not have are errors."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            dtypes = {key: str(piece.get_dtype()) for key, piece in slices.items()}
            return {k: Header(names.get(dtypes[k], dtypes[k]), tuple(s.get_shape())) for k, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged or foreign one ({error}).") from None


def read_torch(path: Path) -> dict[str, Any]:
    """A torch file that holds tensors, numbers and strings in dictionaries; inner ones are joined by dots.

    Raises:
        ValueError: If it holds objects, claims what it does not have, or is of a form older than torch 1.6.
    """
    _require_torch_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001
        # torch raises many types; nothing was executed.
        unsafe = "weights_only" in str(error) or "Unsupported" in str(error) or "GLOBAL" in str(error)
        what = "pickled Python objects, which are never loaded here" if unsafe else "a damaged file"
        fix = (
            " Where you trust it, save its tensors alone with the library that wrote it: "
            "safetensors.torch.save_file(torch.load(FILE)['state_dict'], 'weights.safetensors')."
            if unsafe
            else ""
        )
        raise ValueError(f"{path}: expected tensors, got {what} ({_one_line(error)}).{fix}") from None
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
    """A tensor that has as many numbers as it says, in main memory."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{path}: {name}: expected a plain tensor, got a {tensor.layout} one on {tensor.device}.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {name}: expected {tuple(tensor.shape)} numbers, got fewer in the file: a false claim of size."
        )
    return tensor


def _require_torch_zip(path: Path) -> None:
    """A torch file is an archive of uncompressed parts, so that it cannot unpack to more than it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, struct.error) as error:
        raise ValueError(
            f"{path}: expected a torch file (an archive, as torch writes since 1.6), got a damaged or older one ({error}). "
            "Load it where you trust it and save it again."
        ) from None
    if any(part.file_size != part.compress_size for part in parts) or sum(p.file_size for p in parts) > path.stat().st_size:
        raise ValueError(f"{path}: expected an archive of uncompressed parts, as torch writes, got one that unpacks to more.")


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz archive.

    Raises:
        ValueError: If an array holds objects, or claims more than the archive has.
    """
    members = _npz_members(path)
    found = {}
    with zipfile.ZipFile(path) as archive:
        for key, (dtype, shape, info) in members.items():
            if info.compress_type == zipfile.ZIP_STORED:
                # Read, not mapped: archives put numbers at odd addresses.
                array = np.fromfile(path, dtype, int(np.prod(shape)), offset=_npz_offset(path, info)).reshape(shape)
                found[key] = torch.from_numpy(array)
            else:
                try:
                    array = np.lib.format.read_array(io.BytesIO(archive.read(info)), allow_pickle=False)
                except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
                    raise ValueError(f"{path}: {key}: expected an array, got a damaged one ({error}).") from None
                found[key] = torch.from_numpy(array)
    return found


def _npz_members(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], zipfile.ZipInfo]]:
    """Dtype, shape and place of every array, checked against the archive before anything is allocated."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    dtype, shape, header = _npy_header(member)
                    size = dtype.itemsize * int(np.prod([int(side) for side in shape], dtype=object))
                if dtype.hasobject or dtype.kind not in "fiub":
                    raise ValueError(f"{key}: expected numbers, got {dtype}. Objects are never unpickled here")
                if header + size != info.file_size or info.file_size > MOST_COMPRESSION * max(info.compress_size, 1024):
                    raise ValueError(f"{key}: expected {size} bytes for {shape}, the archive has {info.file_size - header}")
                if info.compress_size > path.stat().st_size:
                    raise ValueError(f"{key}: expected no more than the file has")
                found[key] = (dtype, shape, info)
    except (zipfile.BadZipFile, OSError, struct.error, ValueError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path}: expected an npz archive of numbers, got a damaged or foreign one ({error}).") from None
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
    """Where an uncompressed array's numbers begin in the archive."""
    with path.open("rb") as handle:
        handle.seek(info.header_offset)
        local = handle.read(30)
        # The local header's own lengths of name and extra field, which may differ from the directory's.
        name, extra = struct.unpack("<HH", local[26:30])
        start = info.header_offset + 30 + name + extra
        handle.seek(start)
        _npy_header(handle)
        return handle.tell()


def _joined(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name


def _text(path: Path) -> str:
    if path.stat().st_size > CONFIG_BYTES:
        raise ValueError(f"{path}: expected a configuration of at most {CONFIG_BYTES} bytes, got {path.stat().st_size}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got something else ({error}). The file is damaged.") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
