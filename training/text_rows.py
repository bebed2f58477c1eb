"""Rows of text files with all of their columns, by the places that documents were read from."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .recipe import TextSource
from .text_files import as_bytes, file_kind, json_lines, json_list, text_columns, txt_pieces


def rows_at(path: Path, numbers: Collection[int], section: TextSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and row of some rows of a file, in the file's order; ``numbers`` are those of ``SourceDocument.place``.

    Documents of .txt files are rows with the text column alone, and so are the members of a JSON list of texts.

    >>> import tempfile
    >>> from sparsary.training.recipe import TextSection
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.jsonl")
    ...     _ = path.write_text('{"text": "a", "id": 7}\\n\\n{"text": "b", "id": 8}\\n')
    ...     list(rows_at(path, {3}, TextSection()))
    [(3, {'text': 'b', 'id': 8})]
    """
    wanted = set(numbers)
    last = max(wanted, default=-1)
    if file_kind(path) == ".parquet":
        yield from _parquet_rows(path, np.array(sorted(wanted), np.int64))
        return
    for number, row in _rows(path, section):
        if number in wanted:
            yield number, dict(row) if isinstance(row, Mapping) else {text_columns(section)[0]: row}
        if number >= last:
            return


def _rows(path: Path, section: TextSource) -> Iterator[tuple[int, Any]]:
    match file_kind(path):
        case ".txt":
            return enumerate(txt_pieces(path, section.separator))
        case ".json" if (rows := json_list(path)) is not None:
            return enumerate(rows)
        case _:
            return json_lines(path)


def _parquet_rows(path: Path, numbers: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    # Imported lazily: it is slow, and other files do not need it.
    import pyarrow as pa
    from pyarrow import parquet

    first = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            here = numbers[(numbers >= first) & (numbers < first + batch.num_rows)]
            some = batch.take(pa.array(here - first))
            # Texts that are not UTF-8 are read as documents are: with U+FFFD.
            columns = [as_bytes(some.column(name), pa).to_pylist() for name in some.schema.names]
            for number, values in zip(here.tolist(), zip(*columns, strict=True), strict=True):
                texts = (value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values)
                yield number, dict(zip(some.schema.names, texts, strict=True))
            first += batch.num_rows
