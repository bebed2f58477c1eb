"""Directory of published dictionaries: their names, hub repositories, and what is known of each without opening its files.

``releases.json.gz`` is data, with its sources and date: facts about releases, such as repository, path, language model, l0 and
Neuronpedia id. ``sparsary list --refresh`` writes a newer one to the user's cache, and that one is then read.
"""

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ..sae.files import at_home, natural_order, replacing
from ..sae.formats.hooks import hub_model
from ..sae.suggestions import did_you_mean

# Environment variables: a newer directory in place of the one in the user's cache, and a folder of downloaded repositories.
DIRECTORY, REPOSITORIES = "SPARSARY_RELEASES", "SPARSARY_REPOSITORIES"
# Files that hold one dictionary among others in their folder; any other path is a folder.
FILE_SUFFIXES = (".pt", ".pth", ".safetensors", ".npz")
VERSION = 1


@dataclass(frozen=True)
class PublishedDictionary:
    """One published dictionary.

    ``name`` is the name of its ``release``, a slash and the id within it. ``path`` is its folder or file in ``repository``;
    empty for the whole repository. ``l0`` (latents per token) and ``neuronpedia`` are ``None`` if unknown.
    """

    name: str
    release: str
    repository: str
    path: str
    model: str | None
    l0: float | None = None
    neuronpedia: str | None = None

    @property
    def place(self) -> tuple[str | None, str | None]:
        """Subfolder of the repository, and the name that selects one of several files in it; each may be ``None``."""
        if not self.path.endswith(FILE_SUFFIXES) or self.path.endswith("/params.npz"):
            return self.path or None, None
        path = PurePosixPath(self.path)
        return (None if path.parent == PurePosixPath(".") else str(path.parent)), path.stem


@dataclass(frozen=True)
class Release:
    """A named set of published dictionaries, of one repository and one language model (a hub id)."""

    name: str
    repository: str
    model: str | None
    dictionaries: tuple[PublishedDictionary, ...]


@dataclass(frozen=True)
class ReleaseDirectory:
    """All known releases by name; ``sources`` says where each fact is from, ``date`` (ISO 8601) when it was read."""

    date: str
    sources: tuple[str, ...]
    releases: Mapping[str, Release]

    @cached_property
    def by_name(self) -> Mapping[str, PublishedDictionary]:
        """Dictionaries by full name, and by Neuronpedia id where only one has that id."""
        found = {d.name: d for release in self.releases.values() for d in release.dictionaries}
        ids: dict[str, list[PublishedDictionary]] = {}
        for d in found.values():
            ids.setdefault(d.neuronpedia or d.name, []).append(d)
        return {name: several[0] for name, several in ids.items() if len(several) == 1} | found

    def search(self, words: Iterable[str]) -> list[PublishedDictionary]:
        """Return the dictionaries whose name, repository, model or Neuronpedia id contains every word; case is ignored."""
        wanted = [word.lower() for word in words]
        return [
            d
            for release in self.releases.values()
            for d in release.dictionaries
            if all(word in " ".join(filter(None, (d.name, d.repository, d.model, d.neuronpedia))).lower() for word in wanted)
        ]

    def get(self, name: str) -> PublishedDictionary | None:
        """Return the dictionary with this name or Neuronpedia id; ``None`` if the name is of no release.

        Raises:
            ValueError: If a release has that name, but no such dictionary, or several.
        """
        if name in self.by_name:
            return self.by_name[name]
        release = self.releases.get(name) or self.releases.get(name.partition("/")[0])
        if release is None:
            return None
        if len(release.dictionaries) == 1 and name == release.name:
            return release.dictionaries[0]
        ids = [d.name for d in release.dictionaries]
        if name == release.name:
            raise ValueError(f"{name}: expected one dictionary, got a release of {len(ids)}. {_some(ids)}")
        raise ValueError(
            f"{name}: expected a dictionary of the release {release.name}, found none. {_nearest(name, ids) or _some(ids)} "
            f"`sparsary list {release.name}` lists its {len(ids)}."
        )

    def hint(self, name: str) -> str:
        """Return a sentence, with a leading space, that suggests the nearest name of a release or dictionary, or ''.

        ``name`` is one that is neither of a release nor of any other place.
        """
        first, _, rest = name.partition("/")
        near = difflib.get_close_matches(first, self.releases, n=1)
        if near and rest:
            release = self.releases[near[0]]
            return f" {_nearest(f'{near[0]}/{rest}', [d.name for d in release.dictionaries]) or f'Did you mean {near[0]!r}?'}"
        return did_you_mean(first, self.releases)


def _some(ids: Sequence[str]) -> str:
    return f"For example {', '.join(ids[:3])}."


def _nearest(name: str, ids: Sequence[str]) -> str:
    """Return a question that names the most similar id, of equally long ones the one that begins most alike; or ''."""
    if name in ids:
        return f"Did you mean {name!r}?"
    near = difflib.get_close_matches(name, ids, n=10, cutoff=0.8)

    def alike(one: str) -> int:
        return next((at for at, (a, b) in enumerate(zip(one, name, strict=False)) if a != b), len(name))

    return f"Did you mean {max(near, key=alike)!r}?" if near else ""


def release_directory() -> ReleaseDirectory:
    """Read the directory: the file named by ``SPARSARY_RELEASES``, that of the last refresh, or the one in the package.

    Raises:
        ValueError: If the file is damaged.
    """
    path = refreshed_file()
    if path.is_file():
        return _read(path, path.stat().st_mtime_ns)
    if os.environ.get(DIRECTORY):
        raise ValueError(f"{DIRECTORY}: expected a file, found none at {path}. Unset it, or write it: sparsary list --refresh.")
    return _read(Path(__file__).parent / "releases.json.gz", 0)


@lru_cache(maxsize=2)
def _read(path: Path, _time: int) -> ReleaseDirectory:
    """Read a directory once for each time at which its file was written."""
    return _parsed(path.read_bytes(), str(path))


def published(*words: str) -> list[PublishedDictionary]:
    """Return the published dictionaries whose name, repository, model or Neuronpedia id contains every word.

    Any of their names can be given to ``load`` and to every command in place of a path. Without words, all are returned.

    >>> from sparsary import published
    >>> [one.name for one in published("gpt2-small-res-jb/blocks.8")]
    ['gpt2-small-res-jb/blocks.8.hook_resid_pre']

    Raises:
        ValueError: If the directory of releases is damaged.
    """
    return release_directory().search(words)


def refreshed_file() -> Path:
    """Return where a refreshed directory lies: ``SPARSARY_RELEASES``, or ``sparsary/releases.json.gz`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(at_home(os.environ.get(DIRECTORY) or f"{cache}/sparsary/releases.json.gz"))


def local_repository(repository: str) -> str:
    """Return the folder of a hub repository's local copy, ``$SPARSARY_REPOSITORIES/OWNER/NAME``; without one, its id."""
    root = os.environ.get(REPOSITORIES)
    folder = Path(at_home(root), repository) if root else None
    return str(folder) if folder is not None and folder.is_dir() else repository


def _parsed(data: bytes, where: str) -> ReleaseDirectory:
    try:
        read = json.loads(gzip.decompress(data))
        if read["version"] != VERSION:
            raise ValueError(f"version {read['version']}")
        releases = {name: _release(name, entry) for name, entry in read["releases"].items()}
        return ReleaseDirectory(str(read["date"]), tuple(read["sources"]), releases)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: expected a directory of releases, version {VERSION}, got something else ({type(error).__name__}: "
            f"{error}). Delete it, or write it anew: sparsary list --refresh."
        ) from None


def _release(name: str, entry: Mapping[str, Any]) -> Release:
    repository, model = entry["repository"], entry["model"]
    members = tuple(
        PublishedDictionary(
            f"{name}/{inner}" if inner else name, name, repository, inner if path is None else path, model, l0, neuronpedia
        )
        for inner, path, l0, neuronpedia in entry["dictionaries"]
    )
    return Release(name, repository, model, members)


def write_releases(path: Path, releases: Iterable[Release], sources: Sequence[str], date: str) -> None:
    """Write a directory of releases, whole or not at all; the same releases give the same bytes.

    Raises:
        OSError: If it cannot be written.
    """
    entries = {}
    for release in sorted(releases, key=lambda release: natural_order(release.name)):
        rows = []
        for d in sorted(release.dictionaries, key=lambda d: natural_order(d.name)):
            inner = d.name.removeprefix(release.name).lstrip("/")
            rows.append([inner, None if d.path == inner else d.path, d.l0, d.neuronpedia])
        entries[release.name] = {"repository": release.repository, "model": hub_model(release.model), "dictionaries": rows}
    text = json.dumps({"version": VERSION, "date": date, "sources": list(sources), "releases": entries}, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
