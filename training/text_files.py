"""Rows of files and of Hugging Face datasets, read as documents in a fixed order."""

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from ..sae.suggestions import did_you_mean
from .bad_rows import BadTexts
from .documents import SourceDocument, UnreadableRowError, document_of, joined_columns
from .recipe import TextSource

# File and number of a row: lines of JSON lines count from 1, other rows from 0.
RowPlace = tuple[Path, int]
Reader = Callable[[Path, TextSource, BadTexts], Iterator[SourceDocument]]
COMPRESSIONS = (".gz", ".zst")
# Characters that are read at once of a file without lines.
READ_CHARACTERS = 1 << 20
COLUMN_REMEDY = "Set text.column to the key that holds the text."


def text_columns(section: TextSource) -> tuple[str, ...]:
    """Return the columns that a text is read from."""
    return (section.column,) if isinstance(section.column, str) else section.column


def file_kind(path: Path) -> str:
    """Return a file's suffix, without that of its compression."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def listed_files(section: TextSource) -> list[Path]:
    """Return the files of a text in reading order: patterns and folders are replaced by what they match, sorted by name.

    Raises:
        ValueError: If one does not exist, a pattern matches nothing, or a file is of an unknown kind.
    """
    found = []
    for name in section.files:
        path = Path(name)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.is_file() and file_kind(each) in READERS)
            if not inside:
                raise ValueError(f"text.files: expected files of {KINDS} in the folder {path}, got none.")
            found += inside
        elif path.is_file() or not glob.has_magic(name):
            if file_kind(path) not in READERS:
                raise ValueError(f"text.files: expected {KINDS}, got {path}.")
            if not path.is_file():
                raise ValueError(f"text.files: {path} does not exist. Give an existing path, or set text.source: embedded.")
            found.append(path)
        else:
            matches = [each for each in map(Path, sorted(glob.glob(name, recursive=True))) if each.is_file()]
            if not matches:
                raise ValueError(f"text.files: expected files that match {name!r}, got none. Give another pattern, or paths.")
            if unknown := next((each for each in matches if file_kind(each) not in READERS), None):
                raise ValueError(f"text.files: expected {KINDS}, got {unknown}, which {name!r} matches.")
            found += matches
    return found


def file_documents(section: TextSource, bad: BadTexts) -> Iterator[SourceDocument]:
    """Yield the documents of a text's files; rows without text are left out and counted."""
    # All files before the first is read: reading may take hours.
    for path in listed_files(section):
        try:
            yield from READERS[file_kind(path)](path, section, bad)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"text.files: {path} could not be read ({reason}).") from None


def _bytes_of(path: Path) -> Any:
    """Open a file for reading bytes, decompressed if its name says that it is compressed."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() != ".zst":
        return path.open("rb")
    try:
        # Imported lazily: other files do not need it.
        import pyarrow as pa
    except ModuleNotFoundError:
        raise ValueError(
            f"text.files: {path} needs the package pyarrow, which is not installed. Run: pip install pyarrow, or decompress "
            "the file."
        ) from None
    return pa.input_stream(path, compression="zstd")


def opened_text(path: Path) -> TextIO:
    """Open a text file in the encoding of its byte-order mark, else as UTF-8, where other bytes become surrogates."""
    with _bytes_of(path) as handle:
        head = handle.read(4)
    handle = io.BufferedReader(cast(io.RawIOBase, _bytes_of(path)))
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return io.TextIOWrapper(handle, encoding="utf-32", errors="replace")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.TextIOWrapper(handle, encoding="utf-16", errors="replace")
    return io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape")


def _txt_documents(path: Path, section: TextSource, bad: BadTexts) -> Iterator[SourceDocument]:
    line, lines = 1, section.separator.count("\n")
    for number, text in enumerate(txt_pieces(path, section.separator)):
        yield SourceDocument(bad.clean(text, f"{path}:{line}"), place=(path, number))
        line += text.count("\n") + lines


def txt_pieces(path: Path, separator: str) -> Iterator[str]:
    """Yield the texts between the separators of a file, blank ones too."""
    pending = ""
    with opened_text(path) as handle:
        while chunk := handle.read(READ_CHARACTERS):
            *whole, pending = (pending + chunk).split(separator)
            yield from whole
    yield pending


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1 on, and the value of every line that is not blank; ``None`` for one that is not JSON."""
    with opened_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            # Blank lines are common in concatenated files.
            if line.isspace():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def json_list(path: Path) -> list[Any] | None:
    """Return the rows of a JSON list, or ``None`` for a file of JSON lines, many of which have the same suffix.

    Raises:
        ValueError: If it begins as a list and is not JSON.
    """
    with opened_text(path) as handle:
        first = next((character for character in iter(lambda: handle.read(1), "") if not character.isspace()), "")
        if first != "[":
            return None
        try:
            return json.loads("[" + handle.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a JSON list of rows, got invalid JSON ({str(error)[:200]}).") from None


def _jsonl_documents(path: Path, section: TextSource, bad: BadTexts) -> Iterator[SourceDocument]:
    for number, row in json_lines(path):
        yield from _row_documents(row, section, f"{path}:{number}", "lines", bad, (path, number))


def _json_documents(path: Path, section: TextSource, bad: BadTexts) -> Iterator[SourceDocument]:
    rows = json_list(path)
    if rows is None:
        yield from _jsonl_documents(path, section, bad)
        return
    first_column = text_columns(section)[0]
    for number, row in enumerate(rows):
        # A list of texts has no keys.
        row = {first_column: row} if isinstance(row, str) else row
        yield from _row_documents(row, section, f"{path}: row {number}", "rows", bad, (path, number))


def _row_documents(
    row: Any, section: TextSource, where: str, rows: str, bad: BadTexts, place: RowPlace
) -> Iterator[SourceDocument]:
    """Yield the document of a JSON row, if it has one."""
    columns = text_columns(section)
    missing = next((name for name in columns if not isinstance(row, dict) or name not in row), None)
    if missing is None:
        yield from _documents([row[name] for name in columns], section, where, bad, place=place)
        return
    keys = f", got one with {', '.join(list(map(str, row))[:8])}" if isinstance(row, dict) and row else ""
    near = did_you_mean(missing, row) if isinstance(row, dict) else ""
    what = f"{rows} that are no JSON object with the key {missing!r}"
    bad.skip(what, f"{where}: expected a JSON object with the key {missing!r}{keys}", f"{COLUMN_REMEDY}{near}")


def _parquet_documents(path: Path, section: TextSource, bad: BadTexts) -> Iterator[SourceDocument]:
    # Imported lazily: it is slow, and other files do not need it. `datasets` is not used, because it decodes every column and
    # stops at the first row that is not UTF-8.
    import pyarrow as pa
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns, recorded = text_columns(section), (file.schema_arrow.metadata or {}).get(b"tokenizer_sha256")
            require_columns(section, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=list(columns)):
                values = [as_bytes(batch.column(name), pa).to_pylist() for name in columns]
                for each in zip(*values, strict=True):
                    made_by = recorded and recorded.decode()
                    yield from _documents(each, section, f"{path}: row {row}", bad, made_by, (path, row))
                    row += 1
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: row {row}: expected a parquet file, got a damaged one ({reason}). Get the file again; what was harvested "
            "is kept."
        ) from None


def as_bytes(values: Any, pa: Any) -> Any:
    """Return a column of strings as bytes, so that a value that is not UTF-8 affects its own row only; others as they are."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return values.cast(pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary())
    return values


READERS: dict[str, Reader] = {
    ".txt": _txt_documents,
    ".json": _json_documents,
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}
KINDS = ", ".join(READERS)


def hub_documents(section: TextSource, bad: BadTexts) -> Iterator[SourceDocument]:
    """Yield the documents of a Hugging Face dataset; rows without text are left out and counted."""
    dataset = _load_dataset(
        section.dataset, section.dataset_config, split=section.dataset_split, revision=section.dataset_revision
    )
    rows, number = iter(dataset), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # noqa: BLE001
            # Broken connections and damaged datasets raise different errors in every library involved.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"{section.dataset}: row {number} could not be read ({reason}). What was harvested or saved is kept; the same "
                "command continues."
            ) from None
        if row is None:
            return
        require_columns(section, row, str(section.dataset))
        values = [row[name] for name in text_columns(section)]
        yield from _documents(values, section, f"{section.dataset}: row {number}", bad)
        number += 1


def _load_dataset(*arguments: Any, **options: Any) -> Any:
    # Imported lazily: it takes a second, and the embedded corpus does not need it.
    import datasets

    try:
        # A dataset's own code would run here; no version of `datasets` may do that.
        return datasets.load_dataset(*arguments, streaming=True, trust_remote_code=False, **options)
    except Exception as error:  # noqa: BLE001
        # Whatever the Hub client raises (offline, unknown id, no access), the remedy is the same.
        raise ValueError(
            f"text.dataset: {arguments[0]!r} could not be downloaded from the Hugging Face Hub ({type(error).__name__}: "
            f"{error}). Check the id and the "
            "connection, or set text.source: files, or embedded with model.id: embedded."
        ) from None


def require_columns(section: TextSource, columns: Iterable[str], where: str) -> None:
    """Raise ``ValueError`` if a column of a text is absent; the message names the nearest of those that are there."""
    there = list(columns)
    for name in text_columns(section):
        if name not in there:
            near = did_you_mean(name, there)
            raise ValueError(f"text.column: expected one of {', '.join(there)} of {where}, got {name!r}.{near}")


def _documents(
    values: Sequence[Any],
    section: TextSource,
    where: str,
    bad: BadTexts,
    tokenizer: str | None = None,
    place: RowPlace | None = None,
) -> Iterator[SourceDocument]:
    """Yield the document in a row's columns, or nothing if they hold none."""
    try:
        found = document_of(joined_columns(values, section.separator), tokenizer)
    except UnreadableRowError as error:
        bad.skip(error.what, f"{where}: expected {error.found}", COLUMN_REMEDY)
        return
    yield SourceDocument(bad.clean(found, where), found.kind, found.size, found.tokenizer, place)
