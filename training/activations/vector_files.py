"""Vectors from files in place of a language model's activations: embeddings of images, audio, proteins, sentences, ...

Rows of all files, in the order of the files, are one table. A computed shuffle with a fixed key divides them into training
rows, in shuffled order, and held-out rows; both are the same for every run over the same files.
"""

import glob
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...sae.files import natural_order, read_tensors
from ...sae.rows import as_rows
from ...sae.suggestions import did_you_mean
from ..content import Content, file_digest
from ..recipe import HarvestSection
from .shuffle import permute

SUFFIXES = (".npy", ".safetensors", ".parquet")
# Marks a data set that `datasets` saved to a folder.
DATASET_FILE = "dataset_info.json"
# Key of the shuffle that divides and orders the rows.
KEY = 0
# Rows gathered at once.
SLICE_ROWS = 8192


class VectorFile(NamedTuple):
    """Rows of one file: their number, width, and a function that returns those at given indices as float32."""

    path: Path
    rows: int
    width: int
    read: Callable[[np.ndarray], Tensor]


class VectorFiles:
    """Vectors of the files of ``harvest.files``; iterating yields the training rows, ``(rows, d)`` float32 at a time.

    ``.npy`` and ``.safetensors`` files are mapped, and parquet files and data sets read through ``datasets``, which maps a copy
    in its cache, so that tables may be larger than memory. Rows that are not finite are left to the training stream, which
    counts them.

    >>> import tempfile, numpy as np
    >>> from sparsary.training.recipe import HarvestSection
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/a.npy", np.zeros((90, 4), np.float16))
    ...     vectors = VectorFiles(HarvestSection(files=(f"{folder}/*.npy",), heldout=0.1))
    ...     vectors.rows, vectors.width, sum(len(part) for part in vectors), tuple(vectors.heldout()[0].shape)
    (90, 4, 81, (9, 4))

    Raises:
        ValueError: If a file is missing, damaged, of another kind, or has another width than the first.
    """

    def __init__(self, section: HarvestSection):
        self.section = section
        self.files = [_opened(path, section.column) for path in _paths(section.files)]
        self.rows, self.width = sum(file.rows for file in self.files), self.files[0].width
        for file in self.files:
            if file.width != self.width:
                raise ValueError(
                    f"harvest.files: {file.path}: expected width {self.width}, as in {self.files[0].path}, got {file.width}."
                )
        self.heldout_rows = round(section.heldout * self.rows)
        self.training_rows = self.rows - self.heldout_rows
        if not self.training_rows:
            raise ValueError(f"harvest.files: expected vectors to train on, got {self.rows} in all.")

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.training_rows, SLICE_ROWS):
            yield self.at(self._shuffled(start, min(start + SLICE_ROWS, self.training_rows)))

    def heldout(self, rows: int | None = None) -> tuple[Float[Tensor, "rows d"], np.ndarray]:
        """Return at most ``rows`` held-out rows, and their numbers in the table."""
        count = self.heldout_rows if rows is None else min(rows, self.heldout_rows)
        numbers = self._shuffled(self.training_rows, self.training_rows + count)
        return self.at(numbers), numbers

    def at(self, numbers: np.ndarray) -> Float[Tensor, "rows d"]:
        """Return the rows with these numbers in the table."""
        out = torch.empty(len(numbers), self.width)
        first = 0
        for file in self.files:
            here = np.flatnonzero((numbers >= first) & (numbers < first + file.rows))
            if len(here):
                # Files are read in their own order, which is faster on disk.
                here = here[np.argsort(numbers[here], kind="stable")]
                out[torch.from_numpy(here)] = file.read(numbers[here] - first)
            first += file.rows
        return out

    @cached_property
    def content(self) -> Content:
        """Digest of every file's bytes, by its name."""
        return {"vectors": {file.path.name: _digest(file.path) for file in self.files}}

    def lines(self) -> list[tuple[str, str]]:
        """Return what there is, as pairs of a name and a value, for a plan."""
        some = ", ".join(str(file.path) for file in self.files[:3]) + (", ..." if len(self.files) > 3 else "")
        return [
            ("vectors", f"{self.rows:,} of width {self.width} in {len(self.files)} file{'s' * (len(self.files) > 1)}: {some}"),
            ("held out", f"{self.heldout_rows:,} vectors, {self.section.heldout:.0%}"),
        ]

    def _shuffled(self, start: int, stop: int) -> np.ndarray:
        return permute(np.arange(start, stop), self.rows, KEY)


def vector_problems(recorded: Content, current: Content) -> list[str]:
    """Return one line for each file that was added, removed, or changed since ``recorded``."""
    before, now = recorded.get("vectors") or {}, current.get("vectors") or {}
    if not before or not now:
        return []
    lines = [f"harvest.files: {name} is {'new' if name in now else 'gone'}" for name in sorted(before.keys() ^ now.keys())]
    changed = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    return lines + [f"harvest.files: {name} has other content than it had" for name in changed]


def _paths(places: Sequence[str]) -> list[Path]:
    """Return the files of paths, folders, and patterns, in natural order within each.

    Raises:
        ValueError: If one of them matches nothing.
    """
    found: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_dir() and not (path / DATASET_FILE).exists():
            own = [inner for inner in path.iterdir() if inner.suffix in SUFFIXES]
        elif path.exists():
            own = [path]
        else:
            own = [Path(name) for name in glob.glob(place, recursive=True)]
        if not own:
            raise ValueError(
                f"harvest.files: {place}: expected files of vectors ({', '.join(SUFFIXES)}), or a folder of them, found none."
            )
        found += sorted(own, key=lambda inner: natural_order(str(inner)))
    return list(dict.fromkeys(found))


def _opened(path: Path, column: str | None) -> VectorFile:
    if path.is_dir() or path.suffix == ".parquet":
        return _dataset(path, column)
    if path.suffix == ".npy":
        return _array(path, _mapped(path))
    if path.suffix == ".safetensors":
        return _array(path, _chosen(path, read_tensors(path)[0], column))
    raise ValueError(
        f"harvest.files: {path}: expected one of {', '.join(SUFFIXES)}, or a data set's folder, got {path.suffix!r}."
    )


def _mapped(path: Path) -> np.ndarray:
    try:
        # No pickles: arrays of objects are refused.
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"harvest.files: {path}: expected a NumPy array of numbers, got another file ({error}).") from None


def _chosen(path: Path, tensors: dict[str, Tensor], column: str | None) -> Tensor:
    """Return the tensor named by ``harvest.column``, or the only matrix."""
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    name = column if column is not None else matrices[0] if len(matrices) == 1 else None
    if name not in tensors:
        raise ValueError(
            f"harvest.column: expected the name of one of the tensors of {path} ({', '.join(tensors) or 'none'}), got "
            f"{column!r}.{did_you_mean(column or '', tensors)}"
        )
    return tensors[name]


def _array(path: Path, values: np.ndarray | Tensor) -> VectorFile:
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"harvest.files: {path}: expected vectors in a matrix (rows, d), got shape {tuple(values.shape)}.")

    def read(numbers: np.ndarray) -> Tensor:
        rows = values[torch.from_numpy(numbers)] if isinstance(values, Tensor) else np.asarray(values[numbers])
        return as_rows(rows, f"harvest.files: {path}")

    # Numbers of another kind are refused now, not in the middle of training.
    read(np.arange(min(1, values.shape[0])))
    return VectorFile(path, values.shape[0], values.shape[1], read)


def _dataset(path: Path, column: str | None) -> VectorFile:
    # Imported lazily: it takes seconds, and arrays do not need it.
    import datasets

    try:
        if path.is_dir():
            found: Any = datasets.load_from_disk(str(path))
        else:
            found = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # noqa: BLE001 - pyarrow and datasets raise many types for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"harvest.files: {path}: expected a parquet file or a data set's folder, got {reason}.") from None
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(
            f"harvest.files: {path}: expected one split, got {', '.join(map(str, found))}. Name the folder of one of them."
        )
    lists = [name for name, feature in found.features.items() if _is_vector(feature)]
    name = column if column is not None else lists[0] if len(lists) == 1 else None
    if name not in lists:
        raise ValueError(
            f"harvest.column: expected a column of vectors of {path} ({', '.join(lists) or 'none'}), got {column!r}."
            f"{did_you_mean(column or '', lists)}"
        )
    table = found.with_format("numpy", columns=[name])

    def read(numbers: np.ndarray) -> Tensor:
        rows = table[numbers.tolist()][name]
        # Rows of unequal length come as an array of arrays.
        if getattr(rows, "dtype", np.dtype(object)).kind == "O":
            raise ValueError(f"harvest.files: {path}: {name}: expected vectors of one length, got several.")
        return as_rows(rows, f"harvest.files: {path}: {name}")

    if not len(table):
        raise ValueError(f"harvest.files: {path}: expected vectors, got none.")
    return VectorFile(path, len(table), read(np.zeros(1, np.int64)).shape[-1], read)


def _is_vector(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    dtype = getattr(inner, "dtype", "")
    return isinstance(dtype, str) and dtype.startswith(("float", "int", "uint", "double"))


def _digest(path: Path) -> str:
    """Return the digest of a file, or of the files of a folder."""
    if not path.is_dir():
        return file_digest(path)
    parts = sorted(cast("Iterator[Path]", path.glob("*.arrow")))
    return "-".join(file_digest(part)[:16] for part in parts)
