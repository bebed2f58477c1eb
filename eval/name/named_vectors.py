"""Vectors with names: embeddings of words from a file, or the tokens of a model by its unembedding.

A file is ``WORDS.safetensors`` with one matrix, ``vectors`` or the only one, ``(words, d)``; or ``WORDS.npy``. The names are
one for each row: a JSON list in the metadata's entry ``names``, or beside the file, in ``WORDS.json`` (a list) or
``WORDS.txt`` (one a line).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...sae.files import read_json, read_tensors, read_text
from ...sae.rows import as_rows

LAYOUT = (
    "a matrix of safetensors or .npy, and a name for each row: a JSON list in the metadata's entry names, or beside it in a "
    ".json list or a .txt file"
)


@dataclass(frozen=True)
class NamedVectors:
    """Vectors, a name for each, and where they are from."""

    names: Sequence[str]
    vectors: Float[Tensor, "words d"]
    source: str

    def __post_init__(self) -> None:
        norms = self.vectors.norm(dim=-1)
        if len(self.names) != len(self.vectors):
            raise ValueError(
                f"--vectors: {self.source}: expected a name for each of {len(self.vectors):,} vectors, got {len(self.names):,}."
            )
        if len(self.names) < 2:
            raise ValueError(f"--vectors: {self.source}: expected at least two vectors, got {len(self.names)}.")
        if not bool(torch.isfinite(norms).all()):
            place = int((~torch.isfinite(norms)).nonzero()[0])
            raise ValueError(
                f"--vectors: {self.source}: expected finite vectors, got {self.names[place]!r} with NaN or infinity."
            )

    def centered(self) -> "NamedVectors":
        """Return the vectors less their mean, which is common to all of them and so names nothing."""
        return NamedVectors(self.names, self.vectors - self.vectors.mean(0), self.source)


def read_named_vectors(path: str | Path) -> NamedVectors:
    """Read vectors and their names.

    Raises:
        ValueError: If the file is missing, damaged or of another kind, or its names are not one for each row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/words.npy", np.eye(3, dtype=np.float32))
    ...     _ = Path(folder, "words.txt").write_text("cat\\ndog\\nowl\\n")
    ...     read_named_vectors(f"{folder}/words.npy").names
    ['cat', 'dog', 'owl']
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npy"):
        raise ValueError(f"--vectors: expected {LAYOUT}, got {path}.")
    if not path.is_file():
        raise ValueError(f"--vectors: {path} does not exist. Expected {LAYOUT}.")
    names: list[str] | None = None
    if path.suffix == ".npy":
        try:
            # No pickles: arrays of objects are refused.
            matrix = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise ValueError(f"--vectors: {path}: expected a NumPy array of numbers, got another file ({error}).") from None
    else:
        tensors, metadata = read_tensors(path)
        matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2]
        chosen = "vectors" if "vectors" in matrices else matrices[0] if len(matrices) == 1 else None
        if chosen is None:
            found = ", ".join(tensors) or "none"
            raise ValueError(f"--vectors: {path}: expected a matrix named vectors, got the tensors {found}.")
        matrix = tensors[chosen]
        if "names" in metadata:
            names = _names_of_json(metadata["names"], f"{path}: metadata: names")
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError(f"--vectors: {path}: expected a matrix (words, d), got shape {tuple(matrix.shape)}.")
    names = _names_beside(path) if names is None else names
    return NamedVectors(names, as_rows(matrix, f"--vectors: {path}"), str(path))


def _names_beside(path: Path) -> list[str]:
    if (beside := path.with_suffix(".json")).is_file():
        return _names_of_json(json.dumps(read_json(beside)), str(beside))
    if (beside := path.with_suffix(".txt")).is_file():
        return read_text(beside).splitlines()
    raise ValueError(
        f"--vectors: {path}: expected its names, found none. Write {path.with_suffix('.txt').name}, one name a line."
    )


def _names_of_json(text: str, where: str) -> list[str]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"--vectors: {where}: expected a JSON list of names.")
    return names
