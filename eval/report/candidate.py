"""Candidates for evaluation, and the writing of their reports."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sae import SparseDictionary
from ...sae.checkpoint_files import CONFIG_FILE
from ...sae.files import write_json
from ...sae.training_usage import TrainingUsage
from ...training.bad_rows import counted
from ...training.recipe import TextSection
from ...training.report import METRICS_FILE, check_log
from ...transcoders.load import doubts_of_files
from ...transcoders.stack import hooks_of_provenance
from ..checkpoint import (
    LoadedCheckpoint,
    LoadedDictionary,
)
from ..heldout import eval_shortfalls, told_shortfalls, wanted_tokens
from ..metrics.document_sums import SUMS_FILE, merged_sums, write_sums
from ..metrics.glossary import REPORT_VERSION
from ..metrics.inference import DEFAULT_INFERENCE, InferenceMode
from ..pages.render import render_file
from ..result import Report
from ..sanity import Sanity, sanity_doubts
from .cache import Beside, content_of

NO_USAGE = "the checkpoint does not hold its latents' silence in training (usage.safetensors)"

log = logging.getLogger(__name__)


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


def candidate_of(opened: LoadedCheckpoint, out: str | Path | None, selection: InferenceMode) -> Candidate:
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


def write_report(candidate: Candidate, entries: dict[str, Any], sums: Sequence[Mapping[str, list[float]]] = ()) -> Report:
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
