"""Names of latents: the word whose vector has the largest cosine with the decoder direction; ``names.json`` and ``names.html``.

After Discover-then-Name (Rao et al. 2024, arXiv:2407.14499), which names latents of image embeddings by text embeddings. Ours
are the margin, the floor of random directions, and a model's unembedding as the default vectors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...sae.files import file_crc32, read_json, replacing, write_json
from ...training.activations.model import LanguageModel, load_model
from ...training.recipe import ModelSection
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..checkpoint import LoadedCheckpoint, open_checkpoint, section_of_vectors, with_model
from ..features.logit_lens import unembedding
from ..features.predicates import token_texts
from ..features.run import ABOUT_FILE, RECORDS_FILE
from ..pages.examples import RECORDS_DIGEST, about_records
from ..pages.render import render_file
from ..result import Report
from .named_vectors import NamedVectors, read_named_vectors
from .names_file import NAMES_FILE, NAMES_FOLDER
from .nearest import FLOOR_DIRECTIONS, nearest_names, random_directions

NAMES_VERSION = 1
# Share of random directions below the floor.
FLOOR = 0.95


@torch.no_grad()
def name(
    checkpoint: str | Path,
    vectors: str | Path | None = None,
    out: str | Path | None = None,
    center: bool = False,
    seed: int = 0,
    options: CheckpointOptions = NO_OPTIONS,
    model: LanguageModel | Any = None,
    tokenizer: Any = None,
) -> Report:
    """Name every latent by the vector nearest to its decoder direction; write ``names.json`` and ``names.html``.

    If the checkpoint has a ``features.jsonl``, each of its records gets ``name``, ``name_cosine`` and ``name_margin``.

    Args:
        vectors: File of vectors with names. Default: tokens, by the unembedding of the checkpoint's model.
        out: Folder of the files. Default: ``CHECKPOINT/names``.
        center: Take the mean of the vectors away first. The unembedding is always centered: logits are defined up to it.
        seed: Seed of the random directions of the floor.
        model: Language model in memory, and ``tokenizer``, as in ``evaluate``.

    Raises:
        ValueError: If the vectors cannot be read, have another width, or the dictionary does not write to the residual stream
            and no file is given.

    Example::

        found = sparsary.name("runs/clip", "words.safetensors")
        found["latents"][17]["name"], found["latents"][17]["cosine"], found["floor_cosine"]
    """
    opened = open_checkpoint(checkpoint, with_model(options, model, tokenizer))
    if len(opened.members) != 1:
        raise ValueError(f"{opened.name}: expected one dictionary, got {len(opened.members)}. Name one: --hook HOOK.")
    target = Path(out) if out is not None else opened.results / NAMES_FOLDER
    words, directions = _of_model(opened) if vectors is None else _of_file(opened, vectors, center)
    found = nearest_names(directions, words)
    floor = nearest_names(random_directions(directions, max(FLOOR_DIRECTIONS, len(directions)), seed), words)
    ordered, margins = floor.cosine.sort().values, floor.margin.sort().values
    limit = float(ordered[int(FLOOR * len(ordered))])
    above = (len(ordered) - torch.searchsorted(ordered, found.cosine.contiguous(), right=False)) / len(ordered)
    rows = [
        {
            "latent": latent,
            "name": words.names[best] if best >= 0 else None,
            "cosine": _rounded(cosine),
            "margin": _rounded(margin),
            "second": words.names[second] if second >= 0 else None,
            "above_floor": bool(cosine > limit),
            "floor_share": _rounded(share),
        }
        for latent, (best, second, cosine, margin, share) in enumerate(
            zip(*(each.tolist() for each in (found.best, found.second, found.cosine, found.margin, above)), strict=True)
        )
    ]
    named = sum(row["above_floor"] for row in rows)
    features = _enter_names(opened.directory / "features" / RECORDS_FILE, rows)
    entries: dict[str, Any] = {
        "names_version": NAMES_VERSION,
        "checkpoint": opened.name,
        "encoder": json.dumps(opened.members[0].dictionary.arguments()["encoder"]),
        "n_latents": len(rows),
        "d": directions.shape[1],
        "vectors": None if vectors is None else str(vectors),
        "source": words.source,
        "words": len(words.names),
        "center": bool(center or vectors is None),
        "seed": seed,
        "floor": FLOOR,
        "floor_directions": len(ordered),
        "floor_cosine": limit,
        "floor_margin": float(margins[int(FLOOR * len(margins))]),
        "above_floor": named,
        "above_floor_share": named / len(rows),
        "distinct": len({row["name"] for row in rows if row["above_floor"]}),
        "median_cosine": float(found.cosine.median()),
        "median_floor_cosine": float(floor.cosine.median()),
        "features": features,
        "latents": rows,
    }
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / NAMES_FILE, entries, sealed=True)
    page = render_file(target / NAMES_FILE)
    return Report(entries | {"path": str(target / NAMES_FILE), "page_path": str(page)}, rows)


def _rounded(value: float) -> float:
    return round(value, 5)


def _of_model(opened: LoadedCheckpoint) -> tuple[NamedVectors, Float[Tensor, "n_latents d_model"]]:
    """Return the tokens of the checkpoint's model by its unembedding, and what latents write to the residual stream."""
    if section_of_vectors(opened) is not None:
        raise ValueError(
            f"{opened.name}: --vectors: expected a file, because this dictionary is of vectors from files, not of a model."
        )
    opened = opened.completed(text=False)
    dictionary, provenance = opened.members[0].dictionary, opened.members[0].provenance
    model = load_model(ModelSection.model_validate(provenance["model"]))
    lens = unembedding(dictionary.to(model.device), model, provenance)
    if isinstance(lens, str):
        raise ValueError(f"{opened.name}: --vectors: expected a file, because {lens}.")
    names = token_texts(model.tokenizer, len(model.tokenizer))
    # Some models' embeddings are padded beyond their tokenizer's last token.
    count = min(len(names), len(lens.readers))
    words = NamedVectors(names[:count], lens.readers[:count].float().cpu(), f"unembedding of {model.id}")
    return words.centered(), lens.written.float().cpu()


def _of_file(opened: LoadedCheckpoint, path: str | Path, center: bool) -> tuple[NamedVectors, Float[Tensor, "n_latents d"]]:
    words, dictionary = read_named_vectors(path), opened.members[0].dictionary
    if len(dictionary.sites) != 1:
        raise ValueError(f"{opened.name}: expected a dictionary of one hook, got one of {len(dictionary.sites)}.")
    directions = (dictionary.atoms * dictionary.out_scale).detach().float().cpu()
    if words.vectors.shape[1] != directions.shape[1]:
        raise ValueError(
            f"--vectors: {path}: expected width {directions.shape[1]}, the dictionary's d_out, got {words.vectors.shape[1]}."
        )
    return words.centered() if center else words, directions


def _enter_names(records: Path, rows: list[dict[str, Any]]) -> str | None:
    """Add names to the records of a checkpoint's features and render their page again; ``None`` if there are none."""
    if not records.is_file() or not records.with_name(ABOUT_FILE).is_file():
        return None
    about = about_records(records)
    if about.get("n_latents") != len(rows):
        return None
    with (
        replacing(records) as temporary,
        temporary.open("w", encoding="utf-8") as written,
        records.open(encoding="utf-8") as handle,
    ):
        for line in handle:
            record = json.loads(line)
            row = rows[record["latent"]]
            record |= {"name": row["name"], "name_cosine": row["cosine"], "name_margin": row["margin"]}
            written.write(json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
    beside = records.with_name(ABOUT_FILE)
    write_json(beside, read_json(beside) | {RECORDS_DIGEST: file_crc32(records)}, sealed=True)
    render_file(beside)
    return str(records)


def names_summary(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the main figures as pairs of name and value, for the console."""
    lines = [
        ("vectors", f"{found['words']:,} of {found['source']}{', less their mean' if found['center'] else ''}"),
        ("floor", f"cosine {found['floor_cosine']:.3f}: {found['floor']:.0%} of random directions have a lower best one"),
        (
            "named",
            f"{found['above_floor']:,} of {found['n_latents']:,} latents above it, {found['distinct']:,} different names",
        ),
        ("cosine", f"median {found['median_cosine']:.3f}, of random directions {found['median_floor_cosine']:.3f}"),
    ]
    return lines + ([("features", f"names in {found['features']}")] if found["features"] else [])


def names_table(found: Mapping[str, Any], count: int = 10) -> tuple[list[str], list[list[str]]]:
    """Return the latents with the largest margins above the floor, for the console: head and rows."""
    rows = sorted((row for row in found["latents"] if row["above_floor"]), key=lambda row: -row["margin"])[:count]
    return ["latent", "name", "cosine", "margin", "second"], [
        [str(row["latent"]), row["name"], f"{row['cosine']:.3f}", f"{row['margin']:.3f}", str(row["second"])] for row in rows
    ]
