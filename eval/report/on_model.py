"""Evaluation of dictionaries on the activations of their language model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...training.bad_rows import counted
from ...training.stages import StageProgress, stage
from ...transcoders.stack import hooks_of_provenance
from ..heldout import Halves, eval_data, require_widths
from ..metrics import GROUPS
from ..metrics.base import DictionaryOutputs, MetricGroup, Setting
from ..metrics.model_outputs import ModelOutputs
from ..undefined import settled
from .cache import GroupResult, Nothing
from .candidate import Candidate

# Options of metric groups, by the groups' names.
GroupOptions = Mapping[str, Mapping[str, object]]

log = logging.getLogger(__name__)


def require_known_options(options: GroupOptions | None) -> None:
    """Raise a ``ValueError`` if options are of a metric group that does not exist."""
    unknown = sorted((options or {}).keys() - {group.name for group in GROUPS})
    if unknown:
        raise ValueError(
            f"metric_options: expected names among {', '.join(group.name for group in GROUPS)}, got {unknown[0]!r}."
        )


@dataclass(frozen=True)
class _Judge:
    """A candidate's setting and the metric groups it has yet to run."""

    setting: Setting
    groups: list[MetricGroup]


@torch.no_grad()
def evaluate_on_model(
    candidates: Sequence[Candidate],
    tokens: int,
    cache: bool = True,
    metric_options: GroupOptions | None = None,
) -> list[list[GroupResult]]:
    """Return the results of all metric groups for each candidate; candidates must share model, text and number of tokens.

    Cached groups are not run again; if all are cached, the model is not loaded.
    """
    kept = [candidate.kept(tokens) if cache else Nothing() for candidate in candidates]
    told = {group.name: (metric_options or {}).get(group.name, {}) for group in GROUPS}
    known = [
        {group.name: found for group in GROUPS if (found := store.get(group, told[group.name])) is not None} for store in kept
    ]
    skipped: list[GroupResult] = []
    if any(len(entries) < len(GROUPS) for entries in known):
        hooks = [hooks_of_provenance(candidate.source) for candidate in candidates]
        where = eval_data(candidates[0].source, [hook for pair in hooks for side in pair for hook in side])
        judges, halves = [], where.halves(tokens)
        for candidate, ((hook_in,), (hook_out,)), entries in zip(candidates, hooks, known, strict=True):
            dictionary = candidate.dictionary
            try:
                require_widths(where.model, (hook_in,), (dictionary.d_in,), "d_in")
                require_widths(where.model, (hook_out,), (dictionary.d_out,), "d_out")
            except ValueError as error:
                raise ValueError(f"{candidate.checkpoint}: {error}") from None
            device = where.model.device
            setting = Setting(
                dictionary.to(device), device, candidate.selection, where.model, hook_in, hook_out, halves.fit_tokens, tokens
            )
            judges.append(
                _Judge(
                    setting,
                    [group(replace(setting, options=told[group.name])) for group in GROUPS if group.name not in entries],
                )
            )
        with stage("evaluation", tokens) as shown:
            documents = _run([judge for judge in judges if judge.groups], halves, shown)
        if found := where.bad_texts.until(None) + where.bad_tokens.found:
            skipped = [GroupResult({"skipped": [f"evaluation: {counted(found)}"]}, {})]
            log.warning("Excluded from the evaluation, or repaired: %s.", counted(found))
        for judge, entries, store in zip(judges, known, kept, strict=True):
            for group in judge.groups:
                settled_entries = settled(group.report())
                sums = None if group.document_sums is None else group.document_sums.columns()
                entries[group.name] = GroupResult(*settled_entries, sums)
                store.put(type(group), told[group.name], entries[group.name], documents)
    return [[entries[group.name] for group in GROUPS] + skipped for entries in known]


def _run(judges: list[_Judge], halves: Halves, shown: StageProgress) -> int | None:
    """Feed the text to every group: one half of the documents to fit on, then the other half to score.

    Return the number of documents read, or ``None`` if the text was read to its end.
    """
    model, tokens, bad = halves.data.model, halves.asked, halves.data.bad_tokens
    hooks = tuple(dict.fromkeys(hook for judge in judges for hook in (judge.setting.hook_in, judge.setting.hook_out) if hook))
    reads_model = any(group.reads_model for judge in judges for group in judge.groups)
    figures = {hook: of for judge in judges for group in judge.groups for hook, of in group.token_figures.items()}
    cursor = halves.scored_from
    for piece in halves.fit():
        passage = ModelOutputs(model, piece, hooks, with_logits=False, bad=bad)
        for judge in judges:
            view = DictionaryOutputs(judge.setting, passage)
            for group in judge.groups:
                group.fit(view)
        shown.update(min(halves.fitted, tokens // 2))
    for piece in halves.score():
        passage = ModelOutputs(model, piece, hooks, with_logits=reads_model, bad=bad, figures=figures)
        for judge in judges:
            view = DictionaryOutputs(judge.setting, passage)
            for group in judge.groups:
                group.score(view)
        cursor = piece.cursor
        shown.update(min(tokens // 2 + halves.scored, tokens - 1))
    shown.update(tokens)
    return cursor.document + (cursor.offset > 0) if halves.scored >= tokens - tokens // 2 else None
