"""Example latents of a report, read from the ``features.jsonl`` of the same dictionary."""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ...sae.files import read_json, require_crc32
from .links import address

# Entry of features.json: CRC-32 of the records.
RECORDS_DIGEST = "records_crc32"
# Examples are the live latents at these quantiles of firing density, so that none is picked by hand.
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
CONTEXTS, TOKENS, BEFORE, AFTER = 3, 5, 14, 8
FIGURES = re.compile(r'"latent": ?(\d+),.{0,80}?"density": ?([\d.eE+-]+)')
LATENT = re.compile(r'"latent": ?(\d+),')

log = logging.getLogger(__name__)


class ContextToken(NamedTuple):
    """A token of a context: text, shade (0 to 1, the activation relative to the latent's maximum), activation."""

    text: str
    shade: float
    activation: str
    peak: bool


class ExampleLatent(NamedTuple):
    """A latent with its strongest contexts, and the address of its entry on the features page."""

    latent: int
    href: str
    density: float
    maximum: float
    tokens: list[str]
    words: str
    contexts: list[list[ContextToken]]
    promoted: list[str]


class FeaturesFiles(NamedTuple):
    """The records of a dictionary's latents, the description of the file, and the page."""

    records: Path
    about: dict[str, Any]
    page: Path


def features_files(directories: Iterable[Path], n_latents: int | None = None) -> FeaturesFiles | None:
    """Return the first features files at the directories' default places, if they are of a dictionary of this size.

    Damaged ones are left out with a warning: the page of another result does not depend on them.
    """
    for directory in directories:
        for folder in (directory / "features", directory):
            records = folder / "features.jsonl"
            if not (records.is_file() and records.with_suffix(".json").is_file()):
                continue
            try:
                about = about_records(records)
            except ValueError as error:
                log.warning("No latents are shown: %s", error)
                continue
            # Those of vectors have no contexts to show.
            if "schema_version" in about and n_latents in (None, about.get("n_latents")):
                return FeaturesFiles(records, about, records.with_suffix(".html"))
    return None


def about_records(records: Path) -> dict[str, Any]:
    """Return the description of a file of records, ``features.json`` beside it.

    Raises:
        ValueError: If it is missing or damaged, or the records differ from the checksum in it.
    """
    beside = records.with_suffix(".json")
    about = read_json(beside)
    require_crc32(records, about.get(RECORDS_DIGEST), beside.name)
    return about


def example_latents(files: FeaturesFiles, page: Path) -> list[ExampleLatent]:
    """Return latents at fixed quantiles of firing density; ``page`` is the page that links to them."""
    return [
        example_of(record, feature_address(files, record["latent"], page)) for record in records_at_quantiles(files.records)
    ]


def records_at_quantiles(path: Path) -> list[dict[str, Any]]:
    """Return the records of the latents at ``QUANTILES`` of firing density, the rarest first."""
    densities = []
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            found = FIGURES.search(line[:300])
            latent, density = found.groups() if found else (lambda r: (r["latent"], r["density"]))(json.loads(line))
            if float(density or 0) > 0:
                densities.append((float(density), int(latent)))
    densities.sort()
    places = dict.fromkeys(int(share * len(densities)) for share in QUANTILES if densities)
    records = records_of(path, {densities[place][1] for place in places})
    return [records[latent] for _, latent in (densities[place] for place in places)]


def records_of(path: Path, latents: set[int]) -> dict[int, dict[str, Any]]:
    """Return the records of some latents; the other lines are skipped without being parsed."""
    found: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            named = LATENT.search(line[:80])
            if named and int(named[1]) in latents:
                found[int(named[1])] = json.loads(line)
            if len(found) == len(latents):
                break
    return found


def top_tokens(record: dict[str, Any], count: int = TOKENS) -> list[str]:
    """Return the tokens on which a latent's activations sum to most."""
    return [entry["token"] for entry in record["top_tokens"][:count]]


def latent_label(record: dict[str, Any]) -> str:
    """Return what a latent is about in a few words: its explanation, name or predicate, else its top tokens."""
    words = (record.get("explanation") or {}).get("text") or record.get("name") or _predicate(record)
    return words or " ".join(top_tokens(record, 3))


def _predicate(record: dict[str, Any]) -> str:
    return (record["details"].get("predicate_f1") or {}).get("predicate") or ""


def is_gapped(tokens: Iterable[str]) -> bool:
    """Return True if no token starts with a space, as in word-level tokenizers, so that spaces go between tokens."""
    return not any(token[:1].isspace() for token in tokens)


def feature_address(files: FeaturesFiles, latent: int, page: Path) -> str:
    """Return the URL of a latent on its features page; empty if there is no such page."""
    return f"{address(files.page, page)}#{latent}" if files.page.is_file() else ""


def example_of(record: dict[str, Any], href: str = "") -> ExampleLatent:
    """Return a record of ``features.jsonl`` with its strongest contexts; ``href`` is the address of its entry."""
    top = record["max_activation"] or 1.0
    contexts = [_context(example, top) for example in record["top"][:CONTEXTS]]
    words = (record["explanation"] or {}).get("text") or _predicate(record)
    promoted = [entry["token"] for entry in (record.get("logits") or {}).get("promoted", ())[:TOKENS]]
    return ExampleLatent(record["latent"], href, record["density"], top, top_tokens(record), words, contexts, promoted)


def _context(example: dict[str, Any], top: float) -> list[ContextToken]:
    start, end = max(0, example["peak"] - BEFORE), example["peak"] + AFTER
    texts, values = example["tokens"][start:end], example["activations"][start:end]
    return [
        ContextToken(text, min(1.0, value / top), f"{value:.3g}" if value > 0 else "", start + place == example["peak"])
        for place, (text, value) in enumerate(zip(texts, values, strict=True))
    ]
