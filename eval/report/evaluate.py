"""Evaluation of checkpoints: one ``report.json`` and one ``report.html`` per dictionary."""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...sae import SparseDictionary
from ...sae.checkpoint_files import CONFIG_FILE
from ...sae.files import write_json
from ...sae.rows import as_rows
from ...sae.training_usage import TrainingUsage
from ...training.activations.model import LanguageModel
from ...training.activations.tensor_stream import Activations, TensorStream
from ...training.activations.vector_files import VectorFiles, vector_problems
from ...training.bad_rows import counted
from ...training.recipe import HarvestSection, TextSection
from ...training.report import METRICS_FILE, check_log
from ...training.stages import StageProgress, stage
from ...transcoders.load import NO_OPTIONS, CheckpointOptions, doubts_of_files
from ...transcoders.stack import hooks_of_provenance
from ..checkpoint import (
    LoadedCheckpoint,
    LoadedDictionary,
    of_one_model,
    open_checkpoint,
    section_of_vectors,
    with_grids_members,
    with_model,
)
from ..heldout import Halves, eval_data, eval_shortfalls, require_widths, told_shortfalls, wanted_tokens
from ..metrics import GROUPS
from ..metrics.base import DictionaryOutputs, MetricGroup, Setting
from ..metrics.document_sums import SUMS_FILE, merged_sums, write_sums
from ..metrics.glossary import REPORT_VERSION
from ..metrics.inference import DEFAULT_INFERENCE, InferenceMode
from ..metrics.model_outputs import ModelOutputs
from ..pages.render import render_file
from ..result import Report
from ..sanity import ROWS_AT_ONCE, Sanity, sanity_doubts
from ..undefined import settled
from .cache import Beside, GroupResult, Nothing, content_of
from .stack import evaluate_opened

# Options of metric groups, by the groups' names.
MetricOptions = Mapping[str, Mapping[str, object]]

NO_USAGE = "the checkpoint does not hold its latents' silence in training (usage.safetensors)"

log = logging.getLogger(__name__)


def evaluate(
    checkpoint: str | Path,
    out: str | Path | None = None,
    activations: Activations | None = None,
    tokens: int | None = None,
    selection: InferenceMode = DEFAULT_INFERENCE,
    cache: bool = True,
    options: CheckpointOptions = NO_OPTIONS,
    metric_options: MetricOptions | None = None,
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
    found = _candidate(opened, out, selection)
    if selection.oracle:
        raise ValueError("--oracle: expected a language model, got only activations.")
    x, y = _rows_of(activations, found.dictionary)
    return _written(found, evaluate_tensor(found.dictionary, x, selection, y))


def _rows_of(activations: Activations, dictionary: SparseDictionary) -> tuple[Tensor, Tensor | None]:
    """Return the caller's inputs, and a transcoder's targets, as one tensor each."""
    pair = isinstance(activations, tuple | list) and len(activations) == 2 and not isinstance(activations[0], tuple | list)
    targets = dictionary.arguments()["kind"] not in ("sae", "crosscoder")
    if pair and (targets or isinstance(activations, tuple)):
        x, y = (as_rows(side, "activations") for side in activations)
        return x, y
    if isinstance(activations, Mapping) and "y" in activations:
        activations = {"x": activations["x"], "target": activations["y"]}
    rows = TensorStream(activations, 1, targets).sample(sys.maxsize)
    if not len(rows.x):
        raise ValueError("activations: expected finite numbers, got none: every token has a value that is not finite.")
    return rows.x, rows.target


def evaluate_all(
    checkpoints: Sequence[str | Path],
    outs: Sequence[str | Path | None] | None = None,
    tokens: int | None = None,
    selection: InferenceMode = DEFAULT_INFERENCE,
    cache: bool = True,
    options: CheckpointOptions = NO_OPTIONS,
    metric_options: MetricOptions | None = None,
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
    metric_options: MetricOptions | None = None,
) -> list[Report]:
    """Evaluate checkpoints that are already open, as ``evaluate_all`` does."""
    unknown = sorted((metric_options or {}).keys() - {group.name for group in GROUPS})
    if unknown:
        raise ValueError(
            f"metric_options: expected names among {', '.join(group.name for group in GROUPS)}, got {unknown[0]!r}."
        )
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
        _candidate(opened.completed(), out, selection)
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
            reports[id(candidate)] = _written(candidate, _merged(results), sums)
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
    candidate = _candidate(replace(opened, changed=(*opened.changed, *changed)), out, selection)
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
    return _written(candidate, entries)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate, with its report directory and inference mode."""

    opened: LoadedCheckpoint
    out: Path
    selection: InferenceMode

    @property
    def checkpoint(self) -> str:
        return self.opened.name

    @property
    def member(self) -> LoadedDictionary:
        return self.opened.members[0]

    @property
    def dictionary(self) -> SparseDictionary:
        return self.member.dictionary

    @property
    def source(self) -> dict[str, Any]:
        return self.member.provenance

    def ground(self, tokens: int | None) -> dict[str, Any]:
        """Return the model, text, token filters and token count; candidates for which these are equal share forward passes."""
        return {key: self.source.get(key) for key in ("model", "text", "harvest")} | {
            "tokens": wanted_tokens(self.source, tokens)
        }

    def kept(self, tokens: int) -> Beside:
        """Return the candidate's cache: next to a native checkpoint, in ``out`` for third-party files."""
        content = content_of(self.member.weights, self.member.config, self.selection.describe(), tokens)
        text = TextSection.model_validate(self.source["text"])
        return Beside(self.out if self.opened.foreign else self.member.directory, content, text)


def _candidate(opened: LoadedCheckpoint, out: str | Path | None, selection: InferenceMode) -> Candidate:
    selection.require_valid(opened.members[0].dictionary)
    if selection != DEFAULT_INFERENCE and out is None:
        raise ValueError("--out: required with --oracle or --pursuit, so that the usual report is not replaced.")
    target = opened.results if out is None else Path(out)
    if out is None and opened.foreign and not os.access(target, os.W_OK):
        raise ValueError(f"--out: required, because {target} cannot be written to.")
    return Candidate(opened, target, selection)


def _of_the_start(record: dict[str, Any]) -> dict[str, Any]:
    """Return what training recorded of the dictionary that it began with."""
    found: dict[str, Any] = {"start": record.get("path")}
    for when in ("before", "after"):
        for name, value in (record.get(when) or {}).items():
            found[f"{name}_{when}_training"] = value
    return found | {"start_tokens": record.get("judged_tokens"), "start_judged_on": record.get("judged_on")}


def _written(candidate: Candidate, entries: dict[str, Any], sums: Sequence[Mapping[str, list[float]]] = ()) -> Report:
    """Complete the report, write it with its page and sums by document, and return it."""
    source, dictionary = candidate.source, candidate.dictionary
    report: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "checkpoint": candidate.checkpoint,
        "kind": dictionary.arguments()["kind"],
        "encoder": json.dumps(dictionary.arguments()["encoder"]),
        "selection": candidate.selection.describe(),
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "n_latents": dictionary.n_latents,
        "hook": _hook(source),
        "model": (source.get("model") or {}).get("id"),
        "text": (source.get("text") or {}).get("source"),
        "training_tokens": source.get("training_tokens"),
        "git_commit": source.get("git_commit"),
        "weights_sha256": candidate.member.weights,
        **_seed_and_recipe(source),
        "assumed": list(candidate.opened.assumed),
    }
    had = [entries[key] for key in ("tokens_asked", "tokens", "documents_shared")]
    report |= told_shortfalls(candidate.checkpoint, [source], eval_shortfalls(*had))
    report |= _with_usage(entries, dictionary.training_usage)
    if source.get("start"):
        report |= _of_the_start(source["start"])
    if source.get("skipped"):
        report["skipped"] = [f"training: {counted(source['skipped'])}", *report.get("skipped", [])]
    doubts = _doubts(entries, dictionary)
    for doubt in doubts:
        log.warning("%s: wrong hook or normalisation? %s.", candidate.checkpoint, doubt)
    # Changes since training were already logged when the checkpoint was opened.
    report["doubts"] = [*doubts_of_files(source), *doubts, *candidate.opened.changed, *report["doubts"]]
    candidate.out.mkdir(parents=True, exist_ok=True)
    log_of_run = candidate.member.directory / METRICS_FILE
    if log_of_run.exists() and not candidate.opened.foreign:
        check_log(candidate.member.directory)
    if log_of_run.exists() and not candidate.opened.foreign and not (candidate.out / CONFIG_FILE).exists():
        # The page reads its training curve from the report's directory.
        shutil.copyfile(log_of_run, candidate.out / METRICS_FILE)
    # Removed first, so that old sums never lie next to a newer report.
    (candidate.out / SUMS_FILE).unlink(missing_ok=True)
    write_json(candidate.out / "report.json", report, sealed=True)
    if sums:
        write_sums(candidate.out, merged_sums(sums))
    return Report(report | {"report_path": str(render_file(candidate.out / "report.json"))})


def _seed_and_recipe(source: dict[str, Any]) -> dict[str, Any]:
    """Return the training seed, and a digest that is equal for runs that differ only in seed and directory."""
    recipe = source.get("recipe")
    if not recipe:
        return {"seed": None, "recipe_digest": None}
    rest = {key: value for key, value in recipe.items() if key not in ("seed", "out_dir", "wandb")}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
    return {"seed": recipe.get("seed"), "recipe_digest": digest}


def _with_usage(entries: dict[str, Any], usage: TrainingUsage | None) -> dict[str, Any]:
    """Add the dead latents of training, whose window differs from that of the scored tokens."""
    keys = ("dead_training_fraction", "dead_training_window_tokens")
    if usage is not None:
        return entries | dict(zip(keys, (usage.dead_fraction, usage.window_tokens), strict=True))
    return entries | dict.fromkeys(keys) | {"reasons": entries["reasons"] | dict.fromkeys(keys, NO_USAGE)}


def _doubts(entries: Mapping[str, Any], dictionary: SparseDictionary) -> list[str]:
    """Return the warnings of the sanity check, or none if one of its figures is undefined."""
    names = {"l0": "l0_mean", "norm_ratio": "l2_ratio"} | {n: n for n in ("tokens", "fvu", "cosine", "dead_fraction")}
    found: dict[str, Any] = {name: entries.get(entry) for name, entry in names.items()}
    return [] if None in found.values() else sanity_doubts(Sanity(**found, warnings=()), dictionary.n_latents)


def _hook(source: dict[str, Any]) -> str | None:
    """Return the hook of an SAE, or input and output hooks of a transcoder."""
    if not source.get("hooks_in") and not source.get("hook"):
        return None
    reads, writes = hooks_of_provenance(source)
    return writes[0] if reads == writes else f"{', '.join(reads)} -> {', '.join(writes)}"


@torch.no_grad()
def evaluate_tensor(
    dictionary: SparseDictionary, x: Tensor, selection: InferenceMode = DEFAULT_INFERENCE, y: Tensor | None = None
) -> dict[str, Any]:
    """Evaluate a dictionary on given activations: the first half fits, the second half is scored.

    Without ``y``, the targets are ``x``.

    Raises:
        ValueError: If there are fewer than two rows, or targets are missing, superfluous or of the wrong shape.
    """
    half = x.shape[0] // 2
    if half == 0:
        raise ValueError(f"activations: expected at least 2 tokens, got {x.shape[0]}.")
    kind = dictionary.arguments()["kind"]
    if (y is None) != (kind in ("sae", "crosscoder")):
        raise ValueError(f"activations: expected {'a pair (x, y)' if y is None else 'x alone'} for a {kind}.")
    targets = x if y is None else y
    if x.shape[1] != dictionary.d_in:
        raise ValueError(f"activations: expected width {dictionary.d_in}, the dictionary's d_in, got {x.shape[1]}.")
    if targets.shape != (x.shape[0], dictionary.d_out):
        raise ValueError(f"activations: y: expected {(x.shape[0], dictionary.d_out)}, got {tuple(targets.shape)}.")
    for name, rows in (("x", x), ("y", targets)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"activations: {name}: expected finite numbers, got NaN or infinite ones. Leave those rows out.")
    setting = Setting(dictionary, torch.device("cpu"), selection, fit_tokens=half)
    groups = [group(setting) for group in GROUPS if not group.reads_model]
    for rows, wanted in zip(x[:half].float().split(ROWS_AT_ONCE), targets[:half].float().split(ROWS_AT_ONCE), strict=True):
        piece = DictionaryOutputs(setting, None, (rows, wanted))
        for group in groups:
            group.fit(piece)
    for rows, wanted in zip(x[half:].float().split(ROWS_AT_ONCE), targets[half:].float().split(ROWS_AT_ONCE), strict=True):
        piece = DictionaryOutputs(setting, None, (rows, wanted))
        for group in groups:
            group.score(piece)
    return _merged(GroupResult(*settled(group.report())) for group in groups)


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
    metric_options: MetricOptions | None = None,
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


def _merged(parts: Iterable[GroupResult]) -> dict[str, Any]:
    """Merge the entries of all groups; ``reasons`` explains every ``None``."""
    found: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for part in parts:
        found |= part.entries
        reasons |= part.reasons
    return found | {"reasons": reasons}
