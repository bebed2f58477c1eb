"""Evaluation of checkpoints: one ``report.json`` and one ``report.html`` per dictionary."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...training.activations.model import LanguageModel
from ...training.activations.tensor_stream import Activations
from ...training.activations.vector_files import VectorFiles, vector_problems
from ...training.recipe import HarvestSection
from ...transcoders.load import NO_OPTIONS, CheckpointOptions
from ..checkpoint import (
    LoadedCheckpoint,
    of_one_model,
    open_checkpoint,
    section_of_vectors,
    with_grids_members,
    with_model,
)
from ..heldout import wanted_tokens
from ..metrics.inference import DEFAULT_INFERENCE, InferenceMode
from ..result import Report
from .cache import merged_entries
from .candidate import Candidate, candidate_of, write_report
from .on_activations import evaluate_tensor, given_rows
from .on_model import GroupOptions, evaluate_on_model, require_known_options
from .stack import evaluate_opened

log = logging.getLogger(__name__)


def evaluate(
    checkpoint: str | Path,
    out: str | Path | None = None,
    activations: Activations | None = None,
    tokens: int | None = None,
    selection: InferenceMode = DEFAULT_INFERENCE,
    cache: bool = True,
    options: CheckpointOptions = NO_OPTIONS,
    metric_options: GroupOptions | None = None,
    model: LanguageModel | Any = None,
    tokenizer: Any = None,
    text: str | Path | Sequence[str | Path] = (),
) -> Report:
    """Evaluate a dictionary; write ``report.json`` and ``report.html``, and return the report.

    Half of the held-out documents fit the mean and the dark-matter regression, the other half are scored; no document is in
    both. Directories of checkpoints and cross-layer transcoders are evaluated with all layers spliced in: see
    ``eval.report.stack``.

    >>> import tempfile
    >>> import torch
    >>> from sparsary import ENCODERS, SAE, evaluate
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     SAE(5, 23, ENCODERS["topk"](k=2)).save(folder, {})
    ...     report = evaluate(folder, activations=torch.randn(200, 5))
    >>> report["tokens"], report["l0_mean"] <= 2
    (100, True)

    Args:
        out: Directory for the report; by default the checkpoint's own. Required with a non-default ``selection``.
        activations: Evaluate on these activations instead of the model's: ``x``, or ``(x, y)`` for a dictionary that does not
            map ``x`` to itself, as tensors, arrays, or an iterable of them as in ``train``.
        tokens: Held-out tokens to evaluate on; by default the recipe's ``eval_tokens``.
        selection: How latents are chosen.
        cache: Reuse results of the same weights on the same text from ``eval_cache``.
        options: Facts that the checkpoint's files leave open.
        metric_options: Arguments of the metrics, by their names.
        model: Language model in memory, in place of the one that the checkpoint names, as in ``train``. Other weights than
            those of training are a doubt in the report.
        tokenizer: Tokenizer of a model object, if it has none itself.
        text: Files to evaluate on, in place of the text that the checkpoint names: the same as ``options.text``.

    Raises:
        ValueError: If the checkpoint, its model or its text cannot be loaded, or do not fit each other.
    """
    if text:
        options = replace(options, text=tuple(map(str, [text] if isinstance(text, str | Path) else text)))
    opened = open_checkpoint(checkpoint, with_model(options, model, tokenizer))
    if opened.in_place_together and (activations is not None or selection != DEFAULT_INFERENCE):
        raise ValueError(f"{checkpoint}: expected one checkpoint for --oracle, --pursuit or activations, got a stack.")
    if activations is None:
        return evaluate_loaded([opened], [out], tokens, selection, cache, metric_options)[0]
    found = candidate_of(opened, out, selection)
    if selection.oracle:
        raise ValueError("--oracle: expected a language model, got only activations.")
    x, y = given_rows(activations, found.dictionary)
    return write_report(found, evaluate_tensor(found.dictionary, x, selection, y))


def evaluate_all(
    checkpoints: Sequence[str | Path],
    outs: Sequence[str | Path | None] | None = None,
    tokens: int | None = None,
    selection: InferenceMode = DEFAULT_INFERENCE,
    cache: bool = True,
    options: CheckpointOptions = NO_OPTIONS,
    metric_options: GroupOptions | None = None,
) -> list[Report]:
    """Evaluate several dictionaries and write one report each; those of one model and text share its forward passes.

    Results equal those of ``evaluate`` on each checkpoint alone. All inputs are validated before the model runs::

        a, b = evaluate_all(["runs/a", "runs/b"], tokens=100_000)
        print(a["fvu"], b["fvu"])

    Args:
        checkpoints: Paths or hub ids. Without ``outs``, a grid's directory stands for its members.
        outs: Report directory of each checkpoint; ``None`` for the checkpoint's own.
        options: Facts that the checkpoints' files leave open, applied to all of them.
        metric_options: Arguments of the metrics, by their names.

    Raises:
        ValueError: If a checkpoint, its model or its text cannot be loaded, or do not fit each other.
    """
    if outs is None:
        checkpoints = with_grids_members(list(map(str, checkpoints)))
    opened = [open_checkpoint(checkpoint, options) for checkpoint in checkpoints]
    return evaluate_loaded(opened, outs, tokens, selection, cache, metric_options)


def evaluate_loaded(
    several: Sequence[LoadedCheckpoint],
    outs: Sequence[str | Path | None] | None = None,
    tokens: int | None = None,
    selection: InferenceMode = DEFAULT_INFERENCE,
    cache: bool = True,
    metric_options: GroupOptions | None = None,
) -> list[Report]:
    """Evaluate checkpoints that are already open, as ``evaluate_all`` does."""
    require_known_options(metric_options)
    outs = outs or [None] * len(several)
    several = [of_one_model(opened, "sparsary eval") for opened in several]
    stacks = [opened for opened in several if opened.in_place_together]
    if selection != DEFAULT_INFERENCE and stacks:
        raise ValueError(
            f"{stacks[0].name}: expected one checkpoint of one hook for --oracle or --pursuit, got a stack or "
            "a cross-layer one."
        )
    on_vectors = [section_of_vectors(opened) for opened in several]
    alone = [
        candidate_of(opened.completed(), out, selection)
        for opened, out, section in zip(several, outs, on_vectors, strict=True)
        if not opened.in_place_together and section is None
    ]
    together: dict[str, list[Candidate]] = {}
    for candidate in alone:
        together.setdefault(json.dumps(candidate.ground(tokens), sort_keys=True), []).append(candidate)
    reports: dict[int, Report] = {}
    for candidates in together.values():
        wanted = wanted_tokens(candidates[0].source, tokens)
        for candidate, results in zip(candidates, evaluate_on_model(candidates, wanted, cache, metric_options), strict=True):
            sums = [result.sums for result in results if result.sums is not None]
            reports[id(candidate)] = write_report(candidate, merged_entries(results), sums)
    found = iter(reports[id(candidate)] for candidate in alone)
    return [
        evaluate_opened(opened, out, tokens)
        if opened.in_place_together
        else next(found)
        if section is None
        else _evaluate_vectors(opened, section, out, tokens, selection)
        for opened, out, section in zip(several, outs, on_vectors, strict=True)
    ]


def _evaluate_vectors(
    opened: LoadedCheckpoint, section: HarvestSection, out: str | Path | None, tokens: int | None, selection: InferenceMode
) -> Report:
    """Evaluate a dictionary of vectors on those that training held out."""
    if selection.oracle:
        raise ValueError("--oracle: expected a language model, got only vectors.")
    vectors, source = VectorFiles(section), opened.members[0].provenance
    changed = vector_problems(source.get("content") or {}, vectors.content)
    candidate = candidate_of(replace(opened, changed=(*opened.changed, *changed)), out, selection)
    for line in changed:
        log.warning("%s: trained on something else: %s.", opened.name, line)
    wanted = wanted_tokens(source, tokens)
    x, _ = vectors.heldout(wanted)
    finite = torch.isfinite(x).all(-1)
    if int(finite.sum()) < 2:
        raise ValueError(
            f"{opened.name}: harvest.heldout: expected at least 2 held-out vectors, got {int(finite.sum())} of "
            f"{vectors.rows:,}. Give others: sparsary.evaluate(directory, activations=x)."
        )
    entries = evaluate_tensor(candidate.dictionary, x[finite], selection)
    entries |= {"tokens_asked": wanted}
    if not bool(finite.all()):
        entries["skipped"] = [f"held-out vectors that are not finite: {int((~finite).sum()):,}", *entries.get("skipped", [])]
    return write_report(candidate, entries)
