"""Checkpoint in; ``features.jsonl``, ``features.json`` and ``features.html`` out."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sae import load_dictionary
from sae.checkpoint import read_config
from sae.dictionary import SparseDictionary
from sae.files import replacing, write_json, write_text
from sae.hub import local_directory
from training.activations.model import LanguageModel, load_model
from training.recipe import HarvestSection, ModelSection, TextSection
from transcoders.stack import hooks_of

from .collect import Limits, Source, collect
from .logits import unembedding
from .page import render
from .predicates import token_texts
from .records import SCHEMA_VERSION, SCORES, Described, Record, describe, number

RECORDS_FILE, ABOUT_FILE, PAGE_FILE = "features.jsonl", "features.json", "features.html"
DEFAULT_TOKENS = 200_000


def features(
    checkpoint: str,
    out: str | None = None,
    tokens: int | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Describe every latent of a checkpoint on held-out text; writes three files and returns ``features.json``'s content.

    The files go to ``out``, or into a folder ``features`` of the checkpoint's directory. ``tokens`` is how many held-out
    tokens are read.

    Raises:
        ValueError: If the checkpoint, its model or its text cannot be had, or do not fit each other.
    """
    described, about, _ = described_checkpoint(checkpoint, tokens, limits, progress)
    directory = Path(out) if out is not None else Path(local_directory(checkpoint)) / "features"
    return write(directory, about, described.records())


def described_checkpoint(
    checkpoint: str,
    tokens: int | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Described, dict[str, Any], LanguageModel]:
    """What is found of every latent, where it comes from, and the model that was read."""
    if tokens is not None and tokens < 1:
        raise ValueError(f"--tokens: expected at least 1, got {tokens}.")
    directory = local_directory(checkpoint)
    dictionary = load_dictionary(directory)
    config = read_config(directory)
    provenance: dict[str, Any] = config["provenance"]
    if not provenance.get("model"):
        raise ValueError(
            f"{checkpoint}: this dictionary was trained on tensors, not on a model, so there is no text to show. Train it on "
            "a model's hook."
        )
    reads, writes = hooks_of(provenance)
    model = load_model(ModelSection.model_validate(provenance["model"]))
    _require_widths(dictionary, model, reads)
    dictionary = dictionary.to(model.device)
    text = TextSection.model_validate(provenance["text"])
    harvest = HarvestSection(hooks=reads, tokens=1, **provenance["harvest"])
    source = Source(model, text, harvest, reads)
    wanted = tokens or DEFAULT_TOKENS
    collected = collect(dictionary, source.batches(dictionary, wanted), limits, progress)
    words = token_texts(model.tokenizer, len(model.tokenizer))
    seed = text.seed if text.source == "embedded" else None
    lens = unembedding(dictionary, model, provenance)
    described = describe(collected, dictionary.atoms, words, lens, seed)
    about = {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": str(checkpoint),
        "kind": config["dictionary"]["kind"],
        "encoder": json.dumps(config["dictionary"]["encoder"]),
        "n_latents": dictionary.n_latents,
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "model": model.id,
        "hooks_in": list(reads),
        "hooks_out": list(writes),
        "text": text.source,
        "tokens": collected.tokens,
        "documents": collected.documents,
        "sampled_tokens": len(collected.token_sample.tokens),
        "predicates": len(described.known.names),
        "no_factors": described.known.missing,
        "git_commit": provenance.get("git_commit"),
    }
    return described, about, model


def write(directory: Path, about: dict[str, Any], records: Iterable[Record]) -> dict[str, Any]:
    """The three files, each whole or not at all; ``records`` are read once."""
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, list[float]] = {name: [] for name in SCORES}
    dead = 0

    def passing() -> Iterable[Record]:
        nonlocal dead
        with replacing(directory / RECORDS_FILE) as temporary, temporary.open("w", encoding="utf-8") as handle:
            for record in records:
                handle.write(json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
                dead += record["dead"]
                for name, value in record["scores"].items():
                    if value is not None:
                        values[name].append(value)
                yield record

    page = render(about, passing())
    about = about | {"dead": dead}
    for name, known in values.items():
        about |= {f"{name}_median": number(np.median(known)) if known else None, f"{name}_latents": len(known)}
    write_json(directory / ABOUT_FILE, about)
    write_text(directory / PAGE_FILE, page)
    return about | {"page_path": str(directory / PAGE_FILE)}


def _require_widths(dictionary: SparseDictionary, model: LanguageModel, reads: tuple[str, ...]) -> None:
    widths = model.widths(reads)
    total = sum(widths.values())
    if total != dictionary.d_in:
        raise ValueError(
            f"{', '.join(reads)}: expected width {dictionary.d_in}, the dictionary's d_in, got {total} from {model.id}. This "
            "dictionary belongs to another model or hook."
        )


def summary(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person looks at first, as pairs of name and value."""
    lines = [
        ("dictionary", f"{about['kind']} {about['d_in']} -> {about['n_latents']}  {about['encoder']}"),
        ("read", f"{about['tokens']:,} held-out tokens of {about['documents']:,} documents"),
        ("latents", f"{about['n_latents']:,}, of which {about['dead']:,} fired nowhere"),
    ]
    for name in SCORES:
        value = about[f"{name}_median"]
        words = "undefined" if value is None else f"median {value:.3f} of {about[f'{name}_latents']:,} latents"
        lines.append((name.replace("_", " "), words))
    return lines
