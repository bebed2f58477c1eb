"""Safe access to untrusted third-party files: no unpickling of objects, no paths outside the folder, no trusted sizes.

Large tensors are memory-mapped where the file type allows it, so they stay views of the file until they are used.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..extras import needs
from ..files import natural_order, read_tensors
from .archives import npz_members, one_line, read_npz, read_torch
from .unwrapping import unwrapped

# Configurations are small; larger files are rejected.
CONFIG_BYTES = 1 << 24
# A folder with more files than this is not a set of dictionaries.
MOST_FILES = 100_000
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


# Collects the paths of opened files inside `recording()`.
_recorder: ContextVar[list[Path] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[list[Path]]:
    """Yield a list that collects the paths of files opened in this context, in order and with repetitions."""
    opened: list[Path] = []
    token = _recorder.set(opened)
    try:
        yield opened
    finally:
        _recorder.reset(token)


def _recorded(path: Path) -> Path:
    opened = _recorder.get()
    if opened is not None:
        opened.append(path)
    return path


class Header(NamedTuple):
    """Dtype (torch's name) and shape of a tensor, as declared in a file."""

    dtype: str
    shape: tuple[int, ...]


class SourceFiles:
    """Files below one directory, addressed by relative path ("layer_3/cfg.json"), or a single file."""

    def __init__(self, root: str | Path, inside: str = ""):
        self.root = Path(root)
        self.inside = inside
        self._tensors: dict[str, dict[str, Any]] = {}
        # Notes on prefixes stripped from tensor names, in order.
        self.unwrapped: dict[str, None] = {}

    def __str__(self) -> str:
        return str(self.root / self.inside) if self.inside else str(self.root)

    @property
    def name(self) -> str:
        """Last part of the path; in some formats it names the dictionary's hook."""
        return Path(self.inside or self.root.absolute()).name

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """All folders that contain files, shallowest first; the root itself is ''."""
        found = {str(PurePosixPath(name).parent) for name in self.files}
        paths = ("" if folder == "." else folder for folder in found)
        return tuple(sorted(paths, key=lambda path: (path.count("/"), natural_order(path))))

    @property
    def remote(self) -> bool:
        """True if opening a file downloads it."""
        return False

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Relative paths of all files, sorted."""
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

    def at(self, folder: str) -> "SourceFiles":
        """Return the files below a subfolder.

        Raises:
            ValueError: If the path leads outside this folder.
        """
        return SourceFiles(self.root, _joined(self.inside, inner_path(folder, str(self))))

    def has(self, name: str) -> bool:
        return name in self.files

    def named(self, pattern: str) -> list[str]:
        """Return the files whose whole path matches a regular expression, in natural order (layer_2 before layer_10)."""
        return sorted((name for name in self.files if re.fullmatch(pattern, name)), key=natural_order)

    def path(self, name: str) -> Path:
        """Return the local path of a file.

        Raises:
            ValueError: If it does not exist, or its name or a symbolic link leads outside this folder.
        """
        name = inner_path(name, str(self))
        base = self._base
        path = base if base.is_file() and name == base.name else base / name
        if not path.is_file():
            raise ValueError(f"{path}: expected this file, found none.")
        real, allowed = path.resolve(), [self.root.resolve() if self.root.is_dir() else self.root.resolve().parent]
        # The Hugging Face cache stores files under their hashes and symlinks to them.
        allowed += [p.parent / "blobs" for p in self.root.absolute().parents if p.name == "snapshots"]
        if not any(real.is_relative_to(place.resolve()) for place in allowed) and not base.is_file():
            raise ValueError(f"{path}: expected a file in {self.root}, got a link out of it, to {real}. Copy the file there.")
        return _recorded(path)

    def json(self, name: str) -> Any:
        """Parse a JSON file.

        Raises:
            ValueError: If it does not exist, or is not valid JSON.
        """
        path = self.path(name)
        try:
            return json.loads(_text(path), object_pairs_hook=_once)
        except (json.JSONDecodeError, RecursionError, _TwiceError) as error:
            raise ValueError(f"{path}: expected JSON, got invalid JSON ({error}). The file is damaged.") from None

    def config(self, name: str) -> dict[str, Any]:
        """Parse a JSON or YAML file that contains a mapping.

        Raises:
            ValueError: If it contains anything else.
        """
        value = self.yaml(name) if name.endswith((".yaml", ".yml")) else self.json(name)
        if not isinstance(value, dict):
            raise ValueError(f"{self.path(name)}: expected a mapping, got {type(value).__name__}.")
        return value

    def yaml(self, name: str) -> Any:
        """Parse a YAML file with plain values only, no tags.

        Raises:
            ValueError: If it does not exist, or is not valid YAML.
        """
        path = self.path(name)
        # Imported lazily: few formats use YAML, and the others must load without the package.
        with needs(str(path)):
            from ruamel.yaml import YAML
            from ruamel.yaml.error import YAMLError
        try:
            return YAML(typ="safe", pure=True).load(_text(path))
        except (YAMLError, RecursionError) as error:
            raise ValueError(f"{path}: expected YAML, got invalid YAML ({' '.join(str(error).split())}).") from None

    def headers(self, name: str) -> dict[str, Header]:
        """Return the header of each tensor in a file; keys of nested dictionaries in torch files are joined by dots.

        Safetensors and npz files are not read beyond their headers. Names match those of ``tensors``, without the prefixes of
        module wrappers and containers.
        """
        path = self.path(name)
        if path.suffix == ".safetensors":
            return self._unwrapped(path, safetensors_headers(path))
        if path.suffix == ".npz":
            return {key: Header(str(dtype), shape) for key, (dtype, shape, _) in npz_members(path).items()}
        return {key: Header(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in self.tensors(name).items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a safetensors, torch, or npz file.

        Raises:
            ValueError: If the file is missing or damaged, or contains pickled objects.
        """
        return {key: value for key, value in self.values(name).items() if isinstance(value, Tensor)}

    def values(self, name: str) -> dict[str, Any]:
        """Return the tensors of a file and, for torch files, its other plain values, such as numbers and strings.

        Raises:
            ValueError: As for ``tensors``, or if the file contains the tensors of several dictionaries.
        """
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
            self._tensors[name] = self._unwrapped(path, found)
        return self._tensors[name]

    def _unwrapped(self, path: Path, values: dict[str, Any]) -> dict[str, Any]:
        """Return values under names without wrapper prefixes, and record the stripped prefixes."""
        names, words = unwrapped(values, path)
        self.unwrapped |= dict.fromkeys(words)
        return {names[key]: value for key, value in values.items() if key in names}


class HubSource(SourceFiles):
    """Repository on the Hugging Face Hub; each file is downloaded when it is first opened."""

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
        # Imported lazily: loading from disk must not require the Hub client.
        from huggingface_hub import hf_hub_download

        name = _joined(self.inside, inner_path(name, str(self)))
        try:
            return _recorded(Path(hf_hub_download(self.repo_id, name, revision=self.revision)))
        except Exception as error:  # noqa: BLE001
            # The client raises many types (offline, unknown, private); all of them become one error that names the file.
            raise ValueError(
                f"{self.repo_id}/{name}: could not be downloaded from the Hugging Face Hub ({one_line(error)})."
            ) from None


def hub_files(repo_id: str, revision: str | None) -> list[str]:
    """Return the names of a repository's files; offline, those in the local cache.

    Raises:
        ValueError: If the repository is neither on the Hub nor in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except Exception as error:  # noqa: BLE001
        reason = one_line(error)
    try:
        cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception:  # noqa: BLE001
        raise ValueError(
            f"{repo_id}: expected a directory or a Hugging Face Hub repository, but the download failed ({reason}). "
            "Check the name and the connection."
        ) from None
    return list(SourceFiles(cached).files)


def inner_path(name: str, where: str) -> str:
    """Return an untrusted relative path in normalized form, with forward slashes.

    Raises:
        ValueError: If it is absolute, empty, or contains "..".
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name.startswith(("/", "~")) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{where}: expected a path within it, got {name!r}. Absolute paths and '..' are refused.")
    return "/".join(parts)


def safetensors_headers(path: Path) -> dict[str, Header]:
    """Return dtypes and shapes by tensor name; raise ``ValueError`` if the file is damaged or shorter than it claims."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            dtypes = {key: str(piece.get_dtype()) for key, piece in slices.items()}
            return {k: Header(names.get(dtypes[k], dtypes[k]), tuple(s.get_shape())) for k, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged file or another format ({error}).") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Reject JSON objects with duplicate keys, whose intended value is ambiguous."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


class _TwiceError(Exception):
    """Duplicate key in a JSON object."""


def _joined(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name


def _text(path: Path) -> str:
    if path.stat().st_size > CONFIG_BYTES:
        raise ValueError(f"{path}: expected a configuration of at most {CONFIG_BYTES} bytes, got {path.stat().st_size}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes ({error}). The file is damaged.") from None
