"""Features of dictionaries of vectors from files: each latent's strongest rows, with their labels, texts or pictures."""

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sae.dictionary import SparseDictionary
from ...sae.files import file_crc32, replacing, write_json
from ...training.activations.vector_files import VectorFiles, vector_problems
from ...training.recipe import HarvestSection
from ...training.shortfalls import shortfall
from ...training.stages import stage
from ..checkpoint import LoadedCheckpoint
from ..heldout import DEFAULT_TOKENS, told_shortfalls
from ..pages.examples import RECORDS_DIGEST
from ..pages.render import render_file
from ..result import Features
from ..sanity import ROWS_AT_ONCE

VECTORS_SCHEMA = 1
EXAMPLES = 12
# Columns of the table of rows that the page knows; others are kept in the records.
LABEL, PICTURE = "label", "image"
# A picture larger than this is no thumbnail; all together must keep a page that browsers open at once.
PICTURE_BYTES, ALL_PICTURES_BYTES = 1 << 15, 1 << 23
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}


@dataclass(frozen=True)
class RowTable:
    """Table of the vectors: one record per row of the files, in their order. Empty if nothing is known."""

    records: Sequence[Mapping[str, Any]]
    folder: Path

    @classmethod
    def read(cls, place: str | None, rows: int) -> "RowTable":
        """Read a table (.csv, .jsonl or .parquet) with one record per vector.

        Raises:
            ValueError: If it cannot be read, or has another number of records.
        """
        if place is None:
            return cls((), Path())
        # Imported lazily: most dictionaries have no such table.
        import pandas as pd

        path = Path(place)
        readers = {".csv": pd.read_csv, ".jsonl": lambda file: pd.read_json(file, lines=True), ".parquet": pd.read_parquet}
        if path.suffix not in readers:
            raise ValueError(f"harvest.rows: {path}: expected one of {', '.join(readers)}, got {path.suffix!r}.")
        try:
            frame = readers[path.suffix](path)
        except Exception as error:  # noqa: BLE001 - pandas and pyarrow raise many types for a damaged or missing file
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"harvest.rows: {path}: expected a table of one record per vector, got {reason}.") from None
        if len(frame) != rows:
            raise ValueError(f"harvest.rows: {path}: expected {rows:,} records, one per vector, got {len(frame):,}.")
        # As JSON: numbers, texts and nothing else.
        return cls(json.loads(frame.to_json(orient="records")), path.parent)

    def labels(self) -> list[str] | None:
        """Return each row's label, or ``None`` if there are none."""
        if not self.records or LABEL not in self.records[0]:
            return None
        return ["" if record[LABEL] is None else str(record[LABEL]) for record in self.records]


@torch.no_grad()
def describe_vectors(
    opened: LoadedCheckpoint, section: HarvestSection, out: Path, tokens: int | None = None, examples: int = EXAMPLES
) -> Features:
    """Describe every latent on held-out vectors; write ``features.jsonl``, ``features.json`` and ``features.html``.

    A record has the latent's density, largest activation, its ``examples`` strongest rows, and, where rows have labels, the
    label that its firing predicts best: precision, recall and their harmonic mean (F1) over all rows read.

    Raises:
        ValueError: If files or the table of rows cannot be read, or nothing is held out.
    """
    vectors, (member, *_) = VectorFiles(section), opened.members
    table = RowTable.read(section.rows, vectors.rows)
    wanted = tokens or DEFAULT_TOKENS
    x, numbers = vectors.heldout(wanted)
    finite = torch.isfinite(x).all(-1)
    x, numbers = x[finite], numbers[finite.numpy()]
    if not len(x):
        raise ValueError(
            f"{opened.name}: harvest.heldout: expected held-out vectors, got none of {vectors.rows:,}. Raise it: --set "
            "harvest.heldout=0.1."
        )
    if x.shape[1] != member.dictionary.d_in:
        raise ValueError(f"harvest.files: expected width {member.dictionary.d_in}, the dictionary's d_in, got {x.shape[1]}.")
    found = _Collected(member.dictionary, table.labels(), examples)
    with stage("features", len(x), "vectors") as shown:
        for start in range(0, len(x), ROWS_AT_ONCE):
            found.add(x[start : start + ROWS_AT_ONCE], numbers[start : start + ROWS_AT_ONCE])
            shown.update(found.rows)
    arguments, provenance = member.dictionary.arguments(), member.provenance
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "features.jsonl") as temporary, temporary.open("w", encoding="utf-8") as handle:
        for record in found.records(table):
            handle.write(json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
    lacking = shortfall("tokens", wanted, len(x), "held-out vectors", "examples and scores use all of them")
    about = {
        "vectors_schema_version": VECTORS_SCHEMA,
        "checkpoint": opened.name,
        "kind": arguments["kind"],
        "encoder": json.dumps(arguments["encoder"]),
        "n_latents": member.dictionary.n_latents,
        "d_in": member.dictionary.d_in,
        "files": [str(file.path) for file in vectors.files],
        "rows": section.rows,
        "columns": list(table.records[0]) if table.records else [],
        "tokens": len(x),
        "tokens_asked": wanted,
        "dead": int((found.fired == 0).sum()),
        "n_labels": len(found.names),
        "skipped": [f"vectors that are not finite: {int((~finite).sum()):,}"] if not bool(finite.all()) else [],
        "changed": vector_problems(provenance.get("content") or {}, vectors.content),
        "git_commit": provenance.get("git_commit"),
        **told_shortfalls(opened.name, [provenance], lacking),
        RECORDS_DIGEST: file_crc32(out / "features.jsonl"),
        "pictures": pictures_of(found, table),
    }
    write_json(out / "features.json", about, sealed=True)
    page = {"page_path": str(render_file(out / "features.json"))}
    return Features({key: value for key, value in about.items() if key != "pictures"} | page, out / "features.jsonl")


def vectors_summary(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as pairs of name and value, for the console."""
    return [
        ("dictionary", f"{about['kind']} {about['d_in']} -> {about['n_latents']}"),
        ("read", f"{about['tokens']:,} held-out vectors of {len(about['files'])} files"),
        ("latents", f"{about['n_latents']:,}, {about['dead']:,} of them dead on these vectors"),
        ("labels", f"{about['labels']:,}" if about["n_labels"] else "none: harvest.rows names no table with a column label"),
    ]


class _Collected:
    """Strongest rows of each latent, and how often it fires on each label."""

    def __init__(self, dictionary: SparseDictionary, labels: Sequence[str] | None, examples: int):
        n = dictionary.n_latents
        self.dictionary, self.rows, self.fired = dictionary, 0, torch.zeros(n, dtype=torch.int64)
        self.values, self.numbers = torch.zeros(n, examples), torch.full((n, examples), -1, dtype=torch.int64)
        self.names = sorted(set(labels or ()) - {""})
        numbered = {name: number for number, name in enumerate(self.names)}
        self.label_of = None if labels is None else torch.tensor([numbered.get(name, -1) for name in labels])
        self.of_label = torch.zeros(len(self.names), dtype=torch.int64)
        self.together = torch.zeros(n, len(self.names), dtype=torch.int64)

    def add(self, x: Tensor, numbers: np.ndarray) -> None:
        code = self.dictionary.encode(x)
        latents, values, tokens = code.latents, code.values, code.token_ids()
        fires = values != 0
        latents, values, rows = latents[fires], values[fires].float(), torch.from_numpy(numbers)[tokens[fires]]
        self.rows += len(x)
        self.fired += torch.bincount(latents, minlength=len(self.fired))
        dense = torch.zeros(len(self.fired), len(x))
        dense[latents, tokens[fires]] = values
        kept = min(self.values.shape[1], len(x))
        top = dense.abs().topk(kept, dim=1).indices
        values = torch.cat([self.values, dense.gather(1, top)], 1)
        own = torch.cat([self.numbers, torch.from_numpy(numbers)[top]], 1)
        order = values.abs().argsort(dim=1, descending=True, stable=True)[:, : self.values.shape[1]]
        self.values, self.numbers = values.gather(1, order), own.gather(1, order)
        if self.label_of is not None:
            here = self.label_of[torch.from_numpy(numbers)]
            self.of_label += torch.bincount(here[here >= 0], minlength=len(self.names))
            labels = self.label_of[rows]
            known = labels >= 0
            pairs = latents[known] * len(self.names) + labels[known]
            self.together += torch.bincount(pairs, minlength=self.together.numel()).view_as(self.together)

    def records(self, table: RowTable) -> Iterator[dict[str, Any]]:
        f1 = 2 * self.together / (self.fired[:, None] + self.of_label).clamp_min(1)
        for latent in range(len(self.fired)):
            fired = int(self.fired[latent])
            label = None
            if self.names and fired:
                best = int(f1[latent].argmax())
                both = int(self.together[latent, best])
                label = {
                    "label": self.names[best],
                    "f1": round(float(f1[latent, best]), 6),
                    "precision": round(both / fired, 6),
                    "recall": round(both / max(int(self.of_label[best]), 1), 6),
                }
            yield {
                "latent": latent,
                "density": fired / max(self.rows, 1),
                "dead": not fired,
                "max": float(self.values[latent, 0]),
                "label": label,
                "examples": [
                    {"row": row, "value": value, **({} if not table.records else {"of": table.records[row]})}
                    for row, value in self.strongest(latent)
                ],
            }

    def strongest(self, latent: int) -> list[tuple[int, float]]:
        """Return the numbers and activations of a latent's strongest rows."""
        pairs = zip(self.numbers[latent].tolist(), self.values[latent].tolist(), strict=True)
        return [(row, round(value, 6)) for row, value in pairs if value != 0]


def pictures_of(found: _Collected, table: RowTable) -> dict[str, str]:
    """Return the thumbnails of all examples as data addresses by row, until a page would be too large.

    Paths in the table's column ``image`` are relative to the table; files elsewhere than below its folder are not read.
    """
    if not table.records or PICTURE not in table.records[0]:
        return {}
    pictures: dict[str, str] = {}
    size, root = 0, os.path.realpath(table.folder)
    for latent in range(len(found.fired)):
        for row, _ in found.strongest(latent):
            path = Path(os.path.realpath(table.folder / str(table.records[row][PICTURE])))
            kind = PICTURES.get(path.suffix.lower())
            if str(row) in pictures or kind is None or not path.is_relative_to(root) or not path.is_file():
                continue
            if path.stat().st_size > PICTURE_BYTES:
                continue
            data = base64.b64encode(path.read_bytes()).decode()
            size += len(data)
            if size > ALL_PICTURES_BYTES:
                return pictures
            pictures[str(row)] = f"data:{kind};base64,{data}"
    return pictures
