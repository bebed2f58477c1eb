"""Similarity of dictionaries of neighboring layers, seeds or widths: ``similarity.json`` and its page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sae.dictionary import SparseDictionary
from ...sae.files import json_number, write_json
from ...training.stages import stage
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..checkpoint import LoadedCheckpoint, activations_on_text, open_checkpoint, short_names, with_grids_members, with_model
from ..features.scores import activation_auroc
from ..pages.render import render_file
from ..result import Report
from .stitching import SAME, LatentMatching, Stitching, match_latents, random_cosines, stitch

SCHEMA_VERSION = 1
DEFAULT_TOKENS = 20_000
FILE = "similarity.json"
# Of the histograms of cosines.
BINS = 40

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Compared:
    """One dictionary: its checkpoint's number, its hooks if they are known, and its latents that training did not lose."""

    name: str
    checkpoint: int
    dictionary: SparseDictionary
    hooks: tuple[tuple[str, ...], tuple[str, ...]] | None
    alive: Tensor


def similarity(
    checkpoints: Sequence[str | Path],
    out: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    activations: Tensor | None = None,
    seed: int = 0,
    options: CheckpointOptions = NO_OPTIONS,
    model: Any = None,
    tokenizer: Any = None,
) -> Report:
    """Compare the latents of dictionaries in pairs; write ``similarity.json`` and its page, return the former.

    Checkpoints with one dictionary each are compared with each other: seeds, widths, or layers. Of directories with several,
    neighboring hooks are compared, and equal hooks of two directories. Directions are compared in the space that the
    dictionaries write to, which is the residual stream at most sites. Latents that training counted as dead are left out.

    Example::

        for row in sparsary.similarity(["runs/seed-0", "runs/seed-1"], tokens=50_000)["rows"]:
            print(row["a"], row["b"], row["matched_cosine"], row["matched_share"], row["novel_share"])

    Args:
        out: Output directory; by default no files are written.
        tokens: Held-out tokens for stitching, which is measured between dictionaries of the same hooks; 0: no stitching.
        activations: Stitch on these activations, ``(tokens, d_in)``, in place of the model's.
        seed: Seed of the random directions that are the floor.
        options: Facts that the checkpoints' files leave open.
        model: Language model in memory, and ``tokenizer``, as in ``evaluate``.

    Returns:
        The content of ``similarity.json``; ``rows`` has one entry per pair. With ``out``, ``page_path`` is the page's.

    Raises:
        ValueError: If there are fewer than two dictionaries, or a checkpoint, its model or its text cannot be loaded.
    """
    options = with_model(options, model, tokenizer)
    names = with_grids_members([str(checkpoint) for checkpoint in checkpoints])
    opened = [open_checkpoint(name, options) for name in names]
    members = list(_members(opened, names))
    pairs = list(_pairs(members))
    if not pairs:
        raise ValueError(
            f"CHECKPOINT: expected two dictionaries or more to compare, got {len(members)}"
            f"{' of different hooks in different directories' if len(members) > 1 else ''}. Give another seed, width or layer."
        )
    rows = []
    with stage("similarity", len(pairs), "pairs") as shown:
        for done, (a, b) in enumerate(pairs):
            rows.append(_matched(members[a], members[b], seed))
            shown.update(done + 1)
    _stitch_pairs(rows, pairs, members, opened, tokens, activations)
    found: Row = {
        "similarity_version": SCHEMA_VERSION,
        "checkpoints": names,
        "tokens": tokens if activations is None else len(activations),
        "seed": seed,
        "same": SAME,
        "rows": rows,
    }
    if out is None:
        return Report(found, rows)
    path = Path(out) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found, sealed=True)
    return Report(found | {"path": str(path), "page_path": str(render_file(path))}, rows)


def similarity_table(found: Row) -> tuple[list[str], list[list[str]]]:
    """Return a table for the terminal: the header, and a row per pair."""
    head = ["a", "b", "latents", "matched cosine", "random", f"above {SAME}", "novel", "reconstruction", "of"]
    keys = ("matched_cosine", "random_cosine", "matched_share", "novel_share", "reconstruction_share")
    rows = []
    for row in found["rows"]:
        figures = ["-" if row[key] is None else f"{row[key]:.3f}" for key in keys]
        stitched = "-" if row["stitched"] is None else f"{row['stitched']}: {row['active']:,} active"
        rows.append([row["a"], row["b"], f"{row['latents_a']:,}, {row['latents_b']:,}", *figures, stitched])
    return head, rows


def _members(opened: Sequence[LoadedCheckpoint], names: Sequence[str]) -> Iterator[_Compared]:
    for number, (checkpoint, name) in enumerate(zip(opened, short_names(names), strict=True)):
        for member in checkpoint.members:
            dictionary = member.dictionary.requires_grad_(False).eval()
            try:
                hooks = dictionary.hooks
            except ValueError:
                hooks = None
            usage = getattr(dictionary, "training_usage", None)
            alive = torch.ones(dictionary.n_latents, dtype=torch.bool) if usage is None else ~usage.dead.cpu()
            several = len(checkpoint.members) > 1 and hooks is not None
            yield _Compared(f"{name}: {', '.join(hooks[1])}" if several and hooks else name, number, dictionary, hooks, alive)


def _pairs(members: Sequence[_Compared]) -> Iterator[tuple[int, int]]:
    """Yield the pairs that are compared, as numbers of members."""
    counts = [sum(member.checkpoint == other.checkpoint for other in members) for member in members]
    for a, first in enumerate(members):
        for b in range(a + 1, len(members)):
            second = members[b]
            if first.checkpoint == second.checkpoint:
                wanted = b == a + 1
            else:
                wanted = counts[a] == counts[b] == 1 or first.hooks == second.hooks
            if wanted:
                yield a, b


def _matched(a: _Compared, b: _Compared, seed: int) -> Row:
    atoms = [member.dictionary.atoms[member.alive.to(member.dictionary.atoms.device)] for member in (a, b)]
    row: Row = {"a": a.name, "b": b.name, "latents_a": len(atoms[0]), "latents_b": len(atoms[1])}
    row |= dict.fromkeys(
        ("matched_cosine", "random_cosine", "matched_share", "nearest_cosine_a", "nearest_cosine_b", "nearest_share_a")
    )
    row |= {"nearest_share_b": None, "stitched": None, "active": None, "novel_share": None, "reconstruction_share": None}
    row |= {"cosine_auroc": None, "fvu_small": None, "fvu_large": None, "reasons": {}}
    row |= {"matched_counts": None, "random_counts": None}
    if atoms[0].shape[1] != atoms[1].shape[1]:
        row["reasons"]["matched_cosine"] = f"directions of width {atoms[0].shape[1]} and {atoms[1].shape[1]} have no cosine"
        return row
    if not len(atoms[0]) or not len(atoms[1]):
        row["reasons"]["matched_cosine"] = "training lost all latents"
        return row
    found: LatentMatching = match_latents(atoms[0], atoms[1])
    row |= {
        "nearest_cosine_a": _number(found.nearest_a.mean()),
        "nearest_cosine_b": _number(found.nearest_b.mean()),
        "nearest_share_a": _number((found.nearest_a >= SAME).mean()),
        "nearest_share_b": _number((found.nearest_b >= SAME).mean()),
    }
    if found.cosines is None:
        row["reasons"]["matched_cosine"] = "too many latents to match one to one: nearest ones only"
        return row
    row["matched_cosine"], row["matched_share"] = _number(found.cosines.mean()), _number((found.cosines >= SAME).mean())
    row["matched_counts"] = _counts(found.cosines)
    floor = random_cosines(len(atoms[0]), len(atoms[1]), atoms[0].shape[1], seed)
    return row if floor is None else row | {"random_cosine": _number(floor.mean()), "random_counts": _counts(floor)}


def _counts(cosines: np.ndarray) -> list[int]:
    """Return the numbers of cosines in bins of equal width from -1 to 1."""
    # Rounding may leave a cosine slightly above 1.
    return np.histogram(cosines.clip(-1, 1), BINS, (-1, 1))[0].tolist()


def _stitch_pairs(
    rows: Sequence[Row],
    pairs: Sequence[tuple[int, int]],
    members: Sequence[_Compared],
    opened: Sequence[LoadedCheckpoint],
    tokens: int,
    activations: Tensor | None,
) -> None:
    """Add the figures of stitching to the rows of pairs that read and write the same hooks."""
    wanted: dict[int, list[tuple[Row, int]]] = {}
    for row, (a, b) in zip(rows, pairs, strict=True):
        small, large = (b, a) if members[a].dictionary.n_latents > members[b].dictionary.n_latents else (a, b)
        reason = _unstitchable(members[small], members[large], tokens, activations)
        if reason:
            row["reasons"]["novel_share"] = reason
        else:
            wanted.setdefault(large, []).append((row, small))
    if activations is not None:
        for large, several in wanted.items():
            for row, small in several:
                row |= _stitched(
                    members[small], members[large], stitch(*_both(members, small, large, activations), activations)
                )
        return
    for number, checkpoint in enumerate(opened):
        own = {member.hooks: at for at, member in enumerate(members) if member.checkpoint == number and at in wanted}
        if not own:
            continue
        for hooks, x, y in _texts(checkpoint, tokens):
            large = own.get(hooks)
            if large is None:
                continue
            for row, small in wanted[large]:
                row |= _stitched(members[small], members[large], stitch(*_both(members, small, large, x), x, y))


def _both(members: Sequence[_Compared], small: int, large: int, x: Tensor) -> tuple[SparseDictionary, SparseDictionary]:
    return members[small].dictionary.to(x.device), members[large].dictionary.to(x.device)


def _texts(checkpoint: LoadedCheckpoint, tokens: int) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
    for _, dictionary, x, y in activations_on_text(checkpoint, tokens):
        yield dictionary.hooks, x, y


def _unstitchable(small: _Compared, large: _Compared, tokens: int, activations: Tensor | None) -> str | None:
    a, b = small.dictionary, large.dictionary
    if (a.d_in, a.d_out) != (b.d_in, b.d_out) or len(a.sites) > 1 or len(b.sites) > 1:
        return "stitching needs two dictionaries of one hook each, of the same widths"
    if activations is not None:
        return None if a.arguments()["kind"] == b.arguments()["kind"] == "sae" else "activations alone stitch SAEs only"
    if not tokens:
        return "no tokens were asked for (--tokens)"
    if small.hooks is None or small.hooks != large.hooks:
        return "stitching needs two dictionaries of the same hooks"
    return None if a.model_id == b.model_id else "stitching needs two dictionaries of the same model"


def _stitched(small: _Compared, large: _Compared, found: Stitching) -> Row:
    active = int(found.active.sum())
    row: Row = {
        "stitched": f"{large.name} into {small.name}",
        "active": active,
        "novel_share": _number(found.novel.sum() / active) if active else None,
        "reconstruction_share": _number(found.reconstruction.sum() / active) if active else None,
        "fvu_small": _number(found.fvu_small),
        "fvu_large": _number(found.fvu_large),
    }
    nearest = match_latents(large.dictionary.atoms, small.dictionary.atoms, one_to_one=False).nearest_a
    if found.novel.any() and found.reconstruction.any():
        row["cosine_auroc"] = _number(activation_auroc(nearest[found.reconstruction], nearest[found.novel]))
    return row


def _number(value: Any) -> float | None:
    number = json_number(float(value))
    return None if number is None else round(number, 6)
