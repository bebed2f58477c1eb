"""Page of the latents of a dictionary of vectors: their strongest rows, with labels, texts and pictures."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .document import document, encoder_label, kind_label
from .numbers import show
from .tables import Cell, Column, FigureTile

# Latents on the page; all are in features.jsonl.
SHOWN = 300
# Columns of the table of rows that have a place of their own.
LABEL, PICTURE, NAMES = "label", "image", ("text", "name", "id")
TEXT_LENGTH = 160

COLUMNS = (
    Column(
        "F1",
        "f1",
        None,
        "Harmonic mean of precision and recall with which the latent's firing predicts its label, the "
        "one it predicts best, over all vectors read.",
    ),
    Column("density", "density", None, "Share of vectors on which the latent fires."),
    Column("largest", "max", None, "Largest activation."),
    Column("strongest vectors", "examples", None, "The vectors with the largest activations."),
)


class ShownExample(NamedTuple):
    """A row on the page: its number, activation, label, text, and a picture's data address; the last three may be empty."""

    row: int
    value: str
    label: str
    text: str
    picture: str


def render_vectors(about: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> str:
    """Render the features of a dictionary of vectors as a page. Equal input gives equal bytes."""
    pictures = about.get("pictures") or {}
    alive = [record for record in records if not record["dead"]]
    alive.sort(key=lambda record: (-(record["label"] or {}).get("f1", 0.0), -record["density"], record["latent"]))
    latents = [
        (
            record["latent"],
            str(record.get("name") or ""),
            str((record["label"] or {}).get("label", "")),
            _cells(record),
            [_example(example, pictures) for example in record["examples"]],
        )
        for record in alive[:SHOWN]
    ]
    heading = f"{kind_label(about['kind'])} of vectors"
    tiles = [
        FigureTile("n_latents", "latents", show(about["n_latents"]), f"{show(about['dead'])} dead on these vectors"),
        FigureTile("tokens", "held-out vectors", show(about["tokens"]), f"of width {show(about['d_in'])}"),
    ]
    if about["n_labels"]:
        good = sum((record["label"] or {}).get("f1", 0.0) >= 0.5 for record in alive)
        tiles.append(
            FigureTile("n_labels", "labels", show(about["n_labels"]), f"{good} latents predict one with F1 of 0.5 or more")
        )
    return document(
        "vectors.html",
        heading,
        ("table.css", "vectors.css"),
        ("page.js", "table.js", "probing.js"),
        command="features",
        heading=heading,
        shape=f"{show(about['n_latents'])} latents \u00b7 {len(latents)} shown",
        facts={
            "files": ", ".join(about["files"]),
            "table of rows": about["rows"],
            "encoder": encoder_label(about["encoder"]),
            **({"left out": "; ".join(about["skipped"])} if about["skipped"] else {}),
            **({"doubts": "; ".join(about["changed"])} if about["changed"] else {}),
        },
        tiles=tiles,
        columns=COLUMNS,
        latents=latents,
        named=any("name" in record for record in alive),
        images=bool(pictures),
    )


def _cells(record: Mapping[str, Any]) -> list[Cell]:
    f1 = (record["label"] or {}).get("f1")
    return [
        Cell(show(f1, "", 3), f1, reason="" if f1 is not None else "no labels"),
        Cell(show(record["density"], digits=3), record["density"]),
        Cell(show(record["max"], digits=3), record["max"]),
    ]


def _example(example: Mapping[str, Any], pictures: Mapping[str, str]) -> ShownExample:
    of = example.get("of") or {}
    text = next((str(of[name]) for name in NAMES if of.get(name) not in (None, "")), "")
    label = of.get(LABEL)
    return ShownExample(
        example["row"],
        show(example["value"], digits=3),
        "" if label is None else str(label),
        text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]}\u2026",
        pictures.get(str(example["row"]), ""),
    )
