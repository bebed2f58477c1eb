"""Labels for the latents of a graph: contexts in which they fire most, tokens they promote, a short text.

Contexts come from ``features.jsonl`` next to the checkpoint if ``sparsary features`` was run, else from a pass over held-out
text that evaluates only the graph's latents.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sae.sparse_code import SparseCode, group_by_latent
from ...training.activations.contexts import context_batches
from ...training.bad_rows import BadTokens
from ...training.recipe import HarvestSection, TextSection
from ...training.stages import stage
from ..features.collect import BATCH_CONTEXTS, NO_TOKEN, Collector, Limits
from ..features.run import RECORDS_FILE
from ..pages.examples import about_records
from .replacement_model import Replacement

log = logging.getLogger(__name__)

# (layer, index of the latent in that layer).
Latent = tuple[int, int]
CONTEXTS, PROMOTED, LABEL_TOKENS = 6, 5, 3
LIMITS = Limits(top=CONTEXTS, sample=0, before=15, after=6, background=0, sample_entries=0)


@dataclass(frozen=True)
class LabelledWindow:
    """A text window: its tokens, the latent's activation on each, and the index of the peak."""

    tokens: Sequence[str]
    activations: Sequence[float]
    peak: int


@dataclass(frozen=True)
class Note:
    """Notes on one latent. ``maximum`` and ``density`` are over the text that was read, or None if none was."""

    label: str = ""
    windows: tuple[LabelledWindow, ...] = ()
    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()
    maximum: float | None = None
    density: float | None = None


@torch.no_grad()
def read_heldout(
    replacement: Replacement,
    latents: Sequence[Latent],
    text: TextSection,
    harvest: HarvestSection,
    words: Sequence[str],
    tokens: int,
) -> dict[Latent, Note]:
    """Collect top contexts of latents from one pass over about ``tokens`` held-out tokens."""
    model, numbers = replacement.anatomy.model, {latent: number for number, latent in enumerate(latents)}
    hooks = {layer: replacement.anatomy.blocks[layer].sites()["mlp"][0] for layer in {layer for layer, _ in latents}}
    if not hooks:
        return {}
    collector = Collector(len(numbers), LIMITS)
    bad = BadTokens(harvest)
    with stage("top contexts", tokens) as shown:
        for some in context_batches(model, text, harvest, BATCH_CONTEXTS, heldout=True):
            batch, rows = some.finite_activations(model, tuple(hooks.values()), bad)
            codes = {layer: replacement.encode(layer, rows[hook]) for layer, hook in hooks.items()}
            collector.update(batch, _only(codes, numbers))
            shown.update(collector.tokens)
            if collector.tokens >= tokens:
                break
    found = collector.result()
    notes = {}
    for latent, number in numbers.items():
        top = found.top
        windows = tuple(
            _window(top.tokens[number, place], top.values[number, place], words)
            for place in np.flatnonzero(top.keys[number] > -np.inf)
        )
        density = float(found.firings[number] / found.tokens)
        maximum = float(found.maxima[number]) if windows else None
        notes[latent] = Note(_peaks(windows), windows, maximum=maximum, density=density)
    return notes


def read_records(directory: str | Path, wanted: Mapping[int, Latent]) -> dict[Latent, Note]:
    """Read notes from a checkpoint's ``features.jsonl``, if it has one; ``wanted`` maps record numbers to latents.

    Damaged records are left out with a warning.
    """
    path = Path(directory) / "features" / RECORDS_FILE
    if not path.is_file():
        return {}
    try:
        if path.with_suffix(".json").is_file():
            about_records(path)
    except ValueError as error:
        log.warning("Contexts are searched anew: %s", error)
        return {}
    notes = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number in wanted:
                notes[wanted[number]] = _from_record(json.loads(line))
    return notes


@torch.no_grad()
def with_promoted(replacement: Replacement, notes: Mapping[Latent, Note], words: Sequence[str]) -> dict[Latent, Note]:
    """Add the tokens that each latent directly promotes and suppresses, summed over all layers it writes to."""
    anatomy = replacement.anatomy
    unembedding = anatomy.final_norm.fold(anatomy.W_U - anatomy.W_U.mean(0))
    found = {}
    for (layer, latent), note in notes.items():
        writes = replacement.writes(layer, torch.tensor([latent], device=unembedding.device))[0]
        written = torch.stack(
            [_gained(replacement, *pair) for pair in zip(replacement.written(layer), writes, strict=True)]
        ).sum(0)
        effects = unembedding @ written
        count = min(PROMOTED, len(effects))
        sides = [tuple(str(words[i]) for i in side.topk(count).indices.tolist()) for side in (effects, -effects)]
        found[layer, latent] = replace(note, promoted=sides[0], suppressed=sides[1])
    return found


def _gained(replacement: Replacement, layer: int, direction: Tensor) -> Tensor:
    """Return what the norm after the layer's MLP, if there is one, makes of a direction, up to its denominator."""
    norm = replacement.anatomy.layers[layer].mlp_post_norm
    return direction if norm is None or replacement.after_norm(layer) else norm.centre(direction) * norm.weight


def _only(codes: Mapping[int, SparseCode], numbers: Mapping[Latent, int]) -> SparseCode:
    """Return one code of only the wanted latents of all layers, renumbered."""
    tokens, latents, values = [], [], []
    for layer, code in codes.items():
        own = sorted((latent, number) for (at, latent), number in numbers.items() if at == layer)
        known = torch.tensor([latent for latent, _ in own], device=code.latents.device)
        places = torch.searchsorted(known, code.latents).clamp_max(len(own) - 1)
        chosen = known[places] == code.latents
        tokens.append(code.token_ids()[chosen])
        latents.append(torch.tensor([number for _, number in own], device=known.device)[places[chosen]])
        values.append(code.values[chosen])
    ends, order = group_by_latent(torch.cat(tokens), next(iter(codes.values())).n_tokens)
    return SparseCode(torch.cat(latents)[order], torch.cat(values)[order], ends[:-1])


def _window(tokens: np.ndarray, values: np.ndarray, words: Sequence[str]) -> LabelledWindow:
    there = np.flatnonzero(tokens != NO_TOKEN)
    texts = tuple(words[int(token)] for token in tokens[there])
    return LabelledWindow(texts, tuple(float(value) for value in values[there]), int(np.searchsorted(there, LIMITS.before)))


def _from_record(record: dict[str, Any]) -> Note:
    windows = tuple(
        LabelledWindow(tuple(example["tokens"]), tuple(example["activations"]), example["peak"])
        for example in record["top"][:CONTEXTS]
    )
    said = (record["explanation"] or {}).get("text")
    predicate = (record["details"].get("predicate_f1") or {}).get("predicate")
    return Note(said or predicate or _peaks(windows), windows, (), (), record["max_activation"], record["density"])


def _peaks(windows: Iterable[LabelledWindow]) -> str:
    """Return the tokens on which the latent fires most strongly, the most frequent first."""
    counts = Counter(window.tokens[window.peak].strip() for window in windows)
    return ", ".join(token for token, _ in counts.most_common(LABEL_TOKENS))


def latents_of(layers: Tensor, latents: Tensor) -> Iterator[Latent]:
    """Yield each latent once, in order."""
    yield from dict.fromkeys(zip(layers.tolist(), latents.tolist(), strict=True))
