"""Places of activation stores: a folder, or an fsspec URL (``s3://``, ``gs://``, ``memory://``, ...) with a copy in the cache.

The shuffle of training is global: every batch has rows of nearly every shard, and reading single rows over a network takes a
request each. So the copy holds the whole store: a harvest writes its shards there and uploads them, and training first
downloads what is missing, a few shards at a time. The manifest is uploaded last and lists only shards that are there; checksums
are verified while downloading.
"""

import getpass
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...sae.files import CHUNK_BYTES, read_json, replacing
from ..content import cache_folder
from ..locks import require_writable
from ..recipe import HarvestSection
from .shards import MANIFEST_FILE

# Shards that are downloaded at once.
TRANSFERS = 4
MARKER_FILE = ".in-use"
# Seconds between two looks for shards to upload.
UPLOAD_SECONDS = 1.0


class StorePlace(ABC):
    """Place of a store; ``directory`` is the folder that it is read from and written to on this machine."""

    directory: Path

    @abstractmethod
    def require_writable(self) -> None:
        """Raise ``ValueError`` if nothing can be written there."""

    @abstractmethod
    def look(self) -> None:
        """Bring the manifest in ``directory`` up to date."""

    @abstractmethod
    def fetch(self) -> None:
        """Bring manifest and shards in ``directory`` up to date."""

    @abstractmethod
    def publishing(self) -> Any:
        """Context manager in which what is written to ``directory`` becomes part of the store."""


def store_place(section: HarvestSection) -> StorePlace:
    """Return the place of a recipe's store."""
    assert section.store is not None
    return RemotePlace(section.store, section.cache_gb) if "://" in section.store else FolderPlace(Path(section.store))


class FolderPlace(StorePlace):
    """Folder of this machine."""

    def __init__(self, directory: Path):
        self.directory = directory

    def require_writable(self) -> None:
        require_writable(self.directory, "harvest.store")

    def look(self) -> None:
        """Do nothing: the folder is the store."""

    def fetch(self) -> None:
        """Do nothing: the folder is the store."""

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Do nothing: the folder is the store."""
        yield


class _StoreUrlError(ValueError):
    """Error that already names URL and remedy."""


class RemotePlace(StorePlace):
    """fsspec URL, and the folder of its copy in the cache.

    Args:
        cache_gb: Largest size of all copies together, in GB; those used longest ago are removed. None: as the disk allows.
    """

    def __init__(self, url: str, cache_gb: float | None):
        self.url, self.cache_gb = url.rstrip("/"), cache_gb
        self.directory = cache_folder() / "stores" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        with self._explained("reached"):
            # Imported on first use: folders do not need it.
            import fsspec

            self.fs, self.root = fsspec.core.url_to_fs(self.url)

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except _StoreUrlError:
            raise
        except ImportError as error:
            raise _StoreUrlError(
                f"harvest.store: {self.url} needs a package that is not installed ({error}). Install it, or use a folder."
            ) from None
        except Exception as error:  # noqa: BLE001 - file systems raise errors of their own
            reason = " ".join(str(error).split())[:200]
            raise _StoreUrlError(
                f"harvest.store: {self.url} cannot be {done} ({type(error).__name__}: {reason}). Check the address and your "
                "rights, or choose another harvest.store."
            ) from None

    def require_writable(self) -> None:
        self.look()
        if (self._manifest() or {}).get("complete"):
            # It is only read.
            return
        with self._explained("written"):
            there = self.fs.exists(self.root)
            probe = f"{self.root}/.sparsary-{secrets.token_hex(4)}"
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(probe, b"")
            self.fs.rm_file(probe)
            if not there:
                # Object stores have no folders.
                with suppress(OSError, NotImplementedError):
                    self.fs.rmdir(self.root)

    def look(self) -> None:
        own = self._manifest()
        with self._explained("read"):
            raw = self._published()
            if raw is None:
                # Without a mark of a harvest that was killed, the store was deleted.
                if own is not None and not self.fs.exists(f"{self.root}/{MARKER_FILE}"):
                    shutil.rmtree(self.directory)
                return
            shards = json.loads(raw)["shards"]
        known = [] if own is None else own["shards"]
        # An interrupted harvest may have written more than it uploaded.
        if known[: len(shards)] == shards and len(known) > len(shards):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for shard in shards:
            if shard not in known:
                (self.directory / shard["name"]).unlink(missing_ok=True)
        with replacing(self.directory / MANIFEST_FILE) as temporary:
            temporary.write_bytes(raw)

    def _published(self) -> bytes | None:
        try:
            return self.fs.cat_file(f"{self.root}/{MANIFEST_FILE}")
        except FileNotFoundError:
            return None

    def fetch(self) -> None:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        # Processes of one machine share the copy.
        with self._lock("reading"):
            self.look()
            manifest = self._manifest()
            if manifest is None:
                return
            os.utime(self.directory)
            missing = [shard for shard in manifest["shards"] if not self._has(shard)]
            self._make_room(sum(shard["bytes"] for shard in manifest["shards"]), sum(shard["bytes"] for shard in missing))
            with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="sparsary-download") as pool:
                for done in [pool.submit(self._download, shard) for shard in missing]:
                    try:
                        done.result()
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise

    def _lock(self, purpose: str) -> FileLock:
        return FileLock(self.directory.with_name(f"{self.directory.name}.{purpose}.lock"))

    def _manifest(self) -> dict[str, Any] | None:
        path = self.directory / MANIFEST_FILE
        return read_json(path) if path.is_file() else None

    def _has(self, shard: dict[str, Any]) -> bool:
        path = self.directory / shard["name"]
        return path.is_file() and path.stat().st_size == shard["bytes"]

    def _download(self, shard: dict[str, Any]) -> None:
        digest = hashlib.sha256()
        with (
            self._explained("read"),
            self.fs.open(f"{self.root}/{shard['name']}", "rb") as source,
            replacing(self.directory / shard["name"]) as temporary,
            temporary.open("wb") as target,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
            if digest.hexdigest() != shard["sha256"]:
                raise _StoreUrlError(
                    f"{self.url}/{shard['name']}: contents differ from the checksum in {MANIFEST_FILE}: damaged. Delete the "
                    "store and harvest again."
                )

    def _make_room(self, whole: int, missing: int) -> None:
        """Remove other stores' copies, those used longest ago first, until this one fits."""
        limit = float("inf") if self.cache_gb is None else self.cache_gb * 1e9
        stores = [folder for folder in self.directory.parent.iterdir() if folder.is_dir() and folder != self.directory]
        others = {folder: sum(path.stat().st_size for path in folder.iterdir()) for folder in stores}
        for folder in sorted(stores, key=lambda folder: folder.stat().st_mtime):
            free = shutil.disk_usage(self.directory.parent).free
            if whole + sum(others.values()) <= limit and missing <= free:
                break
            shutil.rmtree(folder)
            del others[folder]
        free = shutil.disk_usage(self.directory.parent).free
        if whole > limit or missing > free:
            room = f"harvest.cache_gb is {self.cache_gb:g}" if whole > limit else f"{free / 1e9:.1f} GB are free"
            raise _StoreUrlError(
                f"harvest.store: {self.url} takes {whole / 1e9:.3g} GB in {self.directory.parent}, but {room}. Training "
                "reads rows of all shards, so the cache must hold the whole store. Raise harvest.cache_gb, free some disk, or "
                "move the cache with SPARSARY_CACHE."
            )

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Upload shards as the manifest in ``directory`` lists them, each before the manifest, until all are there.

        Raises:
            ValueError: If another process or machine writes to the store, or it cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = self._lock("writing")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise _StoreUrlError(f"harvest.store: {self.url} is in use by another process. Wait for it.") from None
        try:
            self._claim()
            stop, failed = threading.Event(), []
            thread = threading.Thread(target=self._upload_until, args=(stop, failed), daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                with suppress(Exception):
                    self.fs.rm_file(f"{self.root}/{MARKER_FILE}")
            if failed:
                raise failed[0]
        finally:
            lock.release()

    def _claim(self) -> None:
        """Leave a mark that other machines see."""
        own, path = f"{getpass.getuser()}@{socket.gethostname()}", f"{self.root}/{MARKER_FILE}"
        with self._explained("written"):
            self.fs.makedirs(self.root, exist_ok=True)
            holder = self.fs.cat_file(path).decode() if self.fs.exists(path) else own
            # A mark of this machine is that of a killed process: a live one has the lock.
            if holder != own:
                raise _StoreUrlError(
                    f"harvest.store: {self.url} is in use by {holder}. Wait for it; if it was killed, delete "
                    f"{self.url}/{MARKER_FILE}."
                )
            self.fs.pipe_file(path, own.encode())

    def _upload_until(self, stop: threading.Event, failed: list[BaseException]) -> None:
        try:
            with self._explained("read"):
                raw = self._published()
            uploaded = set() if raw is None else {shard["sha256"] for shard in json.loads(raw)["shards"]}
            last = False
            while not last:
                last = stop.wait(UPLOAD_SECONDS)
                self._upload(uploaded)
        except BaseException as error:  # noqa: BLE001 - raised where the harvest ends
            failed.append(error)

    def _upload(self, uploaded: set[str]) -> None:
        path = self.directory / MANIFEST_FILE
        if not path.is_file():
            return
        raw = path.read_bytes()
        with self._explained("written"):
            for shard in json.loads(raw)["shards"]:
                if shard["sha256"] not in uploaded:
                    self.fs.put_file(str(self.directory / shard["name"]), f"{self.root}/{shard['name']}")
                    uploaded.add(shard["sha256"])
            if hashlib.sha256(raw).hexdigest() not in uploaded:
                self.fs.pipe_file(f"{self.root}/{MANIFEST_FILE}", raw)
                uploaded.add(hashlib.sha256(raw).hexdigest())
