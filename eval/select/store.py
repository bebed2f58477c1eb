"""Pooled documents on disk: shards of sparse rows (CSR) in safetensors files, and a manifest that says what they are of."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from ...sae.files import read_json, read_tensors, write_json, write_tensors, write_text
from ...training.stages import stage
from .pooled import WORDS, PooledDocuments, PoolReader, Vocabulary, joined_documents, with_words

POOL_VERSION = 1
SHARD_DOCUMENTS = 4096
MANIFEST_FILE, WORDS_FILE = "pool.json", "words.txt"
# The parts of a CSR matrix, as scipy names them.
CSR = ("data", "indices", "indptr")


@dataclass(frozen=True)
class PooledPool:
    """Pooled documents of a pool, read from disk a shard at a time, in the pool's order."""

    folder: Path
    manifest: dict[str, Any]
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return self.manifest["documents"]

    def __iter__(self) -> Iterator[PooledDocuments]:
        words = len(self.vocabulary.numbers)
        for number in range(self.manifest["shards"]):
            yield with_words(_read_shard(_shard(self.folder, number)), words)

    @property
    def files(self) -> list[Path]:
        """Files of the pool; documents name them by their number."""
        return [Path(name) for name in self.manifest["files"]]


def stored_pool(folder: Path, key: Mapping[str, Any]) -> PooledPool | None:
    """Return the pool in a folder, or ``None`` if there is none, or it was made of something else than ``key`` says."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    manifest = read_json(path)
    if manifest.get("pool_version") != POOL_VERSION or manifest.get("key") != dict(key):
        return None
    words = (folder / WORDS_FILE).read_text(encoding="utf-8").splitlines()
    return PooledPool(folder, manifest, Vocabulary(words))


def store_pool(folder: Path, key: Mapping[str, Any], reader: PoolReader, total: int) -> PooledPool:
    """Read a pool in one pass and write its pooled documents; what another pool left in the folder is removed.

    Args:
        total: Number of documents, for the progress.

    Raises:
        ValueError: If the pool cannot be read, or has no document with a token that counts.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pending: list[PooledDocuments] = []
    shards = found = tokens = 0

    def write() -> None:
        nonlocal shards
        _write_shard(_shard(folder, shards), joined_documents(pending))
        pending.clear()
        shards += 1

    with stage("pool", total, "documents") as shown:
        for window in reader.windows():
            pending.append(window)
            found, tokens = found + len(window), tokens + int(window.tokens.sum())
            shown.update(found)
            if sum(map(len, pending)) >= SHARD_DOCUMENTS:
                write()
    if not found:
        raise ValueError(f"--pool: expected documents with tokens in {', '.join(reader.text.files)}, got none.")
    if pending:
        write()
    write_text(folder / WORDS_FILE, "".join(f"{word}\n" for word in reader.vocabulary.numbers))
    manifest = {
        "pool_version": POOL_VERSION,
        "key": dict(key),
        "documents": found,
        "tokens": tokens,
        "shards": shards,
        "files": list(reader.files),
        "skipped": reader.skipped,
    }
    # Last: a folder without it is not used.
    write_json(folder / MANIFEST_FILE, manifest, sealed=True)
    return PooledPool(folder, manifest, reader.vocabulary)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"documents-{number:05d}.safetensors"


def _write_shard(path: Path, found: PooledDocuments) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, rows in found.units.items():
        values = rows.data.astype(np.int32 if name == WORDS else np.float32)
        parts = (values, rows.indices.astype(np.int32), rows.indptr.astype(np.int64))
        arrays |= {f"{name}.{part}": array for part, array in zip(CSR, parts, strict=True)}
        arrays[f"{name}.width"] = np.array([rows.shape[1]], np.int64)
    arrays |= {name: getattr(found, name) for name in ("activation", "tokens", "digests", "places")}
    write_tensors(
        path, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, {}, sealed=True
    )


def _read_shard(path: Path) -> PooledDocuments:
    arrays = {name: tensor.numpy() for name, tensor in read_tensors(path)[0].items()}
    units = {}
    for name in sorted(name.removesuffix(".width") for name in arrays if name.endswith(".width")):
        data, indices, indptr = (arrays[f"{name}.{part}"] for part in CSR)
        units[name] = sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1, int(arrays[f"{name}.width"][0])))
    return PooledDocuments(units, *(arrays[name] for name in ("activation", "tokens", "digests", "places")))
